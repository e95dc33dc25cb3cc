"""What reads the benches' options: a value with which nothing could be measured, or kept, is refused by its option, before an hour of measuring."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def whole(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 1 or more")
    return int(text)


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return number


def folder(text: str) -> Path:
    """A folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a folder that is there")
    return Path(text)


def new_file(text: str) -> Path:
    """A file in a folder that is there."""
    if Path(text).is_dir() or not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a file in a folder that is there")
    return Path(text)
