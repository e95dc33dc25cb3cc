"""Numbers for people: sizes, and tables of receipts."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from quire.outputs import RequestOutput


def size(num_bytes: float) -> str:
    """Bytes as 1.5 MiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while num_bytes >= 1024 and len(units) > 1:
        num_bytes /= 1024
        units.pop(0)
    return f"{num_bytes:.{0 if units[0] == 'B' or num_bytes >= 99.95 else 1}f} {units[0]}"


def first_token_s(output: RequestOutput) -> float:
    """Seconds from submission to the first token."""
    return output.receipt.queued_s + output.receipt.prefill_s


def num_new_tokens(output: RequestOutput) -> int:
    """Over all its sequences."""
    return sum(len(completion.token_ids) for completion in output.outputs)


def table(*headers: str) -> Table:
    """An empty table in the house's style: the first column to the left, numbers to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1))
    for i, header in enumerate(headers):
        made.add_column(header, justify="right" if i else "left", no_wrap=True)
    return made


def receipts(outputs: Sequence[RequestOutput], labels: Sequence[str]) -> Table:
    """One line a request: what it took from the cache, what it computed, how fast it was, how much it held."""
    made = table("request", "prompt\ntokens", "from\ncache", "computed", "new\ntokens", "first\ntoken", "tokens\nper s", "peak\ncache")
    for output, label in zip(outputs, labels, strict=True):
        receipt, new = output.receipt, num_new_tokens(output)
        after_first = new - len(output.outputs)
        made.add_row(
            label,
            str(receipt.prompt_tokens),
            f"[bold green]{receipt.cached_tokens}[/]" if receipt.cached_tokens else "0",
            str(receipt.computed_tokens),
            str(new),
            f"{first_token_s(output) * 1000:.0f} ms",
            f"{after_first / receipt.decode_s:.0f}" if after_first > 0 and receipt.decode_s > 0 else "-",
            size(receipt.peak_cache_bytes),
        )
    return made


def totals(outputs: Sequence[RequestOutput], elapsed_s: float) -> str:
    """One line of sums."""
    new = sum(map(num_new_tokens, outputs))
    prompt = sum(output.receipt.prompt_tokens for output in outputs)
    cached = sum(output.receipt.cached_tokens for output in outputs)
    counted = f"{len(outputs)} request{'s' if len(outputs) != 1 else ''}, {new} new tokens in {elapsed_s:.2f} s"
    return f"{counted} ({new / max(elapsed_s, 1e-9):.0f}/s), {cached} of {prompt} prompt tokens cached"
