"""The kernels' threads: any number of them give the same bits, they sleep when there is nothing to do, end with their caller, and survive a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.tensors.native_products import NativeProducts

TASKS = Path("/proc/self/task")


def operands(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(33, 300, generator=source), torch.randn(700, 300, generator=source)


@pytest.mark.parametrize("num_threads", [2, 3, 9])  # more than there are cores, too
def test_callers_at_once_get_the_bits_of_one_thread_alone(num_threads: int) -> None:
    given = [operands(seed) for seed in range(4)]
    alone = [NativeProducts(1).linear(*pair) for pair in given]
    products = NativeProducts(num_threads)
    with ThreadPoolExecutor(4) as callers:
        for _ in range(40):
            for one, other in zip(alone, callers.map(lambda pair: products.linear(*pair), given), strict=True):
                assert torch.equal(one, other)


@pytest.mark.skipif(not TASKS.exists(), reason="counts threads in /proc")
def test_a_caller_that_ends_takes_its_threads_along() -> None:
    before = {task.name for task in TASKS.iterdir()}
    seen: set[str] = set()

    def work() -> None:
        NativeProducts(5).linear(*operands(0))
        seen.update(task.name for task in TASKS.iterdir())

    caller = threading.Thread(target=work)
    caller.start()
    caller.join()
    assert len(seen - before) >= 5
    end = time.monotonic() + 30  # Python is done with a thread a little before the system is
    while {task.name for task in TASKS.iterdir()} & (seen - before):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_threads_that_wait_sleep() -> None:
    NativeProducts(4).linear(*operands(0))
    time.sleep(0.1)
    used = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - used < 0.25  # three that spin would take 1.5, or all that two cores have


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_makes_threads_of_its_own() -> None:
    code = """
import os, torch
from quire.tensors.native_products import NativeProducts
x, w = torch.randn(33, 300), torch.randn(700, 300)
products = NativeProducts(3)
before = products.linear(x, w)
child = os.fork()
same = torch.equal(before, products.linear(x, w))
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
