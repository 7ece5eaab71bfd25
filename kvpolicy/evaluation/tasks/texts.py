"""Texts that are read, not answered: what a policy costs in KL from the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from kvpolicy.evaluation import data as files
from kvpolicy.evaluation.errors import DataError, EvaluationError
from kvpolicy.evaluation.problem import Problem, Task, Text
from kvpolicy.evaluation.tasks.named import Named
from kvpolicy.evaluation.tasks.sets import gsm8k, worked_examples

__all__ = ["CHARACTERS_A_TOKEN", "TextSet", "file", "own", "pieces", "pydoc", "shakespeare", "wikitext", "worked"]

#: Above what any usual tokeniser reaches on prose, so that a piece is longer than asked for; who tokenises cuts.
CHARACTERS_A_TOKEN = 6


class TextSet(Named):
    """Cut a long text into consecutive pieces that do not overlap.

    Attributes:
        length: tokens that are read of each piece; a piece holds 6 characters a token.
        count: pieces, at most; a shorter text gives fewer.
    """

    length: int
    count: int

    def __post_init__(self) -> None:
        self.at_least(length=1, count=1)

    def units(self, data: Path | None) -> Sequence[str]:
        """Return the text in parts that are not cut apart."""
        raise NotImplementedError

    def problems(self, data: Path | None) -> Sequence[Text]:
        """Return the texts.

        Raises:
            DataError: the file is not there, or is shorter than one piece.
        """
        found = pieces(self.units(data), self.length * CHARACTERS_A_TOKEN, self.count)
        if not found:
            raise DataError(
                f"{self!r} needs {self.length * CHARACTERS_A_TOKEN} characters for one text, and the file has fewer; "
                "write a smaller length"
            )
        return [Text(f"{type(self).__name__}/{index}", text, self.length) for index, text in enumerate(found)]


class _Lines(TextSet):
    """Read the lines of one file of a data set, which ``source`` names."""

    source: ClassVar[tuple[str, str]]

    def units(self, data: Path | None) -> Sequence[str]:
        """Return the lines."""
        name, file = self.source
        return files.text(files.find(name, (file,), data)).splitlines(keepends=True)


@dataclass(frozen=True, repr=False)
class wikitext(_Lines):
    """Read the test set of WikiText-2, from ``wikitext2/test.txt``.

    Args:
        length: tokens of each text.
        count: texts.

    Source: https://arxiv.org/abs/1609.07843
    """

    length: int = 1024
    count: int = 32
    source: ClassVar[tuple[str, str]] = ("wikitext2", "test.txt")


@dataclass(frozen=True, repr=False)
class shakespeare(_Lines):
    """Read Karpathy's tiny Shakespeare, from ``tinyshakespeare/input.txt``.

    Args:
        length: tokens of each text.
        count: texts.
    """

    length: int = 1024
    count: int = 32
    source: ClassVar[tuple[str, str]] = ("tinyshakespeare", "input.txt")


@dataclass(frozen=True, repr=False)
class worked(TextSet):
    """Read the worked examples of GSM8K's training set, one after the other.

    Args:
        length: tokens of each text.
        count: texts.
    """

    length: int = 1024
    count: int = 32

    def units(self, data: Path | None) -> Sequence[str]:
        """Return the examples."""
        return [f"{example}\n\n" for example in worked_examples(data)]


@dataclass(frozen=True, repr=False)
class pydoc(TextSet):
    """Read what Python's ``help()`` says of the language: a text that is there wherever Python is.

    Args:
        length: tokens of each text.
        count: texts.
    """

    length: int = 1024
    count: int = 32

    def units(self, data: Path | None) -> Sequence[str]:
        """Return the lines."""
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics)).splitlines(keepends=True)


@dataclass(frozen=True, repr=False)
class own(Named):
    """Read what the model itself answers with the full cache, each answer behind its problem.

    Args:
        task: whose problems; those are answered first, and their answers kept like any others.
    """

    task: Task = field(default_factory=gsm8k)

    def __post_init__(self) -> None:
        if isinstance(self.task, TextSet | own):
            raise EvaluationError(f"own: task={self.task!r} is read, not answered; write, say, own(gsm8k)")

    def problems(self, data: Path | None) -> Sequence[Problem]:
        """Return the problems."""
        found = self.task.problems(data)
        return [one for one in found if isinstance(one, Problem)]


@dataclass(frozen=True, repr=False)
class file(TextSet):
    """Read a file of UTF-8 text.

    Args:
        path: of the file.
        length: tokens of each text.
        count: texts.
    """

    path: str
    length: int = 1024
    count: int = 32

    def units(self, data: Path | None) -> Sequence[str]:
        """Return the lines."""
        return files.text(Path(self.path)).splitlines(keepends=True)


def pieces(units: Sequence[str], characters: int, count: int) -> list[str]:
    """Return consecutive pieces of at least so many characters, each made of whole units.

    >>> pieces(["ab", "cd", "e", "fg", "h"], 3, 9)
    ['abcd', 'efg']
    """
    made: list[str] = []
    piece: list[str] = []
    size = 0
    for unit in units:
        if len(made) == count:
            break
        piece.append(unit)
        size += len(unit)
        if size >= characters:
            made.append("".join(piece))
            piece, size = [], 0
    return made
