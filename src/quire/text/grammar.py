"""Grammars, by llguidance: compiled once each, off the engine's thread, and one `Guide` for every sequence that follows one.

The way in is narrow, because a grammar is a stranger's program. Sizes are bounded when a `StructuredOutput` is made; a process of its own then tries
to compile it, within limits of time, stack and memory; only what passed is compiled here, again within a time; and all later work for it happens on
a thread that the engine does not wait for without end (engine/masks.py).
"""

from __future__ import annotations

import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

from quire.errors import EngineDeadError, InvalidRequestError, QueueFullError
from quire.structured import StructuredOutput
from quire.text.grammar_process import GrammarProcess
from quire.text.task import Task
from quire.text.tokenizer import TextTokenizer

COMPILE_SECONDS = 5.0  # of processor time
WAIT_SECONDS = 30.0  # for grammars of others that are being compiled
MAX_GRAMMARS = 128  # kept compiled, and refusals remembered
MAX_MESSAGE = 300


class Guide:
    """One sequence's place in a grammar.

    Attributes:
        mask: packed bits, one for each token that may come next, filled by `fill`; 32-bit words, ceil(V / 32) or more. Where one text alone may
            follow, just the token with which the tokenizer would write it is set.
        early: set by the owner: the sequence shall not end yet, if there is any other way (`min_tokens`).
        satisfied: as of the last `fill` or `accept`, whether the text so far is all that the grammar asks for.
        complete: whether it is, and nothing may follow.
        error: why the grammar cannot go on, "" while it can. Nothing is to be asked of such a guide any more.
    """

    def __init__(self, matcher: Any, num_words: int, grammar_ends: Collection[int], ends: Collection[int], special_ids: Collection[int]) -> None:
        self._matcher, self._grammar_ends, self._ends, self._special_ids = matcher, grammar_ends, ends, special_ids
        self.mask = array("I", bytes(4 * num_words))
        self.early = self.satisfied = self.complete = False
        self.error = ""

    def fill(self) -> None:
        """Compute `mask`. An end is allowed where the grammar is satisfied: any of the sequence's own ends, whatever the tokenizer's.

        Elsewhere none is, though the text may go on with it: a stop token may be a letter. Only a special one that the grammar asks for as its
        last is. While `early` it is not, unless nothing else is left: a grammar that is at its end wins over `min_tokens`.
        """
        if self.error:
            return
        self._matcher.unsafe_compute_mask_ptr(self.mask.buffer_info()[0], 4 * len(self.mask))
        if self._failed():
            return
        self.satisfied = self._matcher.is_accepting()
        if self.satisfied:
            self._mark(self._grammar_ends, False)
            self._mark(self._ends, True)
        else:
            self._mark([token_id for token_id in self._ends if self._allows(token_id) and not self._is_last(token_id)], False)
        if self.early:
            before = self.mask[:]
            self._mark(self._ends, False)
            if not self.mask.tobytes().strip(b"\0"):
                self.mask[:] = before

    def accept(self, token_id: int) -> None:
        """The sequence goes on with a token that `mask` allowed."""
        self._matcher.consume_token(token_id)
        if not self._failed():
            self.complete = self._matcher.is_stopped()
            self.satisfied = self.complete or self._matcher.is_accepting()

    def after(self, token_id: int) -> Guide:
        """A guide that is where this one would be, had it accepted this token; if the grammar does not allow it, one that has failed."""
        ahead = Guide(self._matcher.deep_copy(), len(self.mask), self._grammar_ends, self._ends, self._special_ids)
        ahead.error = self.error
        if not ahead.error:
            ahead.accept(token_id)
        return ahead

    def forced(self) -> list[int]:
        """The tokens that come next because one text alone may follow: `mask` will hold just the first of them, then just the second."""
        return [] if self.error else list(self._matcher.compute_ff_tokens())

    def count_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens, from the first on, may come next one after the other."""
        return 0 if self.error else int(self._matcher.validate_tokens(list(token_ids)))

    def fail(self, error: str) -> None:
        """It cannot go on."""
        self.error, self.satisfied, self.complete = _short(error), False, False

    def _failed(self) -> bool:
        if self._matcher.is_error():
            self.fail(self._matcher.get_error() or "unknown")
        return bool(self.error)

    def _allows(self, token_id: int) -> bool:
        word = token_id >> 5
        return word < len(self.mask) and bool(self.mask[word] >> (token_id & 31) & 1)

    def _is_last(self, token_id: int) -> bool:
        """Whether the grammar asks for this special token and is satisfied with it."""
        if token_id not in self._special_ids:
            return False
        ahead = self._matcher.deep_copy()
        ahead.consume_token(token_id)
        return bool(ahead.is_accepting())

    def _mark(self, token_ids: Collection[int], allowed: bool) -> None:
        for token_id in token_ids:
            word, bit = token_id >> 5, 1 << (token_id & 31)
            if word < len(self.mask):
                self.mask[word] = self.mask[word] | bit if allowed else self.mask[word] & ~bit


class Grammar:
    """A compiled grammar, at its beginning."""

    def __init__(self, matcher: Any, num_words: int, ends: Collection[int], special_ids: Collection[int]) -> None:
        self._matcher, self._num_words, self._ends, self._special_ids = matcher, num_words, ends, special_ids

    def start(self, ends: Collection[int]) -> Guide:
        """A new sequence, which ends with any of these tokens."""
        return Guide(self._matcher.deep_copy(), self._num_words, self._ends, ends, self._special_ids)


class GrammarCompiler:
    """Compiles grammars for one model and keeps those that were used last. Thread-safe.

    Args:
        tokenizer: the model's, or None.
        vocab_size: V, the width of its logits; ids that the tokenizer does not know are never allowed.
    """

    def __init__(self, tokenizer: TextTokenizer | None, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._made: OrderedDict[StructuredOutput, Grammar | str] = OrderedDict()
        self._looking, self._compiling = threading.Lock(), threading.Lock()
        self._ll: Any = None
        self._process: GrammarProcess | None = None
        self._closed = False

    def compile(self, asked: StructuredOutput) -> Grammar:
        """The grammar, from the cache or made now; the caller waits.

        Raises:
            InvalidRequestError: there is no tokenizer or no llguidance, or the grammar is invalid, unsatisfiable or too costly.
            QueueFullError: others' grammars are still being compiled.
            EngineDeadError: `close` has been called.
        """
        found = self._look(asked)
        if found is None:
            if not self._compiling.acquire(timeout=WAIT_SECONDS):
                raise QueueFullError("other grammars are still being compiled; try again later")
            try:
                found = self._look(asked) or self._make(asked)
            finally:
                self._compiling.release()
            with self._looking:
                self._made[asked] = found
                while len(self._made) > MAX_GRAMMARS:
                    self._made.popitem(last=False)
        if isinstance(found, str):
            raise InvalidRequestError("structured", asked, f"a form that some text has and that can be compiled ({found})")
        return found

    def prepare(self) -> None:
        """Read the tokenizer as llguidance sees it, now instead of at the first `compile`: it takes seconds for a large vocabulary.

        Raises InvalidRequestError as `compile` does; so does that one, then.
        """
        with self._compiling:
            self._prepare(None)

    def close(self) -> None:
        """End the process that tries grammars; none is started any more."""
        self._closed = True
        if self._process is not None:
            self._process.kill()  # whoever waits for its answer has none, and lets go
        with self._compiling:
            if self._process is not None:
                self._process.close()

    def _look(self, asked: StructuredOutput) -> Grammar | str | None:
        with self._looking:
            found = self._made.get(asked)
            if found is not None:
                self._made.move_to_end(asked)
            return found

    def _make(self, asked: StructuredOutput) -> Grammar | str:
        self._prepare(asked)
        assert self._process is not None and self._tokenizer is not None
        error = "" if self._closed else self._process.check(*asked.source)
        if self._closed:  # meanwhile: what was killed has said nothing about the grammar
            raise EngineDeadError("the engine has been closed")
        if error:
            return _short(error)
        task = Task(lambda: self._matcher(*asked.source))
        threading.Thread(target=task.run, name="quire-grammar", daemon=True).start()
        if not task.wait(COMPILE_SECONDS):  # the thread is left behind
            return f"it takes longer than {COMPILE_SECONDS:g} seconds to compile"
        if task.error is not None:
            raise task.error
        matcher = task.result
        if matcher.is_error():
            return _short(matcher.get_error())
        num_words = -(-self._ll.vocab_size // 32)
        grammar = Grammar(matcher, num_words, self._ll.eos_tokens, self._tokenizer.special_ids)
        probe = grammar.start(())
        probe.fill()
        if probe.error or not (probe.satisfied or any(probe.mask)):
            return probe.error or "no token of this model begins it"
        return grammar

    def _matcher(self, kind: str, source: str) -> Any:
        from quire.text.grammar_check import matcher_of

        matcher = matcher_of(self._ll, kind, source)
        matcher.compute_bitmask()  # what copies of it begin with is then computed already
        return matcher

    def _prepare(self, asked: StructuredOutput | None) -> None:
        if self._ll is not None:
            return
        if self._tokenizer is None:
            raise InvalidRequestError("structured", asked, "None: this model came without a tokenizer")
        try:
            from llguidance import LLTokenizer
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise InvalidRequestError("structured", asked, "None: llguidance is not installed (pip install 'quire[structured]')") from None
        hf = self._tokenizer.hf
        try:
            size = max(self._vocab_size, self._tokenizer.vocab_size)
            self._ll = from_tokenizer(hf, n_vocab=size)
            other = self._tokenizer.added_ids_of_other_text
            if other:  # special ones are no part of a text
                core = json.loads(hf.backend_tokenizer.to_str())
                for token in core["added_tokens"]:
                    token["special"] |= token["id"] in other
                self._ll = LLTokenizer(json.dumps(core), n_vocab=size, eos_token=hf.eos_token_id)
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            reason = f"None: llguidance cannot read this model's tokenizer ({_short(str(error))})"
            raise InvalidRequestError("structured", asked, reason) from None
        special = [str(token) for _, token in sorted(hf.added_tokens_decoder.items()) if token.special]
        self._process = GrammarProcess(self._vocab_size, special, COMPILE_SECONDS)


def _short(message: str) -> str:
    message = " ".join(message.split())
    return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."
