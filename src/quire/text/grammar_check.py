"""The program of the process in which a stranger's grammar is tried before it may come near the engine. Run by `grammar_process.py`.

llguidance bounds most of what a grammar may cost, not all: some crash it by their depth, some compile for ever. Here that ends one small process.
Reads lines of JSON: first the tokenizer's size and special tokens, then one grammar a line; answers each with a line, an error or nothing.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from typing import Any

import llguidance

STACK_BYTES = 2**20  # an eighth of what a thread usually has: what passes here has room to spare in the engine's process
MEMORY_BYTES = 2**31


class ByteTokens:
    """A vocabulary of the 256 bytes and the model's special tokens: it tells as much of a grammar as the whole one, and is made in no time.

    Its other ids, up to `size`, are of no token: a grammar may name any id that the model has.
    """

    eos_token_id = bos_token_id = 256

    def __init__(self, special: list[str], size: int) -> None:
        self.tokens = [bytes([i]) for i in range(256)] + [b"<end of sequence>", *(name.encode() for name in special)]
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.tokens += [b""] * (size - len(self.tokens))

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def check(tokenizer: Any, kind: str, source: str) -> str:
    """Compile a grammar and take the first mask from it. Returns what is wrong with it, "" if nothing is."""
    matcher = matcher_of(tokenizer, kind, source)
    if not matcher.is_error():
        matcher.compute_bitmask()  # some errors show only here
    error = str(matcher.get_error())
    return "no text matches it" if error.startswith("NoExtension") else error


def matcher_of(tokenizer: Any, kind: str, source: str) -> Any:
    """A matcher at the beginning of a grammar given as in `StructuredOutput.source`; an error is in the matcher."""
    matcher = llguidance.LLMatcher
    if kind == "json":
        text = matcher.grammar_from_json_schema(source)
    else:
        text = matcher.grammar_from_regex(source) if kind == "regex" else matcher.grammar_from_lark(source)
    return llguidance.LLMatcher(tokenizer, text, log_level=0, limits=llguidance.LLParserLimits(verbose_errors=False))


def main() -> None:
    """Answer until the input ends."""
    first = json.loads(sys.stdin.readline())
    tokens = ByteTokens(first["special"], first["size"])
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens), n_vocab=len(tokens.tokens), eos_token=256)
    limit(first["seconds"])
    threading.stack_size(STACK_BYTES)
    for line in sys.stdin:
        answer: list[str] = []

        def run(line: str = line, answer: list[str] = answer) -> None:
            asked = json.loads(line)
            try:
                answer.append(check(tokenizer, asked["kind"], asked["source"]))
            except Exception as error:
                answer.append(f"{type(error).__name__}: {error}")

        limit(first["seconds"])
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        print(json.dumps({"error": answer[0] if answer else "it cannot be compiled"}), flush=True)


def limit(seconds: float) -> None:
    """Bound memory, and the processor time of what comes next: the system ends this process when it has taken it, though the parent had died."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # where the system has no such limits the parent's patience remains
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 1, hard))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


if __name__ == "__main__":
    main()
