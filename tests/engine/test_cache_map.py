"""The picture of the cache: it agrees with the counters under a random load, and nobody sees another namespace's tokens in it."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.engine.cache_map import CacheMap, OnDisk
from quire.engine.tier import page_content_id
from quire.errors import InvalidRequestError
from quire.policy.pages import DISK_MARK, PIN_MARK, STATE_BITS, STATES
from quire.tensors.disk import DiskStore
from tests.engine.conftest import Checkpoint

PROMPT = [5 + (i * i * 7 + 3 * i) % 180 for i in range(37)]
SHORT = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def agrees(seen: CacheMap, num_pages: int) -> None:
    counts, stats = seen.counts(), seen.stats
    assert len(seen.states) == num_pages == sum(counts.values())
    assert (counts["free"], counts["retired"]) == (stats["num_free_pages"], stats["num_retired_pages"])
    held = counts["held"] + counts["shared"] + counts["pinned"]  # what moves up from the disk is held besides, what moves down is still cached
    assert held <= stats["num_held_pages"] == num_pages - stats["num_free_pages"] - stats["num_cached_pages"] - stats["num_retired_pages"]
    assert counts["cached"] <= stats["num_cached_pages"] <= counts["cached"] + counts["moving"]
    marked = sum(bool(state & DISK_MARK) for state in seen.states)
    assert marked == (seen.disk.num_also if seen.disk else 0)
    assert sum(bool(state & PIN_MARK) for state in seen.states) == stats["num_pinned_pages"]
    holders = [0] * num_pages
    for seq in seen.sequences:
        for page_id in {page_id for table in seq.tables for page_id in table if page_id >= 0}:
            holders[page_id] += 1
    for page_id, state in enumerate(seen.states):
        name = STATES[state & STATE_BITS]
        assert (holders[page_id] > 1) == (name == "shared") and (holders[page_id] == 1) == (name == "held"), (page_id, name, holders[page_id])
    assert sum(any(seq.tables) for seq in seen.sequences) == stats["num_running"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("disk", [False, True])
def test_states_agree_with_the_counters_under_a_random_load(checkpoint: Checkpoint, tmp_path: Path, family: str, disk: bool) -> None:
    rng, seen_states = random.Random(5), set()
    with LLM(checkpoint(family), page_size=4) as llm:
        page_bytes = llm.info.page_bytes
    options = {"cache_dir": tmp_path} if disk else {}
    with LLM(checkpoint(family), page_size=4, max_tokens_per_step=24, max_sequences=6, cache_bytes=page_bytes * 150, **options) as llm:
        pin = llm.pin(PROMPT, namespace="a")

        def load() -> None:
            for _ in range(12):
                streams = [
                    llm.submit(
                        PROMPT[: rng.randrange(1, 37)] + [rng.randrange(3, 190) for _ in range(rng.randrange(1, 40))],
                        SamplingParams(max_tokens=rng.randrange(1, 16), n=rng.choice((1, 1, 3)), ignore_eos=True, seed=rng.randrange(99)),
                        namespace=rng.choice(("a", "b")),
                    )
                    for _ in range(4)
                ]
                if rng.random() < 0.3:
                    streams[0].cancel()
                for stream in streams:
                    assert stream.wait(60).error is None

        thread = threading.Thread(target=load)
        thread.start()
        while thread.is_alive():
            seen = llm.cache_map()
            agrees(seen, llm.info.num_pages)
            seen_states |= {name for name, count in seen.counts().items() if count}
            time.sleep(0.002)
        thread.join()
        llm.unpin(pin)
        llm.resize_cache(page_bytes * 100)
        seen = llm.cache_map()
        agrees(seen, llm.info.num_pages)
        assert seen.counts()["retired"] == 50 and not seen.sequences
        assert seen_states >= {"free", "held", "shared", "cached", "pinned"}
        llm.check_integrity()


@pytest.fixture
def looks_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.engine.disk_eye.LISTED_S", 0.0)
    monkeypatch.setattr("quire.engine.disk_eye.SHARE", 1e9)


def settled(llm: LLM) -> CacheMap:
    """The picture when nothing is on its way to the disk any more."""
    while (seen := llm.cache_map()).counts()["moving"] or not seen.disk.settled:  # type: ignore[union-attr]
        time.sleep(0.005)
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_lies_on_disk_is_marked(checkpoint: Checkpoint, tmp_path: Path, looks_every_time: None, family: str) -> None:
    def files() -> list[Path]:
        return sorted(tmp_path.glob("*.page"))

    def names(llm: LLM, seen: CacheMap) -> set[str]:
        """Of marked pages the names that the store gives them, made anew from what the index says of each."""
        cache, store = llm._built.engine.scheduler.cache, llm._built.eye._disk  # type: ignore[union-attr]
        keys = {page_id: cache.index.key_of(page_id) for page_id, state in enumerate(seen.states) if state & DISK_MARK}
        return {store._name(page_content_id(key, key.pages.index(page_id))) for page_id, key in keys.items() if key is not None}

    with LLM(checkpoint(family), page_size=4, cache_dir=tmp_path) as llm:
        assert settled(llm).disk == OnDisk(0, 0, True)
        llm.generate(PROMPT, SHORT, namespace="a")
        seen = settled(llm)
        assert names(llm, seen) == {path.name for path in files()} and seen.disk == OnDisk(len(files()), 0, True)
        assert all(STATES[state & STATE_BITS] == "cached" for state in seen.states if state & DISK_MARK)
        llm.reset_cache()
        num_files = len(files())
        assert settled(llm).disk == OnDisk(0, num_files, True) and num_files > 8
    with LLM(checkpoint(family), page_size=4, cache_dir=tmp_path) as llm:
        assert llm.cache_map().disk == OnDisk(0, num_files, True), "what another process left there"
        stream = llm.submit(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True), namespace="a")
        next(iter(stream))
        seen = settled(llm)
        held = {page_id for table in seen.sequences[0].tables for page_id in table}
        marked = {page_id for page_id, state in enumerate(seen.states) if state & DISK_MARK}
        assert marked & held and names(llm, seen) <= {path.name for path in files()}
        assert (seen.disk.num_also, seen.disk.num_only) == (len(marked), num_files - len(marked))  # type: ignore[union-attr]
        for path in files():
            path.unlink()
        assert llm.cache_map().disk == OnDisk(0, 0, True), "somebody has emptied the folder"
        stream.cancel()
    with LLM(checkpoint(family, dtype=torch.bfloat16), page_size=4, cache_dir=tmp_path) as llm:
        assert llm.cache_map().disk == OnDisk(0, 0, True), "pages of another dtype are not its own"


def test_the_folder_is_not_listed_at_every_look(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[int] = []
    listed = DiskStore.listed
    monkeypatch.setattr(DiskStore, "listed", lambda store: lists.append(1) or listed(store))
    monkeypatch.setattr("quire.engine.disk_eye.LISTED_S", 1000.0)
    with LLM(checkpoint("llama"), page_size=4, cache_dir=tmp_path) as llm:
        assert llm.cache_map().disk == OnDisk(0, 0, True)
        llm.generate(PROMPT, SHORT)
        while not (seen := llm.cache_map()).stats["num_stored_pages"]:
            pass
        assert len(lists) == 1 and seen.disk is not None and not seen.disk.settled


def test_more_holders_than_a_byte_counts(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), page_size=4, max_sequences=300, cache_bytes=2**24) as llm:
        stream = llm.submit(PROMPT, SamplingParams(n=290, max_tokens=200, ignore_eos=True))
        most = 0
        while most < 280:
            seen = llm.cache_map()
            agrees(seen, llm.info.num_pages)
            most = max(most, sum(any(seq.tables) for seq in seen.sequences))
        assert seen.counts()["shared"] >= 9
        stream.cancel()
        stream.wait(60)


def test_a_long_queue_is_cut(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), page_size=4, max_sequences=2) as llm:
        streams = [llm.submit(PROMPT, SamplingParams(max_tokens=300, ignore_eos=True)) for _ in range(100)]
        seen = llm.cache_map()
        assert len(seen.sequences) <= 66 < seen.stats["num_running"] + seen.stats["num_waiting"] or seen.stats["num_waiting"] <= 64
        for stream in streams:
            stream.cancel()


def contents(llm: LLM, namespace: str) -> dict[int, tuple[int, ...]]:
    """What a namespace is told of every page."""
    pages = [llm.page(page_id, namespace=namespace) for page_id in range(llm.info.num_pages)]
    return {page.page_id: page.token_ids for page in pages if page.token_ids is not None}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_namespace_sees_its_own_tokens_only(checkpoint: Checkpoint, family: str) -> None:
    with LLM(checkpoint(family), page_size=4, cache_bytes=2**19) as llm:
        mine, other = PROMPT[:23], [token + 200 for token in PROMPT]
        (a,) = llm.generate(mine, SHORT, namespace="a")
        (b,) = llm.generate(other, SHORT, namespace="b")
        for namespace, output in (("a", a), ("b", b)):
            whole = output.prompt_token_ids + output.outputs[0].token_ids
            told = [llm.page(page_id, namespace=namespace) for page_id in contents(llm, namespace)]
            assert told and all(page.token_ids == tuple(whole[page.position : page.position + len(page.token_ids)]) for page in told)
            covered = {i for page in told if page.group_id == told[0].group_id for i in range(page.position, page.position + len(page.token_ids))}
            assert len(covered) >= len(whole) - 2 if family == "llama" else covered
        assert not contents(llm, "a").keys() & contents(llm, "b").keys()
        assert contents(llm, "") == contents(llm, "c") == {}


def test_what_runs_is_told_to_its_own_namespace(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), page_size=4) as llm:
        stream = llm.submit(PROMPT, SamplingParams(max_tokens=800, ignore_eos=True), namespace="a", request_id="mine")
        next(iter(stream))
        (seq,) = llm.cache_map().sequences
        page_id = seq.tables[0][2]
        own, foreign = llm.page(page_id, namespace="a"), llm.page(page_id, namespace="b")
        stream.cancel()
        assert (seq.request_id, seq.namespace, seq.num_prompt) == ("mine", "a", len(PROMPT))
        assert (own.token_ids, own.position, own.request_ids) == (tuple(PROMPT[8:12]), 8, ("mine",)) and own.state == "held"
        assert foreign.token_ids is None and foreign.request_ids == () and foreign.num_holders == 1


def test_behind_what_all_share_it_is_private_again(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), page_size=4, cache_bytes=2**19) as llm:
        assert llm.share(PROMPT[:16]) == 16
        for namespace, tail in (("a", [7, 8, 9, 10, 11]), ("b", [17, 18, 19, 20, 21])):
            llm.generate(PROMPT[:16] + tail, SHORT, namespace=namespace)
            told = [llm.page(page_id, namespace=namespace) for page_id in contents(llm, namespace)]
            assert (16, tuple(tail[:4])) in {(page.position, page.token_ids) for page in told}
        shared = contents(llm, "c")
        assert sorted(shared.values()) == sorted(tuple(PROMPT[i : i + 4]) for i in range(0, 16, 4)), (
            "what is no secret is told to all, and nothing more"
        )
        assert contents(llm, "a").keys() & contents(llm, "b").keys() == shared.keys()


def test_what_was_shared_and_is_forgotten_is_not_told(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.policy.namespaces.MAX_SHARED", 1)
    with LLM(checkpoint("llama"), page_size=4, cache_bytes=2**19) as llm:
        llm.share(PROMPT[:16])
        llm.generate(PROMPT, SHORT, namespace="a")
        assert contents(llm, "b")
        llm.share([1, 2, 3, 4])
        assert not contents(llm, "b"), "nobody can hit it any more"


def test_a_part_of_a_namespace_is_told_to_the_whole(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), page_size=4, cache_bytes=2**19) as llm:
        llm.share(PROMPT[:8])
        llm.generate(PROMPT, SHORT, namespace="a/b")
        tokens = set(contents(llm, "a/b").values())
        assert set(contents(llm, "a").values()) == tokens and tuple(PROMPT[8:12]) in tokens
        for other in ("", "b", "a/", "a/bc", "a/b/c", "aa"):
            assert set(contents(llm, other).values()) == {tuple(PROMPT[:4]), tuple(PROMPT[4:8])}
        stream = llm.submit([9, 8, 7, 6, 5], SamplingParams(max_tokens=600, ignore_eos=True), namespace="a/b", request_id="mine")
        next(iter(stream))
        page_id = llm.cache_map().sequences[0].tables[0][0]
        told = {namespace: llm.page(page_id, namespace=namespace) for namespace in ("a", "a/b", "a/bc", "")}
        stream.cancel()
        assert [told[name].request_ids for name in told] == [("mine",), ("mine",), (), ()]


def test_no_such_page(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama")) as llm:
        for page_id in (-1, llm.info.num_pages):
            with pytest.raises(InvalidRequestError, match=f"page_id={page_id}: must be"):
                llm.page(page_id)
