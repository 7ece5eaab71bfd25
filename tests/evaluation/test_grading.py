"""Which parts of an output are right."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvpolicy.evaluation import comparing
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.grading import answer_of, boxes, grade
from kvpolicy.evaluation.problem import Grader, Problem

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs math-verify: pip install 'kvpolicy[eval]'"
)


def problem(*answers: str, grader: Grader = "math", behind: str = "") -> Problem:
    return Problem("one", (), answers, 10, grader=grader, behind=behind)


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}} and 7", r"\frac{1}{2}"),
        (r"\boxed {a} and \fbox{b}", "a"),
        (r"cut off: \boxed{18", "18"),  # by its last number
        (r"\boxed{} or 4", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("16 - 3 = -13 of 1,234.50.", "1,234.50"),
        ("so 16-13", "13"),
        ("it is -13.", "-13"),
        ("half is .5", ".5"),
        ("nothing", ""),
    ],
)
def test_the_last_box_is_the_answer_else_the_last_number(output: str, answer: str) -> None:
    assert answer_of(output) == answer


def test_boxes_nest() -> None:
    assert boxes(r"\boxed{\boxed{1}} \boxed{2}") == [r"\boxed{1}", "1", "2"]


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (" 48213.", True),
        ("\n48213\nThe passcode", True),
        (" 148213.", False),
        (" 482130", False),
        (" 48213.5", False),
        (" 1,48213", False),
        (" 11111.\nNo, 48213.", False),  # the first line alone
        ("", False),
    ],
)
def test_digits_that_go_on_with_a_sentence_are_whole_and_in_the_first_line(output: str, right: bool) -> None:
    assert grade(problem("48213", grader="contains", behind="The passcode is"), output) == (right,)


def test_without_a_text_behind_every_line_after_the_thoughts_counts() -> None:
    asked = problem("ABCDE", "FGHIJ", grader="contains")
    assert grade(asked, "They are:\n* abcde\n* FGHIJK") == (True, False)
    assert grade(asked, "<think>ABCDE, FGHIJ?</think>It is FGHIJ.") == (False, True)


def test_a_missing_library_is_said_and_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    with pytest.raises(EvaluationError, match=r"pip install 'kvpolicy\[eval\]'"):
        grade(problem("18"), r"\boxed{18}")


@needs_math_verify
@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("18", "18.0", True),
        ("18", r"\$18", True),
        ("18", "18 dollars", True),
        ("18", r"18\text{ eggs}", True),
        ("2125", "2,125", True),
        ("025", "25", True),
        ("0.5", r"\frac12", True),
        ("3, 5, 7", "3,5,7", True),
        (r"\text{Evelyn}", "Evelyn", True),
        ("p - q", "-q + p", True),
        ("18", "19", False),
        ("18", "180", False),
        ("18", "", False),
        ("-50", "50", False),
        ("3", "3 million", False),
        ("2", "2 pi", False),
        ("18", "8" * 500, False),
    ],
)
def test_answers_are_compared_by_value(gold: str, answer: str, right: bool) -> None:
    assert grade(problem(gold), f"so \\boxed{{{answer}}}.") == (right,)


@needs_math_verify
def test_parts_stand_under_their_headings() -> None:
    output = (
        "Problem 1: 2+2. Answer: \\boxed{4}\n**Problem 3:** it is 9\n"
        "Problem 2: \\boxed{1} no, \\boxed{6}\nProblem 1 is done."
    )
    assert grade(problem("4", "6", "9", "5"), output) == (True, True, True, False)
    assert grade(problem("4", "6"), "Problem 2: \\boxed{4}") == (False, False)  # another one's answer


@needs_math_verify
def test_parts_without_headings_are_taken_in_order() -> None:
    assert grade(problem("4", "6", "9"), r"\boxed{4}, \boxed{7}") == (True, False, False)


@needs_math_verify
def test_other_threads_compare_in_a_process() -> None:
    found: list[tuple[bool, ...]] = []
    asked = problem("0.5", "0.5")
    thread = threading.Thread(target=lambda: found.append(grade(asked, r"\boxed{1/2} \boxed{1/3}")))
    thread.start()
    thread.join()
    assert found == [(True, False)]


@needs_math_verify
def test_an_answer_that_takes_too_long_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "SECONDS", 1)
    assert grade(problem("18"), r"\boxed{9^{9^{9}}}") == (False,)


def test_the_process_imports_no_torch() -> None:
    program = f"import sys, runpy; runpy.run_path({str(Path(comparing.__file__))!r}); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True).stdout == "False\n"
