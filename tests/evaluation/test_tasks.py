"""The tasks: what they ask, and that they are always the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvpolicy.evaluation.errors import DataError, EvaluationError
from kvpolicy.evaluation.grading import grade
from kvpolicy.evaluation.problem import Problem, Task, Text
from kvpolicy.evaluation.tasks import (
    BUILT_IN,
    RECALL,
    file,
    gsm8k,
    many,
    math500,
    needles,
    own,
    parse,
    passcode,
    svamp,
    turns,
    variables,
    wikitext,
    words,
    worked,
)

ANSWER = "She makes 9 * 2 = $<<9*2=18>>18.\n#### 1,018"
WELL = {"Body": "Philip has 87 oranges", "Question": "How many has he?", "Answer": 145.0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Small files in the form of the real ones."""
    rows: dict[str, list[dict[str, Any]]] = {
        "gsm8k/test": [{"question": f"Question {number}?", "answer": ANSWER} for number in range(5)],
        "gsm8k/train": [{"question": f"Example {number}?", "answer": ANSWER} for number in range(100)],
        "svamp/test": [WELL | {"Answer": number + 0.0} for number in range(9)] + [WELL | {"Answer": 2.5}],
        "math500/test": [{"problem": "What is $p$?", "answer": "\\pi", "unique_id": "a"}],
        "aime24/test": [{"problem": "What?", "answer": "025", "id": 60}],
        "aime25/test": [{"problem": "What?", "answer": "70", "id": "I-1"}],
    }
    for name, some in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
    for name in ("wikitext2/test.txt", "tinyshakespeare/input.txt", "mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(f"Line {number} of a text.\n" for number in range(600)))
    return tmp_path


def prompt(problem: Problem) -> str:
    return "\n\n".join(message.text for message in problem.messages)


def of(task: Task, data: Path | None = None) -> list[Problem]:
    problems = [problem for problem in task.problems(data) if isinstance(problem, Problem)]
    assert problems
    return problems


def every(data: Path) -> list[Task]:
    made: dict[Any, Task] = {file: file(str(data / "mine.txt")), own: own(passcode(count=2))}
    return [made.get(make) or make() for make in BUILT_IN.values()]


def test_every_task_is_one_and_the_same_when_it_is_made_again(data: Path) -> None:
    for task in every(data):
        assert isinstance(task, Task)
        problems = task.problems(data)
        assert problems
        assert len({problem.id for problem in problems}) == len(problems)
        assert list(parse(repr(task)).problems(data)) == list(problems)


def test_recall_needs_no_data_and_is_longer_where_it_is_asked_to_be() -> None:
    for make in RECALL:
        short, long = (of(make(length=length))[0] for length in (1000, 3000))
        assert 2 < (len(prompt(long)) + len(long.behind)) / (len(prompt(short)) + len(short.behind)) < 4


# --- sets of questions


def test_gsm8k_asks_for_a_box_and_knows_the_number(data: Path) -> None:
    first = of(gsm8k(), data)[0]
    assert prompt(first).startswith("Question 0?\n\nPlease reason step by step")
    assert "\\boxed{}" in prompt(first)
    assert first.answers == ("1018",)
    assert first.max_new_tokens == 512


def test_halves_are_by_line_and_keep_the_ids(data: Path) -> None:
    both = [[problem.id for problem in of(gsm8k(split=split), data)] for split in ("even", "odd")]
    assert both == [["gsm8k/0", "gsm8k/2", "gsm8k/4"], ["gsm8k/1", "gsm8k/3"]]
    assert sorted(both[0] + both[1]) == [problem.id for problem in of(gsm8k(), data)]


def test_shots_stand_before_the_question_without_annotations(data: Path) -> None:
    text = prompt(of(gsm8k(shots=2), data)[0])
    example = "Question: Example {}?\nAnswer: She makes 9 * 2 = $18.\nThe answer is \\boxed{{1018}}.\n\n"
    assert text.startswith(example.format(0) + example.format(1) + "Question: Question 0?\n\n")
    with pytest.raises(DataError, match="needs 101 lines"):
        gsm8k(shots=101).problems(data)


def test_svamp_joins_body_and_question(data: Path) -> None:
    problems = of(svamp(), data)
    assert prompt(problems[0]).startswith("Philip has 87 oranges. How many has he?\n")
    assert [problems[3].answers, problems[9].answers] == [("3",), ("2.5",)]


def test_the_file_of_another_set_is_refused(data: Path) -> None:
    (data / "math500/test.jsonl").write_text((data / "aime24/test.jsonl").read_text())
    with pytest.raises(DataError, match=r"row 1: no unique_id, found problem, answer, id; this is the file of another"):
        math500().problems(data)
    (data / "math500/test.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        math500().problems(data)


def test_many_numbers_the_questions_and_leaves_the_rest_out(data: Path) -> None:
    problems = of(many(count=4), data)
    assert [problem.answers for problem in problems] == [("0", "1", "2", "3"), ("4", "5", "6", "7")]
    assert problems[0].id == "svamp/0+svamp/1+svamp/2+svamp/3"
    assert problems[0].max_new_tokens == 4 * 400 // 3
    for number in (1, 2, 3, 4):
        assert f"\n\nProblem {number}: Philip has" in prompt(problems[0])
    assert "step by step" not in prompt(problems[0])
    with pytest.raises(DataError, match="needs 11 questions"):
        many(count=11).problems(data)


# --- recall


def test_a_passcode_stands_once_in_the_text_behind_and_the_answer_is_begun() -> None:
    for problem in of(passcode(length=200)):
        (code,) = problem.answers
        assert len(code) == 5
        assert problem.behind.count(code) == 1
        assert code not in prompt(problem)
        name = problem.behind.rpartition("The passcode of ")[2].removesuffix(" is")
        assert f"The passcode of {name} is {code}." in problem.behind
        assert grade(problem, f" {code}.") == (True,)


def words_behind(problem: Problem) -> tuple[int, int]:
    """Return the words of the text behind the prompt, and those from the fact on, question apart."""
    story = problem.behind.partition("\n\n")[0]
    return len(story.split()), len(story[story.index("The passcode of") :].split())


def test_passcodes_are_spread_over_all_depths_or_stand_at_one() -> None:
    whole = words_behind(of(passcode(count=1, depth=0))[0])[1]

    def depths(task: passcode) -> list[float]:
        return [1 - words_behind(problem)[1] / whole for problem in of(task)]

    assert sorted(depths(passcode(count=8))) == pytest.approx([(index + 0.5) / 8 for index in range(8)], abs=0.04)
    few = depths(passcode(count=48))[:6]  # with a limit, they are spread, too
    assert max(few) - min(few) > 0.6
    assert depths(passcode(count=8, depth=0.25)) == pytest.approx([0.25] * 8, abs=0.04)
    first, last = of(passcode(depth=0, count=1))[0], of(passcode(depth=1, count=1))[0]
    assert last.behind.partition("\n\n")[0].endswith(f"{last.answers[0]}.")
    assert first.answers == last.answers


@pytest.mark.parametrize("length", [128, 1024, 8192])
def test_the_text_behind_is_cut_to_one_length_and_still_holds_the_fact(length: int) -> None:
    for problem in of(passcode(length=length, depth=0, count=4)):
        assert problem.behind_tokens == length
        words, from_fact = words_behind(problem)
        # A word is a token at least, and 1.15 are assumed; what is cut off at the front is never the fact.
        assert words >= length
        assert 1.3 * (from_fact + 16) <= length


def test_needles_are_in_the_prompt_and_some_are_asked_for() -> None:
    for problem in of(needles(length=100, keys=3, queries=2, count=5)):
        assert problem.behind == ""
        assert prompt(problem).count("The passcode of") == 3
        text, _, question = prompt(problem).rpartition("\n\n")
        names = question.removeprefix("What are the passcodes of ").partition("?")[0].split(" and ")
        found = [text.partition(f"The passcode of {name} is ")[2][:5] for name in names]
        assert tuple(found) == problem.answers


def test_variables_are_those_that_hold_the_value() -> None:
    for problem in of(variables(length=60, chains=3, hops=5, count=8)):
        text, _, question = prompt(problem).rpartition("\n\n")
        values: dict[str, str] = {}
        for name, other, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", text):
            values[name] = number or values[other]  # what is handed on was assigned before
        asked = question.partition("the value ")[2][:5]
        assert {name for name, value in values.items() if value == asked} == set(problem.answers)
        assert len(values) == 18


def test_common_words_are_by_far_the_commonest() -> None:
    for length in (300, 2000):
        for problem in of(words(length=length, count=3)):
            listed = prompt(problem).split("\n\n")[1].split()[1::2]
            counts = {word: listed.count(word) for word in set(listed)}
            commonest = sorted(counts, key=lambda word: counts[word], reverse=True)
            assert set(commonest[:10]) == set(problem.answers)
            assert counts[commonest[9]] >= 10 * counts[commonest[10]]


def test_turns_state_facts_first_and_ask_last() -> None:
    problem = of(turns(rounds=5, facts=2, length=300))[0]
    assert problem.turns
    assert [message.role for message in problem.messages] == ["user", "assistant"] * 4 + ["user"]
    said = [message.text for message in problem.messages]
    assert [problem.answers[0] in said[0], problem.answers[1] in said[2]] == [True, True]
    assert not any(answer in text for answer in problem.answers for text in said[3:])
    assert of(turns(rounds=2, facts=1))  # no talk at all


# --- texts


def test_texts_follow_each_other_without_overlap(data: Path) -> None:
    texts = wikitext(length=100, count=4).problems(data)
    whole = (data / "wikitext2/test.txt").read_text()
    assert whole.startswith("".join(text.text for text in texts if isinstance(text, Text)))
    assert [len(texts), texts[1].id] == [4, "wikitext/1"]
    assert all(len(text.text) >= 600 for text in texts if isinstance(text, Text))


def test_worked_examples_begin_with_a_question(data: Path) -> None:
    texts = [text.text for text in worked(length=50, count=3).problems(data) if isinstance(text, Text)]
    assert all(text.startswith("Question: Example") and text.endswith("}.\n\n") for text in texts)


def test_a_short_text_gives_fewer_and_none_is_an_error(data: Path) -> None:
    path = str(data / "mine.txt")
    assert len(file(path, length=900, count=32).problems(data)) == 2
    with pytest.raises(DataError, match="write a smaller length"):
        file(path, length=10_000).problems(data)


def test_own_answers_are_of_problems_that_are_answered() -> None:
    assert own(passcode(count=2)).problems(None) == list(passcode(count=2).problems(None))
    with pytest.raises(EvaluationError, match=r"task=pydoc is read, not answered; write, say, own\(gsm8k\)"):
        parse("own(pydoc)")
