from __future__ import annotations

import pytest
from text_tokenizers import MAKERS

from quire.text.tokenizer import TextTokenizer


@pytest.fixture(scope="session")
def made() -> dict[str, TextTokenizer]:
    """Family name -> tokenizer."""
    return {name: TextTokenizer(make()) for name, make in MAKERS.items()}
