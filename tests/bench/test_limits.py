"""The lower bounds, held against numbers that were worked out by hand for a shape small enough to do so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench.speed.checkpoints import config_fields
from bench.speed.limits import flops, least_tokens, limit, weight_bytes
from bench.speed.shapes import GEMMA3, QWEN3, SHAPES, SMOLLM2, Mixer, Shape
from bench.speed.workloads import Job, Workload
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Two layers; matrices of one: q 4 x 6, k 4 x 2, v 4 x 2, o 6 x 4, and three of 4 x 5: 24 + 8 + 8 + 24 + 60 = 124. Head 10 x 4 = 40.
TINY = Shape(
    "tiny", "llama", vocab=10, hidden=4, intermediate=5, layers=2, heads=3, kv_heads=1, head_dim=2, context=99, rope_theta=1e4, rms_norm_eps=1e-6
)
HYBRID = replace(TINY, window=3, full_every=2)
MIXED = replace(TINY, mixer=Mixer("conv", "full_attention", 30, 50, ()), attends=(1,))


def jobs(*sizes: tuple[int, int]) -> tuple[Job, ...]:
    return tuple(Job((7,) * prompt, new) for prompt, new in sizes)


def test_weights() -> None:
    assert (TINY.layer_weights, TINY.head_weights) == (248, 40)
    assert weight_bytes(TINY) == 2 * 288
    assert weight_bytes(TINY, "int8") == 288 + 288 / 64
    assert weight_bytes(TINY, "int4") == 144 + 18


def test_keys_and_values() -> None:
    assert TINY.kv_bytes(5) == 2 * (5 * 2 * 2 * 2)  # layers x (tokens x keys and values x dims x bytes)
    assert HYBRID.kv_bytes(5) == (5 + 3) * 2 * 2 * 2


def test_flops_of_a_full_and_a_windowed_layer() -> None:
    # Positions 0, 1, 2, 3 see 1 + 2 + 3 + 4 = 10 keys a layer; a key costs 4 x 3 x 2 = 24. A token costs 2 x 248, a row of logits 2 x 40.
    assert flops(TINY, 0, 4, 1) == 4 * 496 + 80 + 2 * 10 * 24
    # With a window of three the fourth sees 3: 9 in one of the two layers.
    assert flops(HYBRID, 0, 4, 0) == 4 * 496 + (10 + 9) * 24
    # Positions 3 and 4 alone: 4 + 5, and 3 + 3 in the window.
    assert flops(HYBRID, 3, 5, 2) == 2 * 496 + 2 * 80 + (9 + 6) * 24
    assert flops(TINY, 2, 2, 0) == 0


def test_layers_that_do_not_attend() -> None:
    # One layer of 30 + 60 weights in place of 124, 50 operations a token, and keys in the other alone.
    assert MIXED.layer_weights == 90 + 124 and replace(MIXED, gated=True).layer_weights == 90 + 124 + 24
    assert flops(MIXED, 0, 4, 1) == 4 * (2 * 214 + 50) + 80 + 10 * 24
    assert MIXED.kv_bytes(5) == 5 * 2 * 2 * 2
    assert MIXED.shortened(1).attends == (0,)


def test_one_stream_is_bound_by_reading_the_weights() -> None:
    found = limit(Workload("W1", "", "stream", TINY, jobs((4, 3))), read_bytes_s=100.0, flop_s=1e9)
    assert found.seconds == pytest.approx(3 * 576 / 100) and found.bound == "memory"
    assert found.tokens == 4 + 2
    assert limit(Workload("W1", "", "stream", TINY, jobs((4, 3))), 100.0, 1e9, "int8").seconds == pytest.approx(3 * 292.5 / 100)


def test_the_first_token() -> None:
    workload = Workload("W4", "", "first", TINY, jobs((4, 9)))
    prefill = 4 * 496 + 80 + 480
    assert limit(workload, 1e9, 100.0).seconds == pytest.approx(prefill / 100)
    assert limit(workload, 1.0, 1e9).seconds == pytest.approx(576)


def test_samples_are_a_prompt_and_steps_of_all() -> None:
    workload = Workload("W5", "", "samples", TINY, jobs((4, 3)), n=2)
    prefill = 4 * 496 + 80 + 480  # once, with one row of logits for both
    steps = [2 * (496 + 80 + 2 * keys * 24) for keys in (5, 6)]
    assert limit(workload, 1e9, 10.0).seconds == pytest.approx((prefill + sum(steps)) / 10)
    reading = limit(workload, 1.0, 10.0)  # reading 576 s a step, arithmetic 163 and 173
    assert (reading.seconds, reading.bound) == (pytest.approx(prefill / 10 + 2 * 576), "memory")
    assert limit(workload, 3.4, 10.0).seconds == pytest.approx(prefill / 10 + 576 / 3.4 + steps[1] / 10)  # 169.4 lies between them
    assert least_tokens(workload) == 4 + 2 * 2


def test_a_batch_with_a_shared_prefix() -> None:
    # A prefix of 2, once; then one token each, and 1 and 2 tokens after the first drawn one.
    workload = Workload("W3", "", "batch", TINY, jobs((3, 2), (3, 3)), shared=2, max_concurrent=2)
    assert least_tokens(workload) == 2 + (1 + 1) + (1 + 2)
    keys = (1 + 2) + (3 + 4) + (3 + 4 + 5)
    total = 7 * 496 + (2 + 3) * 80 + 2 * keys * 24
    found = limit(workload, 1e9, 10.0)
    assert (found.flops, found.bound, found.seconds) == (total, "arithmetic", pytest.approx(total / 10))
    # Five tokens, two at a time, take three steps, and so does the longest output.
    assert limit(workload, 1.0, 1e9).seconds == pytest.approx(3 * 576)
    assert limit(replace(workload, max_concurrent=1), 1.0, 1e9).seconds == pytest.approx(5 * 576)


def test_the_shapes_are_the_public_ones() -> None:
    millions = [round((shape.layer_weights + shape.head_weights) / 1e6, 1) for shape in (QWEN3, SMOLLM2, GEMMA3)]
    assert millions == [596.0, 134.5, 268.0]
    assert (QWEN3.kv_bytes(1), QWEN3.num_full_layers, GEMMA3.num_full_layers) == (114_688, 28, 3)
    assert GEMMA3.shortened(2).num_full_layers == 1 and GEMMA3.shortened(99) is GEMMA3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_checkpoint_has_the_matrices_of_its_shape(shape: Shape) -> None:
    config = CONFIG_MAPPING[shape.model_type](**config_fields(shape))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2]
    assert sum(map(torch.Tensor.numel, matrices)) == shape.layer_weights + shape.head_weights  # the embedding is the head
