"""Several processes and one folder: together, and killed at any moment."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

from tests.tensors.disk_shelf import NUM_NUMBERS, WORKER_BYTES, WORKER_PAGES, Shelf, file_bytes

ROOT = Path(__file__).parents[2]
FILE_BYTES = file_bytes(WORKER_BYTES)


def start(program: str, folder: Path, seed: int) -> subprocess.Popen[str]:
    """A worker that has opened the store."""
    command = [sys.executable, "-m", "tests.tensors.disk_shelf", program, str(folder), str(seed)]
    worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    return worker


def wait_ready(worker: subprocess.Popen[str]) -> None:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    assert line == "ready\n", (line, worker.communicate()[1])


def test_processes_that_share_a_folder(tmp_path: Path) -> None:
    """They write, read and evict at once, while the index is damaged, lost and damaged again."""
    folder = tmp_path / "cache"
    workers = [start("hammer", folder, seed) for seed in range(3)]
    for worker in workers:
        wait_ready(worker)
    for i in range(6):
        time.sleep(0.2)
        assert len(list(folder.glob("*.page"))) <= WORKER_PAGES + len(workers)
        index = folder / "index.sqlite"
        if i % 2 == 0 and index.exists():
            index.unlink() if i == 2 else index.write_bytes(b"\x55" * 9000)
    total = dict.fromkeys(("reads", "hits", "damaged", "write_errors"), 0)
    for worker in workers:
        out, err = worker.communicate(timeout=60)
        assert worker.returncode == 0, err
        stats = json.loads(out)
        total = {name: total[name] + stats[name] for name in total}
    assert total["reads"] > 100 and total["hits"] > 20 and total["damaged"] == 0, total
    shelf = Shelf(folder, WORKER_PAGES, WORKER_BYTES)
    left = shelf.there()
    assert 0 < len(left) <= WORKER_PAGES and shelf.count("damaged") == 0
    assert shelf.count("pages") == len(left) and shelf.bytes_on_disk() == shelf.count("bytes") == len(left) * FILE_BYTES
    assert not list(folder.glob("*.tmp"))


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """What is left is right and complete, and nothing is set aside for it."""
    folder, rng, found = tmp_path / "cache", random.Random(5), 0
    for round_number in range(8):
        worker = start("write_for_ever", folder, round_number)
        wait_ready(worker)
        time.sleep(rng.uniform(0.01, 0.15))
        worker.kill()
        worker.communicate()
        shelf = Shelf(folder, WORKER_PAGES, WORKER_BYTES)
        assert shelf.bytes_on_disk() <= WORKER_PAGES * FILE_BYTES + 100
        left = shelf.there((*range(NUM_NUMBERS), 1000))  # 1000 is from the round before, if the worker did not come far
        found += len(left)
        assert shelf.count("damaged") == 0 and shelf.count("pages") == len(left) == len(list(folder.glob("*.page")))
        assert shelf.write(1000) and shelf.contains(1000) == 1
        shelf.close()
    assert found > 8 * 3 and not (folder / "index.damaged").exists()
