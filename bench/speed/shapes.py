"""The shapes that are measured: those of public models, to the number. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

# Bytes of a stored weight. int8 has one bf16 scale for 128 weights, int4 one for 32; what fills columns up to whole vectors is left out.
STORED_BYTES = {"none": 2.0, "int8": 1 + 2 / 128, "int4": 0.5 + 2 / 32}


@dataclass(frozen=True)
class Mixer:
    """What layers have in place of attention: as the config's `layer_types` call it and those that attend, the `weights` of one layer's matrices,
    its operations a token beside them, computed a token at a time, and what the config says of it."""

    kind: str
    attention: str
    weights: int
    flops: int
    fields: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Shape:
    """A decoder: L layers of Hq query and Hkv key heads of D, hidden size H, a gated MLP of I, and a head [V, H] that is the embedding as well.

    `full_every` = f: layers f, 2f, ... see all, the others `window` tokens with their own among them; 0: all layers see all. `mixer`: layers have
    that but for those in `attends`. `gated`: what attention gives is gated, by a matrix as large as that of its queries.
    """

    name: str
    model_type: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rope_theta: float
    rms_norm_eps: float
    window: int = 0
    full_every: int = 0
    mixer: Mixer | None = None
    attends: tuple[int, ...] = ()
    gated: bool = False

    @property
    def num_full_layers(self) -> int:
        """Layers that see all tokens before them."""
        return self.num_attention_layers // self.full_every if self.full_every else self.num_attention_layers

    @property
    def num_attention_layers(self) -> int:
        """Layers that attend to tokens before them, to all or in a window."""
        return self.layers if self.mixer is None else len(self.attends)

    @property
    def mixer_flops(self) -> int:
        """Operations a token of the layers that do not attend, beside their matrices."""
        return 0 if self.mixer is None else (self.layers - self.num_attention_layers) * self.mixer.flops

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of all layers; norms are left out."""
        attention = self.hidden * self.head_dim * ((3 if self.gated else 2) * self.heads + 2 * self.kv_heads)
        mixers = 0 if self.mixer is None else (self.layers - self.num_attention_layers) * self.mixer.weights
        return self.num_attention_layers * attention + mixers + self.layers * 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        """Weights of the head."""
        return self.vocab * self.hidden

    def kv_bytes(self, length: int) -> int:
        """Bytes of the bf16 keys and values that a token sees which ends a sequence of `length`, in all layers."""
        windowed = self.num_attention_layers - self.num_full_layers
        return 4 * self.kv_heads * self.head_dim * (self.num_full_layers * length + windowed * min(length, self.window))

    def shortened(self, layers: int | None) -> Shape:
        """The same with fewer layers; a hybrid keeps at least one that sees all."""
        if layers is None or layers >= self.layers:
            return self
        attends = tuple(i for i in self.attends if i < layers) or ((layers - 1,) if self.attends else ())
        return replace(self, layers=layers, full_every=min(self.full_every, layers), attends=attends, name=f"{self.name}-{layers}-layers")


QWEN3 = Shape("qwen3-0.6b", "qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, 40_960, 1e6, 1e-6)
SMOLLM2 = Shape("smollm2-135m", "llama", 49_152, 576, 1536, 30, 9, 3, 64, 8192, 1e5, 1e-5)
GEMMA3 = Shape("gemma-3-270m", "gemma3_text", 262_144, 640, 2048, 18, 4, 1, 256, 32_768, 1e6, 1e-6, window=512, full_every=6)
LLAMA3 = Shape("llama-3-8b", "llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 8192, 5e5, 1e-5)  # but for its head, which is one of its own
# A convolution of three taps between two gates.
LFM2 = Shape(
    "lfm2-350m", "lfm2", 65_536, 1024, 4608, 16, 16, 8, 64, 128_000, 1e6, 1e-5,
    mixer=Mixer("conv", "full_attention", 4 * 1024 * 1024, 8 * 1024, (("norm_eps", 1e-5), ("block_auto_adjust_ff_dim", False))),
    attends=(2, 5, 8, 10, 12, 14),
)  # fmt: skip
# A state of 16 heads of 128 x 128: read for its correction, changed and read.
QWEN3_5 = Shape(
    "qwen3.5-0.8b", "qwen3_5_text", 248_320, 1024, 3584, 24, 8, 2, 256, 262_144, 1e7, 1e-6, gated=True,
    mixer=Mixer(
        "linear_attention", "full_attention", 1024 * (6144 + 2048 + 32 + 2048), 8 * 6144 + 6 * 16 * 128 * 128,
        (("linear_num_key_heads", 16), ("linear_num_value_heads", 16), ("linear_key_head_dim", 128), ("linear_value_head_dim", 128)),
    ),
    attends=(3, 7, 11, 15, 19, 23),
)  # fmt: skip
# A state of 48 heads of 32 x 128: changed and read.
GRANITE4 = Shape(
    "granite-4.0-h-350m", "granitemoehybrid", 100_352, 768, 2048, 32, 12, 4, 64, 32_768, 1e4, 1e-5,
    mixer=Mixer(
        "mamba", "attention", 768 * (3376 + 1536), 8 * 1792 + 4 * 48 * 32 * 128,
        (("shared_intermediate_size", 2048), ("num_local_experts", 0), ("mamba_n_heads", 48), ("mamba_d_head", 32), ("mamba_d_state", 128)),
    ),
    attends=(10, 13, 17, 27),
)  # fmt: skip
SHAPES = {shape.name: shape for shape in (QWEN3, SMOLLM2, GEMMA3, LFM2, QWEN3_5, GRANITE4)}
