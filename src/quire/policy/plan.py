"""What one step will do: which sequences compute how many tokens, and which pages are copied first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from quire.policy.copies import PageCopy
from quire.policy.sequence import Sequence


class Work(NamedTuple):
    """`sequence` computes its next `num_tokens` tokens, behind all it has in hand so many `drafts` (`policy/drafts.py`).

    When that reaches all it has in hand, a token is drawn after the last one, and one after each draft.
    """

    sequence: Sequence
    num_tokens: int
    drafts: tuple[int, ...] = ()

    @property
    def num_sure(self) -> int:
        """Those of its tokens that are no drafts."""
        return self.num_tokens - len(self.drafts)

    @property
    def num_scored(self) -> int:
        """After how many of its first tokens the next one, of the prompt, is scored."""
        seq = self.sequence
        return max(0, min(self.num_tokens, seq.num_prompt - 1 - seq.num_committed)) if seq.scores else 0

    @property
    def pooled(self) -> range:
        """The positions within the prompt, of those it computes, whose final hidden states are wanted."""
        seq = self.sequence
        first = seq.num_prompt - 1 if seq.pooling == "last" else 0
        end = min(seq.num_committed + self.num_tokens, seq.num_prompt) if seq.pooling else 0
        return range(max(first, seq.num_committed), end)

    @property
    def draws(self) -> bool:
        """Whether a token is drawn at the end of it."""
        return self.sequence.num_committed + self.num_sure == self.sequence.num_known


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: never empty, and never more tokens than the budget."""

    works: tuple[Work, ...]
    copies: tuple[PageCopy, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return sum(work.num_tokens for work in self.works)
