"""Recall of facts that were stated once, after RULER (https://arxiv.org/abs/2404.06654)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.problem import Message, Problem
from kvpolicy.evaluation.tasks import haystack
from kvpolicy.evaluation.tasks.named import Named

__all__ = ["passcode"]

FACT = "The passcode of {name} is {code}."


@dataclass(frozen=True, repr=False)
class passcode(Named):
    """Ask for a fact that stood once in what the model is made to have written.

    The prompt holds an instruction alone. The text with the fact counts as decoded, so that evictions
    fall on it, and ends in the question and the first words of the answer; the model goes on with the
    digits.

    Args:
        length: of the decoded text in tokens, roughly: 1.3 a word are assumed.
        depth: where the fact stands, from 0 (first) to 1 (last); None spreads the problems evenly.
        digits: of the passcode.
        count: problems.
    """

    length: int = 1024
    depth: float | None = None
    digits: int = 5
    count: int = 24

    def __post_init__(self) -> None:
        self.at_least(length=1, digits=1, count=1)
        if self.depth is not None and (isinstance(self.depth, str) or not 0 <= self.depth <= 1):
            raise EvaluationError(f"passcode: depth={self.depth!r}, but it lies between 0 and 1, or is None")

    def problems(self, data: Path | None) -> Sequence[Problem]:
        """Return ``count`` problems; the same text stands around the fact at every depth."""
        return [self._problem(index) for index in range(self.count)]

    def _problem(self, index: int) -> Problem:
        random = Random(f"passcode {self.length} {self.digits} {index}")
        (name,) = haystack.names(random, 1)
        code = haystack.passcode(random, self.digits)
        depth = (index + 0.5) / self.count if self.depth is None else self.depth
        hay = haystack.sentences(random, self.length)
        story = " ".join(haystack.hide(hay, [(depth, FACT.format(name=name, code=code))]))
        return Problem(
            id=f"passcode/{index}",
            messages=(
                Message(
                    "user",
                    "Write a long text of everyday scenes in plain sentences. Somewhere in it, state the passcode of "
                    "a person. At the end, ask what that passcode was, and answer.",
                ),
            ),
            answers=(code,),
            max_new_tokens=self.digits + 11,  # a digit may be a token of its own
            grader="contains",
            behind=f"{story}\n\nQuestion: What is the passcode of {name}?\nAnswer: The passcode of {name} is",
        )
