"""Which parts of an output are right: :func:`grade`."""

from __future__ import annotations

import importlib.util
import re

from kvpolicy.evaluation.comparing import same_value
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.problem import Answers, Problem

__all__ = ["answer_of", "boxes", "grade"]

LONGEST = 400  # characters of an answer that is still compared as mathematics

#: A minus behind a digit, a letter or a bracket subtracts.
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
HEADING = re.compile(r"^[^\w\n]*problem[ \t]*#?(\d+)\b", re.IGNORECASE | re.MULTILINE)
#: A number with a unit in plain letters, such as ``18 dollars``; not ``3 million`` or ``2 pi``.
QUANTITY = re.compile(
    rf"(?:\\?\$)?\s*({NUMBER.pattern})\s+"
    r"(?!hundred|thousand|million|billion|dozen|percent)[A-Za-z]{3,}(?: [A-Za-z]+)*\.?"
)


def grade(problem: Problem, output: str) -> Answers:
    r"""Return which parts of an output are right, one bool for each of the problem's answers.

    ``"math"``: of one answer the last ``\boxed{}``, else the last number, is compared by value. Of
    several, each is looked for under its heading, ``Problem 3``; where there are no headings, in the
    order of the boxes. ``"contains"``: the answer stands as a whole word or number in the text after
    any ``</think>``; where the model went on with a sentence of :attr:`Problem.behind`, in the first
    line alone.

    Raises:
        EvaluationError: mathematics is compared, and math-verify is not installed.
    """
    if problem.grader == "contains":
        said = _first_line(output) if problem.behind else output.rpartition("</think>")[2]
        return tuple(_contains(said, answer) for answer in problem.answers)
    _need_math_verify()  # whatever the answers: a run does not find out late
    found = [answer_of(output)] if len(problem.answers) == 1 else _parts(output, len(problem.answers))
    return tuple(_same(answer, one) for answer, one in zip(problem.answers, found, strict=True))


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


def _same(gold: str, answer: str) -> bool:
    if not answer or len(answer) > LONGEST:
        return False
    if _plain(gold) == _plain(answer):
        return True
    if NUMBER.fullmatch(gold) and (quantity := QUANTITY.fullmatch(answer)):
        answer = quantity[1]
    try:
        return same_value(gold, answer)
    except RuntimeError as error:
        raise EvaluationError(f"comparing {answer!r} with {gold!r} failed in a process: {error}") from error


def _plain(answer: str) -> str:
    """Return an answer without what LaTeX does not show, or shows as space."""
    return re.sub(r"\s|\\[,;:! ]", "", answer)


def _need_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise EvaluationError(
            "comparing mathematical answers needs math-verify, which is not installed: pip install 'kvpolicy[eval]'"
        )
