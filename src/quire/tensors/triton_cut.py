"""Whether the sums of a call are cut among more programs than it has blocks of results: few rows would leave most of a device idle.

Each sum goes over parts, from scratch, and over what they gave in ascending order: in one program, or in as many as there are parts and, through
memory, a second kernel. The arithmetic is the same, so which of the two it was shows in no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

BUSY: Final = 128  # programs, about one for each multiprocessor of a large device
ALWAYS: Final = 1 << 30


@dataclass(slots=True)
class Cut:
    """Calls of fewer programs than `least_programs` are cut, with 1 none. It may be set between calls. All of an engine's kernels have one."""

    least_programs: int = 1
