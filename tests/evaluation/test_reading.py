"""Tasks as text: what is read, what is refused, and what other packages add."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.problem import Problem, Task
from kvpolicy.evaluation.tasks import BUILT_IN, file, gsm8k, many, parse, passcode, reading, tasks


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("gsm8k", gsm8k()),
        (" gsm8k(shots=4) ", gsm8k(shots=4)),
        ("many(svamp, 8)", many()),
        ("many(gsm8k(split='odd'), count=2)", many(gsm8k(split="odd"), 2)),
        ("passcode(2048, depth=None)", passcode(length=2048)),
        ("file('a b.txt')", file("a b.txt")),
    ],
)
def test_a_text_is_read(text: str, task: Task) -> None:
    assert parse(text) == task
    assert parse(repr(task)) == task


def test_a_repr_leaves_defaults_out() -> None:
    assert repr(many()) == "many(task=svamp)"  # a task in a task is always said
    assert repr(many(gsm8k(split="odd"), 2)) == "many(task=gsm8k(split='odd'), count=2)"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gsm8", "did you mean 'gsm8k'"),
        ("gsm8k(shot=1)", "no parameter 'shot' .did you mean 'shots'"),
        ("gsm8k(split=even)", "a word is 'even'"),
        ("gsm8k(split='evn')", "'all', 'even' or 'odd'"),
        ("gsm8k(shots='4')", "whole number from 0"),
        ("gsm8k(1, 'even', 3)", "too many positional"),
        ("gsm8k(**{})", "write every parameter out"),
        ("gsm8k(", "never closed"),
        ("", "cannot read the task"),
        ("'gsm8k'", "is no task"),
        ("__import__('os').getcwd()", "is no task"),
        ("gsm8k(shots=2**9)", "constants and tasks alone"),
        ("file", "missing a required argument: 'path'"),
        ("many(passcode)", "no set of questions"),
        ("many(gsm8k(shots=2))", "worked examples"),
        ("passcode(depth=2)", "between 0 and 1"),
        ("needles(queries=5)", "queries <= keys"),
        ("turns(rounds=2, facts=2)", "one round is for the question"),
        ("words(common=60)", "at most"),
        ("variables(hops=-1)", "whole number from 0"),
        ("(" * 500, "cannot read the task"),
    ],
)
def test_a_wrong_text_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(EvaluationError, match=why) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class haiku:
    """A task of somebody else."""

    lines: int = 3

    def problems(self, data: Path | None) -> list[Problem]:
        return []


def declare(monkeypatch: pytest.MonkeyPatch, name: str, load: Callable[[], Any], package: str = "poems") -> None:
    point = SimpleNamespace(name=name, load=load, dist=SimpleNamespace(name=package))
    monkeypatch.setattr(reading, "entry_points", lambda group: [point] if group == "kvpolicy.tasks" else [])


def test_another_package_brings_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "haiku", lambda: haiku)
    assert parse("haiku(lines=4)") == haiku(4)
    assert tasks() == [*BUILT_IN, "haiku"]


def test_another_package_may_not_take_a_name_and_must_load(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "gsm8k", lambda: haiku)
    with pytest.raises(EvaluationError, match="'poems' declares the task 'gsm8k'"):
        parse("svamp")

    def broken() -> Any:
        raise ImportError("no module named ink")

    declare(monkeypatch, "haiku", broken)
    assert parse("gsm8k") == gsm8k()
    with pytest.raises(EvaluationError, match=r"'haiku' of the package 'poems' cannot be loaded: no module named ink"):
        parse("haiku")


def test_the_project_declares_what_is_built_in() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["kvpolicy.tasks"]
    assert set(declared) == set(BUILT_IN)
    for name, value in declared.items():
        assert EntryPoint(name, value, "kvpolicy.tasks").load() is BUILT_IN[name]
