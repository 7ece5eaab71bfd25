"""Run a model once over a prompt, with any cache, and time it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from kvpolicy.errors import RunError, one_line
from kvpolicy.generation import Sampling, generated

if TYPE_CHECKING:
    from kvpolicy.loading import Loaded

__all__ = ["Run", "evictions", "run"]


@dataclass(frozen=True)
class Run:
    """Hold what one run wrote, and how long it took.

    Attributes:
        tokens: ids, the end token among them.
        prefill: seconds from the start to the first token.
        decode: seconds from the first token to the last one.
        whole: tokens that were chosen while the cache still held everything.
    """

    tokens: tuple[int, ...]
    prefill: float
    decode: float
    whole: int

    @property
    def rate(self) -> float | None:
        """Return decoded tokens per second; None where no token was decoded after the first."""
        decoded = len(self.tokens) - 1
        return decoded / self.decode if decoded > 0 and self.decode > 0 else None

    def timing(self) -> str:
        """Return one line: tokens, tokens per second, time to the first token."""
        rate = "" if self.rate is None else f", {self.rate:.1f} tokens per second (decode)"
        return f"{len(self.tokens)} tokens{rate}, first token after {self.prefill:.2f} s"


class Meter(TextStreamer):
    """Print the text while it is generated, and note when each token came."""

    def __init__(self, tokenizer: Any, evictions: Callable[[], int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.evictions = evictions
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.whole = 0
        self.evicted = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then token after token."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            if not self.evicted:
                self.whole += 1
            self.evicted = self.evictions() > 0  # the next token sees less
            self.tokens.extend(value.flatten().tolist())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text."""
        sys.stdout.write(text + "\n" if stream_end else text)
        sys.stdout.flush()


def run(loaded: Loaded, inputs: dict[str, Any], cache: Any, sampling: Sampling) -> Run:
    """Generate with a cache, print the text to stdout as it comes, and return what was measured.

    Modifies the cache, and torch's global random state.

    Raises:
        RunError: the device has not enough memory.
    """
    meter = Meter(loaded.tokenizer, lambda: evictions(cache))
    start = time.perf_counter()
    try:
        generated(loaded.model, inputs, cache, sampling, streamer=meter)
    except torch.OutOfMemoryError as error:
        why = one_line(error, 200)
        raise RunError(f"{loaded.model.device} has not enough memory for this run: {why}") from error
    times = meter.times or [start]
    return Run(tuple(meter.tokens), times[0] - start, times[-1] - times[0], meter.whole)


def evictions(cache: Any) -> int:
    """Return how often a cache of one request has evicted; 0 for caches that never do.

    Asked after every token, so that it reads less than a receipt.
    """
    return max(getattr(cache, "evictions", ()), default=0)
