"""Set a run under a policy beside the same run with the full cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text
from transformers import DynamicCache

from kvpolicy.cli.running import Run, run
from kvpolicy.generation import Sampling, held_bytes
from kvpolicy.loading import Loaded

__all__ = ["Measured", "parting", "run_full", "table"]

SHOWN_BEFORE, SHOWN_AFTER = 12, 12  # tokens around the parting point


@dataclass(frozen=True)
class Measured:
    """Hold a run and the bytes that its cache held at the end."""

    run: Run
    nbytes: int


def run_full(loaded: Loaded, inputs: dict[str, Any], sampling: Sampling) -> Measured:
    """Return the run with the cache that transformers itself would use."""
    cache = DynamicCache(config=loaded.model.config.get_text_config(decoder=True))
    return Measured(run(loaded, inputs, cache, sampling), held_bytes(cache))


def parting(left: tuple[int, ...], right: tuple[int, ...]) -> int | None:
    """Return the index of the first token in which two runs differ, or None where they are equal.

    >>> parting((1, 2, 3), (1, 2, 4))
    2
    """
    if left == right:
        return None
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def table(tokenizer: Any, policy: Measured, full: Measured) -> Table:
    """Return the two runs side by side."""
    rows = Table(title="the same run, twice", title_justify="left", title_style="bold")
    rows.add_column("")
    rows.add_column("kvpolicy", overflow="fold")
    rows.add_column("full cache", overflow="fold")
    both = (policy, full)
    rows.add_row("KV memory, bytes", *(f"{one.nbytes:,}" for one in both))
    rows.add_row("of the full cache", *(_percent(one.nbytes, full.nbytes) for one in both))
    rows.add_row("tokens generated", *(f"{len(one.run.tokens):,}" for one in both))
    rows.add_row("decode, tokens/s", *(_rate(one.run) for one in both))
    rows.add_row("first token, s", *(f"{one.run.prefill:.2f}" for one in both))
    whole = policy.run.whole
    if whole < len(policy.run.tokens):
        rows.add_row("first eviction", f"after token {whole:,}", "never")
    at = parting(policy.run.tokens, full.run.tokens)
    if at is None:
        rows.add_row("texts", "identical", "identical")
        return rows
    why = "by rounding alone" if at < whole else ""
    rows.add_row("texts part", f"at token {at + 1:,}", why)
    rows.add_row("there", *(_excerpt(tokenizer, one.run.tokens, at) for one in both))
    return rows


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _rate(run: Run) -> str:
    return "–" if run.rate is None else f"{run.rate:.1f}"


def _excerpt(tokenizer: Any, tokens: tuple[int, ...], at: int) -> Text:
    """Return the text around a token, with a bar where the texts part."""
    first = max(0, at - SHOWN_BEFORE)
    common = _decode(tokenizer, tokens[first:at])
    apart = _decode(tokenizer, tokens[at : at + SHOWN_AFTER]) or "(ends)"
    before = ("…" if first else "") + common
    after = apart + ("…" if len(tokens) > at + SHOWN_AFTER else "")
    return Text.assemble(before, ("┃", "dim"), (after, "bold"))


def _decode(tokenizer: Any, tokens: tuple[int, ...]) -> str:
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text.replace("\n", "⏎")
