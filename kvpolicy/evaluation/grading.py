"""Which parts of an output are right: :func:`grade`."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.problem import Answers, Problem

__all__ = ["answer_of", "boxes", "grade"]

SECONDS = 5  # for reading or comparing one answer
LONGEST = 400  # characters of an answer that is still compared as mathematics

NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
HEADING = re.compile(r"^[^\w\n]*problem[ \t]*#?(\d+)\b", re.IGNORECASE | re.MULTILINE)
LETTER = re.compile(r"(?<![\w'])([A-J])(?![\w'])")


def grade(problem: Problem, output: str) -> Answers:
    r"""Return which parts of an output are right, one bool for each of the problem's answers.

    ``"math"``: of one answer the last ``\boxed{}``, else the last number, is compared by value. Of
    several, each is looked for under its heading, ``Problem 3``; where there are no headings, in the
    order of the boxes. ``"contains"``: the answer stands as a whole word or number in the text after
    any ``</think>``; where the model went on with a sentence of :attr:`Problem.behind`, in the first
    line alone. ``"choice"``: the last box, or else the last letter from A to J that stands alone, is
    that of the answer.

    Raises:
        EvaluationError: mathematics is compared, and math-verify is not installed.
    """
    if problem.grader == "contains":
        said = _first_line(output) if problem.behind else output.rpartition("</think>")[2]
        return tuple(_contains(said, answer) for answer in problem.answers)
    if problem.grader == "choice":
        return tuple(_choice(output) == _choice(answer) != "" for answer in problem.answers)
    same = _Comparison()
    found = [answer_of(output)] if len(problem.answers) == 1 else _parts(output, len(problem.answers))
    return tuple(same(answer, one) for answer, one in zip(problem.answers, found, strict=True))


def answer_of(output: str) -> str:
    r"""Return the final answer in an output: the last box, else the last number, else nothing.

    >>> answer_of(r"3 + 4 = 7, hence \boxed{\frac{7}{2}}. 1")
    '\\frac{7}{2}'
    >>> answer_of("That makes 1,200 dollars.")
    '1,200'
    """
    boxed = boxes(output)
    if boxed:
        return boxed[-1]
    numbers = NUMBER.findall(output)
    return numbers[-1] if numbers else ""


def boxes(text: str) -> list[str]:
    r"""Return what stands in each closed ``\boxed{}``, in order, without empty ones."""
    found = []
    for match in re.finditer(r"\\f?boxed\s*\{", text):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0) * (text[end - 1] != "\\")
            end += 1
        if not depth and (inside := text[match.end() : end - 1].strip()):
            found.append(inside)
    return found


def _parts(output: str, count: int) -> list[str]:
    """Return one answer for each of several problems; an empty one where there is none."""
    headings = list(HEADING.finditer(output))
    if not headings:
        return [*boxes(output), *[""] * count][:count]
    found: dict[int, str] = {}
    ends = [match.start() for match in headings[1:]] + [len(output)]
    for match, end in zip(headings, ends, strict=True):
        number, chunk = int(match[1]), output[match.end() : end]
        if number not in found or boxes(chunk):  # named again without an answer: a mention
            found[number] = answer_of(chunk)
    return [found.get(number, "") for number in range(1, count + 1)]


def _first_line(output: str) -> str:
    return output.strip().partition("\n")[0]


def _contains(said: str, answer: str) -> bool:
    """Return whether the answer stands there and is not part of a longer word or number."""
    return bool(re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(answer)}(?!\w)(?![.,]\d)", said, re.IGNORECASE))


def _choice(output: str) -> str:
    boxed = boxes(output)
    letters: Sequence[str] = LETTER.findall(boxed[-1] if boxed else output)
    return letters[-1] if letters else ""


class _Comparison:
    """Compare answers by math-verify, whose timeouts are signals: off the main thread there are none."""

    def __init__(self) -> None:
        try:
            import math_verify
        except ImportError as error:
            raise EvaluationError(
                "comparing mathematical answers needs math-verify, which is not installed: pip install 'kvpolicy[eval]'"
            ) from error
        self.library: Any = math_verify
        self.seconds = SECONDS if threading.current_thread() is threading.main_thread() else None

    def __call__(self, gold: str, answer: str) -> bool:
        if not answer or len(answer) > LONGEST:
            return False
        if _plain(gold) == _plain(answer):
            return True
        golds, answers = self.read(gold), self.read(answer)
        return bool(self.library.verify(golds, answers, timeout_seconds=self.seconds))

    def read(self, answer: str) -> Any:
        return self.library.parse(f"\\boxed{{{answer}}}", parsing_timeout=self.seconds)


def _plain(answer: str) -> str:
    return re.sub(r"\s|\\[,;:! ]", "", answer)
