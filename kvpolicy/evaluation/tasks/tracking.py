"""Variables that are followed, and words that are counted, after RULER (https://arxiv.org/abs/2404.06654)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from string import ascii_uppercase

from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.problem import Message, Problem
from kvpolicy.evaluation.tasks import haystack
from kvpolicy.evaluation.tasks.named import Named

__all__ = ["variables", "words"]

TOKENS_AN_ENTRY = 6  #: roughly, of a numbered word: a token a digit, a stop, one or two for the word


@dataclass(frozen=True, repr=False)
class variables(Named):
    """Ask which variables hold a value that was handed from one to the next: RULER's variable tracking.

    Each variable of the asked chain is a part of the answer.

    Args:
        length: of the prompt in tokens, roughly: 1.15 a word are assumed.
        chains: of variables, each with a value of its own; the first one is asked for.
        hops: assignments in a chain after the first.
        count: problems.
    """

    length: int = 1024
    chains: int = 1
    hops: int = 4
    count: int = 24

    def __post_init__(self) -> None:
        self.at_least(length=1, chains=1, hops=0, count=1)
        if self.chains > 1000 or self.hops > 1000:
            raise EvaluationError(f"variables: chains={self.chains} and hops={self.hops}, but each is at most 1000")

    def problems(self, data: Path | None) -> Sequence[Problem]:
        """Return ``count`` problems."""
        return [self._problem(index) for index in range(self.count)]

    def _problem(self, index: int) -> Problem:
        random = Random(f"variables {self.length} {self.chains} {self.hops} {index}")
        names = _variables(random, self.chains * (self.hops + 1))
        chains = [names[at : at + self.hops + 1] for at in range(0, len(names), self.hops + 1)]
        values = random.sample(range(10000, 100000), self.chains)
        facts = [fact for chain, value in zip(chains, values, strict=True) for fact in _chain(random, chain, value)]
        story = " ".join(haystack.hide(haystack.sentences(random, self.length), facts))
        return Problem(
            id=f"variables/{index}",
            messages=(
                Message(
                    "user",
                    "Follow the assignments of variables that are hidden in this text.\n\n"
                    f"{story}\n\nWhich variables hold the value {values[0]}, directly or by way of others? "
                    f"There are {self.hops + 1}. Answer with their names.",
                ),
            ),
            answers=tuple(chains[0]),
            max_new_tokens=64 + 16 * (self.hops + 1),
            grader="contains",
        )


@dataclass(frozen=True, repr=False)
class words(Named):
    """Ask for the words that a long list holds most often: RULER's extraction of common words.

    A common word stands at least ten times as often as any other. Each is a part of the answer. RULER draws
    from a long word list and fixes how often a word stands; here the words are few and stand more often in
    a longer list, and a list is never shorter than ten times each common word and once each other one.

    Args:
        length: of the list in tokens, roughly: 6 an entry are assumed.
        common: words asked for.
        count: problems.
    """

    length: int = 1024
    common: int = 10
    count: int = 24

    def __post_init__(self) -> None:
        self.at_least(length=1, common=1, count=1)
        if self.common > len(VOCABULARY) // 3:
            raise EvaluationError(f"words: common={self.common}, but it is at most {len(VOCABULARY) // 3}")

    def problems(self, data: Path | None) -> Sequence[Problem]:
        """Return ``count`` problems."""
        return [self._problem(index) for index in range(self.count)]

    def _problem(self, index: int) -> Problem:
        random = Random(f"words {self.length} {self.common} {index}")
        shuffled = random.sample(VOCABULARY, len(VOCABULARY))
        common, rare = shuffled[: self.common], shuffled[self.common :]
        entries = self.length // TOKENS_AN_ENTRY
        times = max(1, entries // (10 * self.common + len(rare)))
        often = max(10 * times, (entries - times * len(rare)) // self.common)
        listed = common * often + rare * times
        random.shuffle(listed)
        numbered = " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
        return Problem(
            id=f"words/{index}",
            messages=(
                Message(
                    "user",
                    f"In this numbered list some words stand much more often than the others.\n\n{numbered}\n\n"
                    f"Which {self.common} words stand in it most often? Answer with these words.",
                ),
            ),
            answers=tuple(common),
            max_new_tokens=64 + 8 * self.common,
            grader="contains",
        )


VOCABULARY = [*haystack.NOUNS, *haystack.PEOPLE, *haystack.PLACES]


def _variables(random: Random, count: int) -> list[str]:
    """Return different names of five capitals."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(random.choices(ascii_uppercase, k=5))] = None
    return list(names)


def _chain(random: Random, chain: Sequence[str], value: int) -> list[tuple[float, str]]:
    """Return the assignments of one chain, each at a later depth than the one that it rests on."""
    held = [str(value), *(f"VAR {name}" for name in chain)]
    depths = sorted(random.random() for _ in chain)
    return [(depth, f"VAR {name} = {one}.") for depth, name, one in zip(depths, chain, held[:-1], strict=True)]
