"""Questions with one mathematical answer: GSM8K, MATH-500, AIME and SVAMP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from kvpolicy.evaluation import data as files
from kvpolicy.evaluation.errors import DataError, EvaluationError
from kvpolicy.evaluation.problem import Message, Problem
from kvpolicy.evaluation.tasks.named import Named

__all__ = [
    "INSTRUCTION",
    "Question",
    "QuestionSet",
    "Split",
    "aime24",
    "aime25",
    "gsm8k",
    "math500",
    "svamp",
    "worked_example",
    "worked_examples",
]

#: All lines of a file, or every other one: the first half of an experiment chooses, the second one tests.
Split = Literal["all", "even", "odd"]

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Question:
    """Hold one question without any instruction, and its answer."""

    id: str
    text: str
    answer: str


class QuestionSet(Named):
    """Read questions from a file of JSON lines, and ask each in a prompt of its own.

    Attributes:
        columns: what every line holds.
        cap: tokens that do not cut a right answer short.
        split: which lines, counted from 0.
    """

    columns: ClassVar[tuple[str, ...]]
    cap: ClassVar[int]
    split: Split

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise EvaluationError(f"{type(self).__name__}: split={self.split!r}, but it is 'all', 'even' or 'odd'")

    def question(self, row: dict[str, Any]) -> tuple[str, str]:
        """Return the question and the answer of one line."""
        raise NotImplementedError

    def questions(self, data: Path | None) -> list[Question]:
        """Return the questions of the split; an id is the same in every split.

        Raises:
            DataError: the file is not there, or is not of this data set.
        """
        name = type(self).__name__
        path = files.find(name, ("test.jsonl",), data)
        start, step = {"all": (0, 1), "even": (0, 2), "odd": (1, 2)}[self.split]
        rows = list(enumerate(_rows(path, self.columns)))[start::step]
        return [Question(f"{name}/{number}", *self.question(row)) for number, row in rows]

    def before(self, data: Path | None) -> str:
        """Return what stands in the prompt before each question."""
        return ""

    def problems(self, data: Path | None) -> Sequence[Problem]:
        """Return one problem for each question.

        Raises:
            DataError: a file is not there, or is not of this data set.
        """
        before = self.before(data)
        return [
            Problem(
                id=question.id,
                messages=(Message("user", f"{before}{question.text}\n\n{INSTRUCTION}"),),
                answers=(question.answer,),
                max_new_tokens=self.cap,
            )
            for question in self.questions(data)
        ]


class WithExamples(QuestionSet):
    """Ask each question behind worked examples: the first ones of GSM8K's training set.

    Attributes:
        shots: how many.
    """

    shots: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(shots=0)

    def before(self, data: Path | None) -> str:
        """Return the worked examples, or nothing where none are asked for."""
        if not self.shots:
            return ""
        examples = worked_examples(data)
        if len(examples) < self.shots:
            raise DataError(f"{self!r} needs {self.shots} lines of gsm8k/train.jsonl, which has {len(examples)}")
        return "".join(f"{example}\n\n" for example in examples[: self.shots]) + "Question: "


@dataclass(frozen=True, repr=False)
class gsm8k(WithExamples):
    """Ask the questions of GSM8K's test set.

    Args:
        shots: worked examples before each question: the first ones of the training set.
        split: ``"all"``, ``"even"`` or ``"odd"`` lines.

    Source: https://arxiv.org/abs/2110.14168
    """

    shots: int = 0
    split: Split = "all"
    columns: ClassVar[tuple[str, ...]] = ("question", "answer")
    cap: ClassVar[int] = 512

    def question(self, row: dict[str, Any]) -> tuple[str, str]:
        """Return the question and the number after ``####``."""
        return str(row["question"]).strip(), _final(str(row["answer"]))


@dataclass(frozen=True, repr=False)
class svamp(WithExamples):
    """Ask the elementary questions of SVAMP.

    Args:
        shots: worked examples before each question: the first ones of GSM8K's training set.
        split: ``"all"``, ``"even"`` or ``"odd"`` lines.

    Source: https://arxiv.org/abs/2103.07191
    """

    shots: int = 0
    split: Split = "all"
    columns: ClassVar[tuple[str, ...]] = ("Body", "Question", "Answer")
    cap: ClassVar[int] = 400

    def question(self, row: dict[str, Any]) -> tuple[str, str]:
        """Return body and question as one text, and the answer, without ``.0`` where it is whole."""
        body, answer = str(row["Body"]).strip(), str(row["Answer"])
        stop = "" if body.endswith((".", "!", "?", ",")) else "."
        return f"{body}{stop} {str(row['Question']).strip()}", answer.removesuffix(".0")


class _Problems(QuestionSet):
    """Read lines with ``problem`` and ``answer``."""

    def question(self, row: dict[str, Any]) -> tuple[str, str]:
        return str(row["problem"]).strip(), str(row["answer"]).strip()


@dataclass(frozen=True, repr=False)
class math500(_Problems):
    """Ask the 500 problems that were drawn from MATH.

    Args:
        split: ``"all"``, ``"even"`` or ``"odd"`` lines.

    Source: https://arxiv.org/abs/2305.20050
    """

    split: Split = "all"
    columns: ClassVar[tuple[str, ...]] = ("problem", "answer", "unique_id")
    cap: ClassVar[int] = 1024


@dataclass(frozen=True, repr=False)
class aime24(_Problems):
    """Ask the 30 problems of the AIME of 2024.

    Args:
        split: ``"all"``, ``"even"`` or ``"odd"`` lines.
    """

    split: Split = "all"
    columns: ClassVar[tuple[str, ...]] = ("problem", "answer", "id")
    cap: ClassVar[int] = 32768


@dataclass(frozen=True, repr=False)
class aime25(_Problems):
    """Ask the 30 problems of the AIME of 2025.

    Args:
        split: ``"all"``, ``"even"`` or ``"odd"`` lines.
    """

    split: Split = "all"
    columns: ClassVar[tuple[str, ...]] = ("problem", "answer", "id")
    cap: ClassVar[int] = 32768


def worked_example(row: dict[str, Any]) -> str:
    r"""Return a line of GSM8K's training set as text that ends in a box.

    >>> print(worked_example({"question": "Six and one?", "answer": "6+1 = <<6+1=7>>7.\n#### 7"}))
    Question: Six and one?
    Answer: 6+1 = 7.
    The answer is \boxed{7}.
    """
    steps = re.sub(r"<<.*?>>", "", str(row["answer"])).partition("####")[0].strip()
    return (
        f"Question: {str(row['question']).strip()}\nAnswer: {steps}\nThe answer is \\boxed{{{_final(row['answer'])}}}."
    )


def worked_examples(data: Path | None) -> list[str]:
    """Return all of GSM8K's training set, as :func:`worked_example` writes it.

    Raises:
        DataError: the file is not there, or is not of GSM8K.
    """
    path = files.find("gsm8k", ("train.jsonl",), data)
    return [worked_example(row) for row in _rows(path, gsm8k.columns)]


def _final(answer: str) -> str:
    """Return the number after ``####``, without separators of thousands."""
    return answer.rpartition("####")[2].strip().replace(",", "")


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = list(files.lines(path))
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if column not in row]
        if missing:
            raise DataError(
                f"{path}, row {number}: no {', '.join(missing)}, found {', '.join(row) or 'nothing'}; "
                "this is the file of another data set"
            )
    if not rows:
        raise DataError(f"{path} is empty; fetch it again")
    return rows
