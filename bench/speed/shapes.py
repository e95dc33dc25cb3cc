"""The shapes that are measured: those of public models, to the number. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Bytes of a stored weight. int8 has one bf16 scale for 128 weights, int4 one for 32; what fills columns up to whole vectors is left out.
STORED_BYTES = {"none": 2.0, "int8": 1 + 2 / 128, "int4": 0.5 + 2 / 32}


@dataclass(frozen=True)
class Shape:
    """A decoder: L layers of Hq query and Hkv key heads of D, hidden size H, a gated MLP of I, and a head [V, H] that is the embedding as well.

    `full_every` = f: layers f, 2f, ... see all, the others `window` tokens with their own among them; 0: all layers see all.
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

    @property
    def num_full_layers(self) -> int:
        """Layers that see all tokens before them."""
        return self.layers // self.full_every if self.full_every else self.layers

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of all layers; norms are left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the head."""
        return self.vocab * self.hidden

    def kv_bytes(self, length: int) -> int:
        """Bytes of the bf16 keys and values that a token sees which ends a sequence of `length`, in all layers."""
        windowed = self.layers - self.num_full_layers
        return 4 * self.kv_heads * self.head_dim * (self.num_full_layers * length + windowed * min(length, self.window))

    def shortened(self, layers: int | None) -> Shape:
        """The same with fewer layers; a hybrid keeps at least one that sees all."""
        if layers is None or layers >= self.layers:
            return self
        return replace(self, layers=layers, full_every=min(self.full_every, layers), name=f"{self.name}-{layers}-layers")


QWEN3 = Shape("qwen3-0.6b", "qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, 40_960, 1e6, 1e-6)
SMOLLM2 = Shape("smollm2-135m", "llama", 49_152, 576, 1536, 30, 9, 3, 64, 8192, 1e5, 1e-5)
GEMMA3 = Shape("gemma-3-270m", "gemma3_text", 262_144, 640, 2048, 18, 4, 1, 256, 32_768, 1e6, 1e-6, window=512, full_every=6)
LLAMA3 = Shape("llama-3-8b", "llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 8192, 5e5, 1e-5)  # but for its head, which is one of its own
SHAPES = {shape.name: shape for shape in (QWEN3, SMOLLM2, GEMMA3)}
