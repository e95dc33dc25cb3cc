"""The disk under the pool: what comes back has the same bits, and what does not come back is computed."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.engine.build import open_model
from quire.errors import ConfigError
from quire.outputs import RequestOutput
from quire.policy.costs import Costs
from quire.tensors.disk import DiskStore
from tests.engine.conftest import Checkpoint, tokenizer
from tests.tensors.checkpoints import make, tiny_model

PROMPTS = [[5 + (i * i * 7 + 3 * i + seed) % 180 for i in range(50 + 7 * seed)] for seed in range(4)]
DRAWN = [SamplingParams(max_tokens=20, temperature=1.0, seed=seed, logprobs=2, ignore_eos=True) for seed in range(4)]


def bits(outputs: list[RequestOutput]) -> list[tuple[object, ...]]:
    assert all(output.error is None for output in outputs)
    return [tuple((one.token_ids, one.logprobs, one.top_logprobs) for one in output.outputs) for output in outputs]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_pages_give_the_same_bits(checkpoint: Checkpoint, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, options = checkpoint(family, dtype), {"page_size": 4, "max_tokens_per_step": 24}
    with LLM(folder, **options, prefix_sharing=False) as llm:
        alone = bits(llm.generate(PROMPTS, DRAWN))
    with LLM(folder, **options, cache_dir=tmp_path / "store") as llm:
        assert bits(llm.generate(PROMPTS, DRAWN)) == alone
    for order in (1, -1):
        with LLM(folder, **options, cache_dir=tmp_path / "store") as llm:
            outputs = llm.generate(PROMPTS[::order], DRAWN[::order])
            assert bits(outputs) == alone[::order]
            assert all(output.receipt.cached_tokens >= 40 for output in outputs), [output.receipt.cached_tokens for output in outputs]
            stats = llm.stats()
            assert stats["num_fetched_pages"] > 0 and stats["num_disk_hits"] == stats["num_fetched_pages"]
            llm.check_integrity()


def test_a_prompt_whose_last_chunk_has_just_begun_comes_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """No layer sees any of its pages, and it is a hit all the same."""
    folder = checkpoint("llama4_text", no_rope_layers=[1, 1], layer_types=["chunked_attention"] * 2)
    for hit in (0, 60):
        with LLM(folder, page_size=4, cache_dir=tmp_path) as llm:
            assert llm.generate(PROMPTS[2], DRAWN[0])[0].receipt.cached_tokens == hit


def test_a_namespace_is_found_again_and_no_other(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for namespace, hit in (("a", 0), ("a", 48), ("b", 0)):
        with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path) as llm:
            told, found = llm.explain(PROMPTS[0], namespace=namespace), llm.generate(PROMPTS[0], DRAWN[0], namespace=namespace)[0].receipt
            assert found.cached_tokens == hit
            assert (told.cached_tokens, told.miss_index, told.reason) == (hit, found.miss_index, found.miss_reason)


@pytest.mark.parametrize("codec", [None, "int8"])
def test_pages_of_another_version_are_not_found(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str | None) -> None:
    """Rows as it computed and encoded them are of the very size that they have now: a clean miss."""
    for version, hit in (("1", 0), ("2", 0), ("2", 48), ("1", 48)):
        monkeypatch.setattr("quire.engine.build.version", lambda _, version=version: version)
        with LLM(checkpoint("llama"), page_size=4, kv_codec=codec, cache_dir=tmp_path) as llm:
            assert llm.generate(PROMPTS[0], DRAWN[0])[0].receipt.cached_tokens == hit
            assert llm.stats()["num_disk_damaged"] == 0


def another_tokenizer(folder: str) -> None:
    """A token more than `tokenizer()` has: nothing that it had is written otherwise."""
    other = tokenizer()
    other.add_tokens(["<more>"])
    other.save_pretrained(folder)


def no_tokenizer(folder: str) -> None:
    for path in Path(folder).glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize("change", [another_tokenizer, no_tokenizer])
def test_another_tokenizer_finds_nothing(tmp_path: Path, change: Callable[[str], None]) -> None:
    """The ids are the same, and so are the weights to the byte and the second; only who made ids of text has changed, and changes back."""
    folder = make(tmp_path / "model", "llama")
    tokenizer().save_pretrained(folder)

    def run() -> tuple[int, list[tuple[object, ...]]]:
        with LLM(folder, page_size=4, cache_dir=tmp_path / "store") as llm:
            outputs = llm.generate(PROMPTS[:1], DRAWN[:1])
            assert llm.stats()["num_disk_damaged"] == 0, "a clean miss"
            return outputs[0].receipt.cached_tokens, bits(outputs)

    cold, warm = run(), run()
    change(folder)
    other, other_warm = run(), run()
    tokenizer().save_pretrained(folder)
    assert [hit for hit, _ in (cold, warm, other, other_warm, run())] == [0, 48, 0, 48, 48]
    assert cold[1] == warm[1] == other[1] == other_warm[1]


def test_what_preemption_pushed_out_comes_back_from_the_disk(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """One of higher priority needs nearly the whole pool: the pages of the one that gave way are evicted, and read again instead of computed."""
    folder, params = checkpoint("llama"), dataclasses.replace(DRAWN[0], max_tokens=60)
    with LLM(folder, page_size=4) as llm:
        alone, page_bytes = bits(llm.generate(PROMPTS[0], params)), llm.info.page_bytes
    with LLM(folder, page_size=4, cache_bytes=page_bytes * 32, cache_dir=tmp_path) as llm:
        low = llm.submit(PROMPTS[0], params)
        next(iter(low))
        high = llm.submit([3 + (i * i + i) % 150 for i in range(115)], dataclasses.replace(params, max_tokens=12), priority=1)
        assert high.wait(60).error is None
        output = low.wait(60)
        assert bits([output]) == alone and output.receipt.num_preemptions == 1
        assert llm.stats()["num_fetched_pages"] > 8
        assert output.receipt.computed_tokens < len(PROMPTS[0]) + 60 + 16, "all but a little was read"
        llm.check_integrity()


def at_rest(llm: LLM) -> None:
    """Wait until nothing is on its way to the disk."""
    while llm.cache_map().counts()["moving"]:
        time.sleep(0.01)


def refuse(*_: object) -> bool:
    return False


@pytest.mark.parametrize(("family", "cached"), [("llama", 72), ("gemma3_text", 0)])
def test_what_comes_takes_no_place_of_what_it_continues(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, cached: int
) -> None:
    """A prompt has lost some pages to another one. They take the room of that one when they come, not of their own prompt's others, which lie there
    for longer; and of a sequence that has been written to the disk the end leaves first, as of any."""
    monkeypatch.setattr(Costs, "reading_pays", lambda *_: True)
    folder, greedy = checkpoint(family), SamplingParams(max_tokens=1, temperature=0.0)
    one, other = [3 + (i * i + i) % 150 for i in range(101)], [3 + (i**3 + 5 * i) % 150 for i in range(61)]
    with LLM(folder, page_size=4) as llm:
        cache_bytes = llm.info.page_bytes * (llm.explain(one).pages_needed + 8)
        cold = bits(llm.generate(one, greedy))
    with LLM(folder, page_size=4, cache_bytes=cache_bytes, cache_dir=tmp_path) as llm:
        for prompt in (one, other):
            llm.generate(prompt, greedy)
            at_rest(llm)
        with monkeypatch.context() as unread:
            unread.setattr(Costs, "reading_pays", refuse)
            assert llm.explain(one).cached_tokens == cached
        outputs = llm.generate(one, greedy)
        assert bits(outputs) == cold and outputs[0].receipt.cached_tokens == 100
        assert llm.stats()["num_fetched_pages"] < 25, "some were fetched in the place of others that were fetched next"
        llm.check_integrity()


def run_out(*_: object) -> bool:
    raise MemoryError("injected")


@pytest.mark.parametrize("fault", [refuse, run_out])
def test_a_disk_that_fails_costs_nothing_but_the_hits(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., bool]
) -> None:
    folder = checkpoint("llama")
    with LLM(folder, page_size=4, cache_dir=tmp_path) as llm:
        cold = bits(llm.generate(PROMPTS, DRAWN))
    monkeypatch.setattr(DiskStore, "read", fault)
    monkeypatch.setattr(DiskStore, "write", fault)
    with LLM(folder, page_size=4, cache_dir=tmp_path) as llm:
        outputs = llm.generate(PROMPTS, DRAWN)
        assert bits(outputs) == cold and all(output.receipt.cached_tokens < 8 for output in outputs)
        llm.check_integrity()
        assert llm.stats()["num_fetched_pages"] == 0


def test_a_system_without_threads_to_spare_stores_all_the_same(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path) as llm, monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        cold = bits(llm.generate(PROMPTS, DRAWN))
    with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path) as llm, monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        assert bits(llm.generate(PROMPTS, DRAWN)) == cold
        assert llm.stats()["num_fetched_pages"] > 0
        llm.check_integrity()


def test_an_engine_that_nobody_closed_stores_at_the_interpreters_exit(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Executors take nothing from then on, and the engine still steps, stores and reads until it is closed."""
    with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path) as llm:
        cold, cache_bytes = bits(llm.generate(PROMPTS[:1], DRAWN[:1])), llm.info.page_bytes * 40
    with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path, cache_bytes=cache_bytes) as llm, monkeypatch.context() as patch:
        patch.setattr("concurrent.futures.thread._shutdown", True)
        outputs = llm.generate(PROMPTS[:2], DRAWN[:2])
        assert bits(outputs[:1]) == cold and outputs[0].receipt.cached_tokens == 48
        open_stream = llm.submit(PROMPTS[2], DRAWN[2])
        next(iter(open_stream))
        llm.close()
    assert not caplog.records and open_stream.wait().outputs[0].finish_reason == "cancelled"
    with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path) as llm:
        assert [output.receipt.cached_tokens for output in llm.generate(PROMPTS[1:3], DRAWN[1:3])] == [56, 60]


def test_a_slow_disk_keeps_nobody_else_waiting(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, gate, read = checkpoint("llama"), threading.Event(), DiskStore.read
    with LLM(folder, page_size=4, cache_dir=tmp_path) as llm:
        cold = bits(llm.generate(PROMPTS[:1], DRAWN[:1]))
    monkeypatch.setattr(DiskStore, "read", lambda *args: gate.wait(30) and read(*args))
    with LLM(folder, page_size=4, cache_dir=tmp_path) as llm:
        waiting = llm.submit(PROMPTS[0], DRAWN[0])
        other = llm.generate(PROMPTS[1], DRAWN[1])[0]
        assert other.error is None and llm.stats()["num_waiting"] == 1
        cancelled = llm.submit(PROMPTS[0], DRAWN[0])
        cancelled.cancel()
        assert cancelled.wait(30).outputs[0].finish_reason == "cancelled"
        llm.check_integrity()
        gate.set()
        output = waiting.wait(30)
        assert bits([output]) == cold and output.receipt.cached_tokens == 48 and output.receipt.waited_for == "disk"


def test_a_disk_that_is_never_done_keeps_no_list_of_all_that_was(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), DiskStore.write
    monkeypatch.setattr(DiskStore, "write", lambda *args: gate.wait(30) and write(*args))
    monkeypatch.setattr("quire.engine.tier.MAX_ENDED", 3)
    with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path) as llm:
        for prompt in ([5 + seed, 6, 7, 8, 9, 10, 11, 12, 13] for seed in range(20)):
            llm.generate(prompt, SamplingParams(max_tokens=1))
        tier = llm._built.tier
        assert tier is not None and tier.busy
        num_kept = len(tier._together)
        gate.set()
        assert num_kept == 3
        at_rest(llm)
        assert not tier._together


def test_a_smaller_pool_waits_for_pages_on_their_way_to_the_disk(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs and the writer holds pages: there is nobody to give way, and the pages come back by themselves."""
    gate, write = threading.Event(), DiskStore.write
    monkeypatch.setattr(DiskStore, "write", lambda *args: gate.wait(30) and write(*args))
    with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path, cache_bytes=2**20) as llm:
        llm.generate(PROMPTS, DRAWN)
        assert llm.cache_map().counts()["moving"] > 1, "nothing is on its way"
        assert llm.stats()["num_held_pages"] == 0, "an idle engine holds nothing, whatever the writer is at"
        opening = threading.Timer(0.3, gate.set)
        opening.start()
        assert llm.resize_cache(llm.info.page_bytes) == llm.info.page_bytes
        opening.join()
        llm.check_integrity()
        assert llm.stats()["num_pages"] == 1


def test_a_reset_waits_for_the_disk_and_holds_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path, cache_bytes=2**18) as llm:
        llm.generate(PROMPTS, DRAWN)
        llm.pin(PROMPTS[0])
        llm.reset_cache()
        stats = llm.stats()
        assert stats["num_held_pages"] == stats["num_cached_pages"] == 0
        llm.check_integrity()


def test_what_cannot_be_stored_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    with pytest.raises(ConfigError, match="cache_dir=.*must be None for a live model"):
        LLM(tiny_model("llama"), cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="cache_dir=.*must be None with prefix_sharing=False"):
        LLM(folder, cache_dir=tmp_path, prefix_sharing=False)
    with pytest.raises(ConfigError, match="cache_dir=.*must be None with cache_layout='stacked'"):
        LLM(folder, cache_dir=tmp_path, cache_layout="stacked")
    with pytest.raises(ConfigError, match="cache_dir_bytes=5: must be None without a cache_dir"):
        LLM(folder, cache_dir_bytes=5)
    for wrong in (3, ""):
        with pytest.raises(ConfigError, match="cache_dir=.*must be a path or None"):
            LLM(folder, cache_dir=wrong)
    (tmp_path / "file").write_text("")
    for source in (folder, str(tmp_path / "no such model")):
        with pytest.raises(ConfigError, match="cache_dir=.*must be a folder"):  # before a model is looked for
            LLM(source, cache_dir=tmp_path / "file")


def test_bytes_for_no_page_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Nothing would ever be stored. A page of the llama's takes 3072 bytes, and its header 4096."""
    with pytest.raises(ConfigError, match="cache_dir_bytes=7167: must be at least 7168, the file of one page"):
        LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path, cache_dir_bytes=7167)
    with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path, cache_dir_bytes=7168) as llm:
        llm.generate([PROMPTS[0][:5]], SamplingParams(max_tokens=1))
        at_rest(llm)
        assert llm.stats()["num_disk_pages"] == 1


def test_a_folder_that_goes_while_the_model_is_loaded_is_made_again(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pages"
    monkeypatch.setattr("quire.engine.build.open_model", lambda *given: (folder.rmdir(), open_model(*given))[1])
    with LLM(checkpoint("llama"), cache_dir=folder) as llm:
        assert llm.stats()["num_disk_pages"] == 0 and folder.is_dir()


def test_the_folder_stays_within_its_bytes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path, cache_dir_bytes=200_000) as llm:
        for seed in range(6):
            llm.generate([[3 + (i * i + seed * i) % 150 for i in range(90)]], DRAWN[0])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert 50_000 < sum(path.stat().st_size for path in files if "index" not in path.name) <= 220_000


def test_restarts_leave_room_for_what_is_there(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of which the pages take as much as they may: half of it, at the second start as at the first."""

    def taken() -> int:
        return sum(path.stat().st_size for path in tmp_path.glob("*.page"))

    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr("quire.engine.cache_dir.shutil.disk_usage", lambda _: disk(400_000, taken(), 400_000 - taken()))
    for start in range(3):
        with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path) as llm:
            assert llm.stats()["num_disk_evictions"] == 0
            for seed in range(6 if start == 0 else 0):
                llm.generate([[3 + (i * i + seed * i) % 150 for i in range(90)]], DRAWN[0])
        assert 180_000 < taken() <= 200_000
