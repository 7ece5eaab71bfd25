"""Whether an output ended in a repetition loop: by phrases, and by compression."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from typing import Literal

__all__ = ["REPETITIVE", "TAIL", "Ending", "ending", "is_repetitive", "zip_ratio"]

#: How an output ended, in the order in which it is looked for.
Ending = Literal["garbage", "phrase loop", "truncated", "fine"]

PHRASE = re.compile(r"(.{10,40})\1{4,}")

SHORT = 100  #: characters: in a shorter answer, such as ``22222``, one of them may well fill more than half

TAIL = 1000  #: characters at the end that :func:`zip_ratio` compresses
#: A ratio above this is a loop. Solutions of GSM8K reach 2.7, those of MATH-500 4.6; a phrase of 100 characters,
#: repeated without end, gives 9, and one of 250 gives 5.
REPETITIVE = 5.0


def ending(output: str, *, thinks: bool = False) -> Ending:
    r"""Return how an output ended, by the detector that VaSE's authors used.

    ``"garbage"``: more than 30 of the last 100 characters are not ASCII, or one character fills more than
    half of the last 200. ``"phrase loop"``: within the last 500 characters a phrase of 10 to 40
    characters, all on one line, stands five times in a row or more. ``"truncated"``: a model that
    thinks has not closed its thoughts. Else ``"fine"``.

    Args:
        output: what the model wrote.
        thinks: the model writes ``</think>`` before it answers; others are never ``"truncated"``.

    Source: https://arxiv.org/abs/2606.03928, the authors' code.

    >>> ending("so that " + "we wait and see, " * 5)
    'phrase loop'
    """
    if sum(ord(letter) > 127 for letter in output[-100:]) > 30 or (len(output) >= SHORT and _fills(output[-200:])):
        return "garbage"
    if PHRASE.search(output[-500:]):
        return "phrase loop"
    return "truncated" if thinks and "</think>" not in output else "fine"


def zip_ratio(text: str) -> float:
    """Return how many times smaller zlib makes the last 1000 characters; 0 of an empty text.

    Sees loops that the phrase detector does not: of several lines, of more than 40 characters, and those
    that differ a little from turn to turn. A short text, or the first turns of a loop, stays below.

    >>> zip_ratio("we wait and see, " * 60) > REPETITIVE
    True
    """
    tail = text[-TAIL:].encode()
    return len(tail) / len(zlib.compress(tail, level=9)) if tail else 0.0


def is_repetitive(text: str) -> bool:
    """Return whether the ratio of compression is above :data:`REPETITIVE`."""
    return zip_ratio(text) > REPETITIVE


def _fills(text: str) -> bool:
    """Return whether one character makes up more than half of a text."""
    return bool(text) and max(Counter(text).values()) > len(text) / 2
