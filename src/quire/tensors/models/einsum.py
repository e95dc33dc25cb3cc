"""Einstein sums of two operands, taken apart into one batched matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

_SPARE = "\u03b1\u03b2\u03b3\u03b4\u03b5\u03b6\u03b7\u03b8"  # what an ellipsis stands for


@dataclass(frozen=True, slots=True)
class Contraction:
    """`left,right->out` in labels of one letter: what is batch, what only the left has (rows), what is added over, what only the right has."""

    left: str
    right: str
    out: str
    parts: tuple[str, str, str, str]

    @property
    def left_order(self) -> list[int]:
        """Axes of the left operand as batch, rows, shared."""
        batch, rows, shared, _ = self.parts
        return [self.left.index(label) for label in batch + rows + shared]

    @property
    def right_order(self) -> list[int]:
        """Axes of the right operand as batch, shared, columns."""
        batch, _, shared, columns = self.parts
        return [self.right.index(label) for label in batch + shared + columns]

    @property
    def out_order(self) -> list[int]:
        """Axes of batch, rows, columns as the result has them."""
        batch, rows, _, columns = self.parts
        return [(batch + rows + columns).index(label) for label in self.out]

    def swapped(self) -> Contraction:
        """The same sum with its operands the other way round."""
        batch, rows, shared, columns = self.parts
        return Contraction(self.right, self.left, self.out, (batch, columns, shared, rows))


@lru_cache(256)
def contraction(spec: str, num_left: int, num_right: int) -> Contraction | None:
    """The sum `spec` of operands of so many dimensions, or None where it is more than a product: a diagonal, a sum over one operand alone, an
    ellipsis in both, a result that is not named."""
    inputs, arrow, out = spec.replace(" ", "").partition("->")
    left, comma, right = inputs.partition(",")
    if not arrow or not comma or "," in right or ("..." in left and "..." in right):
        return None
    if "..." in left or "..." in right:
        given, dims = (left, num_left) if "..." in left else (right, num_right)
        spare = dims - len(given) + 3
        if not 0 <= spare <= len(_SPARE) or out.count("...") != 1:
            return None
        left, right, out = (labels.replace("...", _SPARE[:spare]) for labels in (left, right, out))
    if any(len(set(labels)) != len(labels) for labels in (left, right, out)) or (len(left), len(right)) != (num_left, num_right):
        return None
    shared = "".join(label for label in left if label in right and label not in out)
    batch = "".join(label for label in left if label in right and label in out)
    rows, columns = ("".join(label for label in labels if label not in shared + batch) for labels in (left, right))
    if not shared or set(out) != set(batch + rows + columns):
        return None
    return Contraction(left, right, out, (batch, rows, shared, columns))
