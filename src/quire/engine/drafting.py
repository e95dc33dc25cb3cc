"""Who guesses for a branch: what was said before, what its request predicts, and where a grammar leaves one text alone, that text."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from quire.config import MAX_DRAFTS
from quire.engine.state import Branch
from quire.policy.drafts import MAX_NGRAM, Drafter, PromptLookup
from quire.text.grammar import Guide


class Guided:
    """Guesses for a sequence that follows a grammar: forced tokens are right, and of others those that it allows may be."""

    def __init__(self, guide: Guide, other: Drafter | None) -> None:
        self._guide, self._other = guide, other
        self._forced: list[int] = []
        self._at = 0  # how many tokens there were then

    def guess(self, tokens: Tokens[int], room: int) -> tuple[int, ...]:
        """See `Drafter`."""
        if room < 1:
            return ()
        came = tokens[self._at :]
        if came == self._forced[: len(came)] and len(came) < len(self._forced):  # a text of thousands of tokens is asked for once
            self._forced = self._forced[len(came) :]
        else:
            self._forced = self._guide.forced()
        self._at = len(tokens)
        if self._forced or self._other is None:
            return tuple(self._forced[:room])
        drafts = self._other.guess(tokens, room)
        return drafts[: self._guide.count_allowed(drafts)]


def drafter_of(branch: Branch, prompt_lookup_num_tokens: int) -> Drafter | None:
    """The branch's own, or None where nobody guesses; the number is the engine's option."""
    asked, prediction = branch.request.params.prompt_lookup_num_tokens, branch.request.prediction
    most = (prompt_lookup_num_tokens if asked is None else asked) or (MAX_DRAFTS if prediction else 0)
    before = [*branch.request.prompt_token_ids[-MAX_NGRAM:], *prediction] if prediction else ()
    lookup = PromptLookup(most, before) if most else None
    return Guided(branch.guide, lookup) if branch.guide is not None else lookup
