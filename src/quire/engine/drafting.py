"""Who guesses for a branch: what was said before, what its request predicts, and where a grammar leaves one text alone, that text."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from quire.config import MAX_DRAFTS
from quire.engine.state import Branch
from quire.policy.drafts import MAX_NGRAM, Drafter, PromptLookup
from quire.text.grammar import Guide


@dataclass(frozen=True, slots=True)
class Guided:
    """Guesses for a sequence that follows a grammar: forced tokens are right, and of others those that it allows may be."""

    guide: Guide
    other: Drafter | None

    def guess(self, tokens: Tokens[int], room: int) -> tuple[int, ...]:
        """See `Drafter`."""
        if room < 1:
            return ()
        forced = self.guide.forced()
        if forced or self.other is None:
            return tuple(forced[:room])
        drafts = self.other.guess(tokens, room)
        return drafts[: self.guide.count_allowed(drafts)]


def drafter_of(branch: Branch, prompt_lookup_num_tokens: int) -> Drafter | None:
    """The branch's own, or None where nobody guesses; the number is the engine's option."""
    asked, prediction = branch.request.params.prompt_lookup_num_tokens, branch.request.prediction
    most = (prompt_lookup_num_tokens if asked is None else asked) or (MAX_DRAFTS if prediction else 0)
    before = [*branch.request.prompt_token_ids[-MAX_NGRAM:], *prediction] if prediction else ()
    lookup = PromptLookup(most, before) if most else None
    return Guided(branch.guide, lookup) if branch.guide is not None else lookup
