"""How much one request may ask for, and why each number is what it is. What breaks one is refused before any work is done for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_BODY_BYTES = 4 * 2**20  # a context of 500,000 token ids written out; to parse and check more would hold up everybody's tokens
MAX_HEADER_BYTES = 16 * 2**10  # of all headers together; browsers with cookies stay below 8 KiB
MAX_KEY_CHARS = 512  # a key is hashed before anything is known about its sender
MAX_JSON_DEPTH = 64  # real schemas stay below 20; what walks a document recurses, and Python's stack is short
MAX_FIELDS = 100  # of a body; there are about 40
MAX_N = 128  # choices of one prompt; OpenAI's number
MAX_PROMPTS = 1024  # of one request: an evaluation harness sends some hundred at once
MAX_CHOICES = 1024  # prompts times n: each is a row in the sampler and a part of the answer in memory
MAX_MESSAGES = 4096  # of a chat; templates walk them, some of them twice
MAX_STOPS = 16  # OpenAI takes 4; each is matched against every character
MAX_STOP_IDS = 64
MAX_BIAS_ENTRIES = 1024  # OpenAI takes 300; each is written into the row of logits at every step
MAX_ALLOWED_IDS = 4096  # a list for a classifier, not a vocabulary
MAX_TOP_LOGPROBS = 20  # OpenAI's number for a chat; what is sent for a token grows with it
MAX_BIAS = 100.0  # OpenAI's range
MAX_TEMPERATURE = 2.0  # OpenAI's range
MAX_LABEL_CHARS = 512  # user, metadata, cache_salt and the like
MAX_TOOLS = 128  # OpenAI's number
MAX_TEMPLATE_S = 2.0  # a chat template renders in milliseconds; one that loops is killed
MAX_TEMPLATE_BYTES = 2**29  # address space of the process that renders; it needs 30 MiB
MAX_THREADED_CHARS = 16 * 2**10  # longer texts are tokenised beside the event loop: these take about 3 ms
MAX_CONNECTIONS = 2048  # each costs a descriptor and some 10 KiB; requests beyond max_sequences wait on theirs
OTHER_DESCRIPTORS = 256  # of the process: weights, the disk tier, logs
REQUEST_S = 30  # from a request's first byte to its last: 4 MiB at 140 KB/s; whoever sends slower holds a connection
UNREAD_S = 60  # what was sent and is not taken; a reader who is merely slow takes something in that time
KEEP_ALIVE_S = 30  # an idle connection costs a descriptor; clients' pools keep theirs for 5 s
RETRY_AFTER_S = 1  # in Retry-After: a queue that is full has moved on by then

NESTED = (dict, list)


def check_shape(value: Any) -> Any:
    """`value` itself, a parsed JSON document.

    Raises:
        ValueError: it is nested deeper than MAX_JSON_DEPTH, or has more fields than any body has.
    """
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"must have at most {MAX_FIELDS} fields")
    level: list[Any] = [value] if type(value) in NESTED else []
    for _ in range(MAX_JSON_DEPTH):
        # One plain loop: there may be a million entries, and nobody gets a token meanwhile.
        level = [inner for outer in level for inner in (outer.values() if type(outer) is dict else outer) if type(inner) in NESTED]
        if not level:
            return value
    raise ValueError(f"must be nested at most {MAX_JSON_DEPTH} deep")


def check_size(most: int) -> Callable[[Any], Any]:
    """A check that something has at most so many entries, made before any of them is looked at: of each one a complaint could be made."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > most:
            raise ValueError(f"must have at most {most} entries")
        return value

    return check
