"""The page face: the paged cache under a plain forward of a Hugging Face model, with tables that the caller keeps. No engine, no queue.

    page_table [B, M]      cache_lens [B]     page_size 256
    [ 0, 1, -, -, -, - ]   10                 row 0: positions 0..9 are in page 0; a token now goes to page 0, place 10
    [ 2, 3, 4, 5, 6, 7 ]   1025               row 1: a token now goes to page 6, place 1
    [ 8, 9, -, -, -, - ]   320                what is marked - is never read

Pages need not follow each other, may be shared by rows that only read them, and keep what was written until it is written over.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from quire.config import EngineConfig, split_codec
from quire.engine.build import open_model
from quire.engine.home import OwnThread, stays_here
from quire.engine.kernels import choose_kernels
from quire.errors import InvalidRequestError, UnsupportedModelError
from quire.faces.checked import integer, integers, is_whole
from quire.policy.copies import PageCopy
from quire.policy.groups import in_one_group
from quire.tensors.attention.base import StepInputs, TableInputs
from quire.tensors.host import no_modes_of_callers, one_torch_thread_here
from quire.tensors.models.geometry import carries
from quire.tensors.store import PageStore, StagedStep, cached_layers, layer_places


class PagedCache:
    """`num_pages` pages of `page_size` tokens of all layers, and the model that fills them.

    Args:
        model: a hub id, a local folder or a live `PreTrainedModel`, which is not copied and not changed.
        num_pages: pages 0 to num_pages - 1. Their memory is taken as they are first written.
        page_size: tokens a page holds.
        dtype, kv_codec, backend, num_threads, revision, trust_remote_code: as in `EngineConfig`.

    Raises:
        ConfigError, ModelError: as `LLM`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        num_pages: int,
        page_size: int,
        *,
        dtype: str = "auto",
        kv_codec: str | None = None,
        backend: str = "auto",
        num_threads: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        config = EngineConfig(
            page_size=page_size,
            dtype=dtype,
            kv_codec=kv_codec,
            backend=backend,
            num_threads=num_threads,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        if isinstance(num_pages, bool) or not isinstance(num_pages, int) or not 1 <= num_pages < 2**31:  # kernels read their ids as int32
            raise InvalidRequestError("num_pages", num_pages, f"an integer from 1 to {2**31 - 1}")
        threads = num_threads or torch.get_num_threads()
        kernels = choose_kernels(backend, threads)
        with no_modes_of_callers():
            self._model = open_model(os.fspath(model) if isinstance(model, os.PathLike) else model, config, kernels)
            if carries(self._model.layers):
                self._model.close()
                told = "a PagedCache goes on from any token, and a recurrent layer's state from the last alone"
                raise UnsupportedModelError(f"{self._model.model_type}: {told}")
            layers = cached_layers(self._model.layers, self._model.dtype, *split_codec(kv_codec))
            arrangement = in_one_group(layers, page_size)
            self._store = PageStore(layer_places(arrangement, layers), num_pages, arrangement.page_bytes, kernels.attention)
        self.num_pages, self.page_size = num_pages, page_size
        self._thread = OwnThread("quire-pages", one_torch_thread_here)
        self._close = weakref.finalize(self, self._model.close)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._store.page_bytes

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        page_table: torch.Tensor,
        cache_lens: torch.Tensor | Sequence[int],
        logits_to_keep: int = 0,
    ) -> torch.Tensor:
        """Run the next q tokens of B sequences, and write their keys and values to their pages when all has succeeded.

        Args:
            input_ids: integers [B, q], the tokens at positions cache_lens[b] to cache_lens[b] + q - 1 of each sequence.
            page_table: integers [B, M]; entry j of a row is the page of its positions j * page_size and on. Entries behind the last of its
                tokens may be anything.
            cache_lens: [B], how many tokens of each sequence are in its pages.
            logits_to_keep: logits of only so many last tokens of each row; 0 takes all.

        Returns:
            logits [B, q, V], or [B, logits_to_keep, V], in the model's dtype. A row's bits depend on its own sequence alone.

        Raises:
            InvalidRequestError: shapes that do not fit, a page that is not there or that two rows would write, a sequence beyond the model's
            context, an id outside its vocabulary. Nothing has run.
        """
        lens = torch.tensor(integers("cache_lens", cache_lens, "[B] integers"), dtype=torch.int64)
        tables = self._needed_pages(input_ids, page_table, lens)
        num_rows, num_new = input_ids.shape
        if not 0 <= integer("logits_to_keep", logits_to_keep) <= num_new:
            raise InvalidRequestError("logits_to_keep", logits_to_keep, f"from 0 to {num_new}, the tokens of a row")
        positions = lens[:, None] + torch.arange(num_new)
        flat, starts = [page for table in tables for page in table], [0]
        for table in tables:
            starts.append(starts[-1] + len(table))
        table_inputs = TableInputs(torch.tensor(flat, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32))
        query_start = torch.arange(0, num_rows * num_new + 1, num_new, dtype=torch.int32)
        pages = table_inputs.page_ids[table_inputs.page_start[:-1, None] + positions // self.page_size].long()
        slots = (pages * self.page_size + positions % self.page_size).flatten()
        step = StagedStep(self._store, StepInputs(query_start, lens.int(), (table_inputs,)), (slots,))
        kept = logits_to_keep or num_new
        logits_at = torch.arange(num_rows * num_new).view(num_rows, num_new)[:, num_new - kept :].flatten()

        def run() -> torch.Tensor:
            logits = self._model.forward(step, input_ids.flatten().long(), positions.flatten(), logits_at)
            step.commit()
            return logits.clone() if logits.is_inference() else logits  # else a caller could neither change them nor go on with autograd

        return self._thread.run(run).view(num_rows, kept, -1)

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page, before a sequence that shares it goes on writing. Raises InvalidRequestError for a page that is not there."""
        for name, page in (("source", source), ("target", target)):
            if not 0 <= integer(name, page) < self.num_pages:
                raise InvalidRequestError(name, page, f"a page from 0 to {self.num_pages - 1}")
        self._thread.run(lambda: self._store.copy_pages([PageCopy(source, target, group_id=0, num_tokens=self.page_size)]))

    def close(self) -> None:
        """Leave a live model as it was. A second call does nothing."""
        self._thread.close()
        self._close()

    __reduce_ex__ = stays_here

    def __enter__(self) -> PagedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _needed_pages(self, input_ids: torch.Tensor, page_table: torch.Tensor, lens: torch.Tensor) -> list[list[int]]:
        """Of each row, the pages it reads or writes."""
        for name, given in (("input_ids", input_ids), ("page_table", page_table)):
            if not isinstance(given, torch.Tensor) or not is_whole(given) or given.dim() != 2 or not given.numel():
                told = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, torch.Tensor) else given
                raise InvalidRequestError(name, told, "a tensor of integers with two dimensions, at least one")
        num_rows, num_new = input_ids.shape
        if page_table.shape[0] != num_rows:
            raise InvalidRequestError("page_table", tuple(page_table.shape), f"[{num_rows}, M], a row for each of input_ids")
        if lens.shape != (num_rows,) or int(lens.min()) < 0 or int(lens.max()) + num_new > self._model.context_len:
            raise InvalidRequestError(
                "cache_lens", lens.tolist(), f"{num_rows} numbers from 0 to {self._model.context_len - num_new}, the context less {num_new}"
            )
        ids = input_ids.long()  # torch compares no uint16, 32 and 64
        outside = ids[(ids < 0) | (ids >= self._model.vocab_size)]
        if len(outside):
            raise InvalidRequestError("input_ids", int(outside[0]), f"ids from 0 to {self._model.vocab_size - 1}")
        tables, written = [], set[int]()
        for b, (row, length) in enumerate(zip(page_table.tolist(), lens.tolist(), strict=True)):
            first, end = length // self.page_size, -(-(length + num_new) // self.page_size)
            needed, mine = row[:end], row[first:end]
            if end > len(row) or not all(0 <= page < self.num_pages for page in needed):
                limit = f"{end} pages from 0 to {self.num_pages - 1} for {length + num_new} tokens"
                raise InvalidRequestError("page_table", f"row {b}: {needed}", limit)
            if written & set(mine) or len(set(mine)) < len(mine):
                raise InvalidRequestError("page_table", f"row {b}: {mine}", "pages that nothing else in this call writes, each once in its row")
            written |= set(mine)
            tables.append(needed)
        for b, (needed, length) in enumerate(zip(tables, lens.tolist(), strict=True)):
            if rewritten := written.intersection(needed[: length // self.page_size]):
                raise InvalidRequestError("page_table", f"row {b}: {needed}", f"complete pages that no row writes; {sorted(rewritten)} are written")
        return tables
