"""Many problems in one prompt: long outputs from easy questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvpolicy.evaluation.errors import DataError, EvaluationError
from kvpolicy.evaluation.problem import Message, Problem
from kvpolicy.evaluation.tasks.named import Named
from kvpolicy.evaluation.tasks.sets import Question, QuestionSet, svamp

__all__ = ["many"]

INSTRUCTION = (
    "Solve the following {count} problems, one after the other and in this order. Begin each with its number, "
    "reason briefly, and put its answer within \\boxed{{}}, so that your text consists of lines such as\n"
    "Problem 1: <short reasoning> Answer: \\boxed{{<number>}}"
)


@dataclass(frozen=True, repr=False)
class many(Named):
    """Ask many questions in one prompt; each part of the answer is graded by itself.

    Questions that do not fill a last prompt are left out.

    Args:
        task: whose questions: a set such as ``svamp`` or ``gsm8k(split='even')``.
        count: questions in a prompt.
    """

    task: QuestionSet = field(default_factory=svamp)
    count: int = 8

    def __post_init__(self) -> None:
        self.at_least(count=1)
        if not isinstance(self.task, QuestionSet):
            raise EvaluationError(f"many: task={self.task!r} is no set of questions; write, say, many(svamp, 8)")
        if getattr(self.task, "shots", 0):
            raise EvaluationError(f"many: task={self.task!r} has worked examples, for which many has no place")

    def problems(self, data: Path | None) -> Sequence[Problem]:
        """Return one problem for every ``count`` questions.

        Raises:
            DataError: the file is not there, or holds less than ``count`` questions.
        """
        questions = self.task.questions(data)
        whole = len(questions) - len(questions) % self.count
        if not whole:
            raise DataError(f"{self!r} needs {self.count} questions, and {self.task!r} has {len(questions)}")
        return [self._problem(questions[at : at + self.count]) for at in range(0, whole, self.count)]

    def _problem(self, questions: Sequence[Question]) -> Problem:
        numbered = (f"Problem {number}: {question.text}" for number, question in enumerate(questions, start=1))
        return Problem(
            id="+".join(question.id for question in questions),
            messages=(Message("user", "\n\n".join([INSTRUCTION.format(count=self.count), *numbered])),),
            answers=tuple(question.answer for question in questions),
            max_new_tokens=self.count * self.task.cap // 3,  # short reasoning is asked for
        )
