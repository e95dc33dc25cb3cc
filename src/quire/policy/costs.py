"""What reading pages from the tier below and computing tokens cost, as measured, and which of the two is cheaper."""

from __future__ import annotations

SMOOTHING = 0.2
FADING = 0.01  # what nobody measures any more is believed less each time that it decides


class Costs:
    """Seconds of a page read, and of a token computed among so many: one of a long step costs a fraction of one that has the step to itself."""

    def __init__(self, read_s_per_page: float) -> None:
        """`read_s_per_page` is a guess, until it has been measured."""
        self._read_s_per_page = read_s_per_page
        self._compute_s_per_token: dict[int, float] = {}  # by the number of binary digits of a step's tokens

    def note_read(self, num_pages: int, seconds: float) -> None:
        """So many pages were read in so many seconds."""
        self._read_s_per_page += (seconds / num_pages - self._read_s_per_page) * SMOOTHING

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many tokens in so many seconds."""
        size, each = num_tokens.bit_length(), seconds / num_tokens
        known = self._compute_s_per_token.get(size, each)
        self._compute_s_per_token[size] = known + (each - known) * SMOOTHING

    def reading_pays(self, num_pages: int, num_tokens: int) -> bool:
        """Whether to read so many pages rather than compute the tokens in them. Reading is tried where nothing has been computed yet."""
        if not self._compute_s_per_token:
            return True
        size = min(self._compute_s_per_token, key=lambda size: abs(size - num_tokens.bit_length()))
        if num_pages * self._read_s_per_page <= num_tokens * self._compute_s_per_token[size]:
            return True
        self._read_s_per_page *= 1 - FADING  # without it a disk that stalled once would never be read again
        return False
