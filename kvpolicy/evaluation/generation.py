"""What an engine answered to one prompt: :class:`Generation`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finish", "Generation"]

#: Why an answer ends: the model ended it, or the cap on new tokens did.
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """Hold one answer, and what its cache held meanwhile.

    Attributes:
        tokens: what was generated; a token that ends the answer is not among them.
        finish: why the answer ends.
        compression: mean over generated tokens of slots used / tokens seen; 1 for the full cache.
        peak_nbytes: keys, values and all else that the cache held of this request, at most.
        evictions: how often the request was cut to its budget.
    """

    tokens: tuple[int, ...]
    finish: Finish
    compression: float
    peak_nbytes: int
    evictions: int
