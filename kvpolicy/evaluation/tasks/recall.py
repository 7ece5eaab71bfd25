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

__all__ = ["needles", "passcode", "turns"]

FACT = "The passcode of {name} is {code}."
QUESTION = 40  # tokens of fact and question, at most
MOST_NAMES = len(haystack.FIRST) * len(haystack.LAST)
REPLIES = ("That sounds like a busy day.", "How interesting.", "I see. Tell me more.", "What a lovely scene.")


@dataclass(frozen=True, repr=False)
class passcode(Named):
    """Ask for a fact that stood once in what the model is made to have written.

    The prompt holds an instruction alone. The text with the fact counts as decoded, so that evictions
    fall on it, and ends in the question and the first words of the answer; the model goes on with the
    digits.

    Args:
        length: of the decoded text in tokens, the question among them.
        depth: where the fact stands, from 0 (first) to 1 (last); None spreads the problems evenly.
        digits: of the passcode.
        count: problems.
    """

    length: int = 1024
    depth: float | None = None
    digits: int = 5
    count: int = 24

    def __post_init__(self) -> None:
        self.at_least(length=2 * QUESTION, digits=1, count=1)
        if self.depth is not None and (isinstance(self.depth, str) or not 0 <= self.depth <= 1):
            raise EvaluationError(f"passcode: depth={self.depth!r}, but it lies between 0 and 1, or is None")

    def problems(self, data: Path | None) -> Sequence[Problem]:
        """Return ``count`` problems; the same text stands around the fact at every depth."""
        return [self._problem(index) for index in range(self.count)]

    def _problem(self, index: int) -> Problem:
        random = Random(f"passcode {self.length} {self.digits} {index}")
        (name,) = haystack.names(random, 1)
        code = haystack.passcode(random, self.digits)
        depth = (_order(self.count)[index] + 0.5) / self.count if self.depth is None else self.depth
        # Tokenisers differ, and all problems get one length: what is too much is cut from the front.
        before = haystack.sentences(random, self.length // 2 + 64)
        hay = haystack.sentences(random, max(1, (self.length - QUESTION) * 5 // 6))
        story = " ".join([*before, *haystack.hide(hay, [(depth, FACT.format(name=name, code=code))])])
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
            behind_tokens=self.length,
            behind=f"{story}\n\nQuestion: What is the passcode of {name}?\nAnswer: The passcode of {name} is",
        )


@dataclass(frozen=True, repr=False)
class needles(Named):
    """Ask for some of several facts that stand in a long prompt: RULER's multi-key and multi-query needles.

    Args:
        length: of the prompt in tokens, roughly: 1.15 a word are assumed.
        keys: facts in the prompt.
        queries: of them that are asked for, each a part of the answer.
        digits: of each passcode.
        count: problems.
    """

    length: int = 1024
    keys: int = 4
    queries: int = 1
    digits: int = 5
    count: int = 24

    def __post_init__(self) -> None:
        self.at_least(length=1, keys=1, queries=1, digits=1, count=1)
        if not self.queries <= self.keys <= MOST_NAMES:
            raise EvaluationError(
                f"needles: queries={self.queries} and keys={self.keys}, but queries <= keys <= {MOST_NAMES}"
            )

    def problems(self, data: Path | None) -> Sequence[Problem]:
        """Return ``count`` problems."""
        return [self._problem(index) for index in range(self.count)]

    def _problem(self, index: int) -> Problem:
        random = Random(f"needles {self.length} {self.keys} {self.digits} {index}")
        codes = _codes(random, self.keys, self.digits)
        hay = haystack.sentences(random, self.length)
        story = " ".join(haystack.hide(hay, [(random.random(), _fact(name, codes)) for name in codes]))
        asked = random.sample(list(codes), self.queries)
        return Problem(
            id=f"needles/{index}",
            messages=(
                Message("user", f"Read this text; a question about it follows.\n\n{story}\n\n{_question(asked)}"),
            ),
            answers=tuple(codes[name] for name in asked),
            max_new_tokens=_cap(self.queries, self.digits),
            grader="contains",
        )


@dataclass(frozen=True, repr=False)
class turns(Named):
    """State facts in the first turns of a conversation, talk of other things, and ask in the last turn.

    The conversation is fed a turn at a time through one cache.

    Args:
        rounds: messages of the user, the question among them.
        length: of the talk between facts and question in tokens, roughly: 1.15 a word are assumed.
        facts: stated in as many turns; all are asked for, each a part of the answer.
        digits: of each passcode.
        count: problems.
    """

    rounds: int = 8
    length: int = 1024
    facts: int = 2
    digits: int = 5
    count: int = 24

    def __post_init__(self) -> None:
        self.at_least(rounds=2, length=1, facts=1, digits=1, count=1)
        if not self.facts < self.rounds or self.facts > MOST_NAMES:
            raise EvaluationError(
                f"turns: facts={self.facts} and rounds={self.rounds}, but one round is for the question: "
                f"facts < rounds, and at most {MOST_NAMES}"
            )

    def problems(self, data: Path | None) -> Sequence[Problem]:
        """Return ``count`` problems."""
        return [self._problem(index) for index in range(self.count)]

    def _problem(self, index: int) -> Problem:
        random = Random(f"turns {self.rounds} {self.length} {self.facts} {self.digits} {index}")
        codes = _codes(random, self.facts, self.digits)
        said = [(f"Please remember this. {_fact(name, codes)}", "I will remember it.") for name in codes]
        talk = self.rounds - self.facts - 1
        for _ in range(talk):
            story = " ".join(haystack.sentences(random, max(1, self.length // talk)))
            said.append((f"Let me tell you something else. {story}", random.choice(REPLIES)))
        messages = [message for user, reply in said for message in (Message("user", user), Message("assistant", reply))]
        return Problem(
            id=f"turns/{index}",
            messages=(*messages, Message("user", _question(list(codes)))),
            answers=tuple(codes.values()),
            max_new_tokens=_cap(self.facts, self.digits),
            grader="contains",
            turns=True,
        )


def _order(count: int) -> list[int]:
    """Return the numbers below ``count`` so that the first few are spread evenly, too.

    >>> _order(5)
    [0, 3, 1, 4, 2]
    """
    places = [index * 0.6180339887498949 % 1 for index in range(count)]  # the golden ratio
    ranks = {place: rank for rank, place in enumerate(sorted(places))}
    return [ranks[place] for place in places]


def _codes(random: Random, count: int, digits: int) -> dict[str, str]:
    """Return passcodes by name, in the order in which they are stated."""
    return {name: haystack.passcode(random, digits) for name in haystack.names(random, count)}


def _fact(name: str, codes: dict[str, str]) -> str:
    return FACT.format(name=name, code=codes[name])


def _question(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"What is the passcode of {names[0]}? Answer with the number."
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"What are the passcodes of {listed}? Answer with the numbers, in this order."


def _cap(answers: int, digits: int) -> int:
    return 32 + answers * (digits + 32)  # each in a sentence of its own, a digit a token
