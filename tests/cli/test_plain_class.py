"""Policies as somebody writes them in a hurry: no annotations, no docstring, no repr."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvpolicy import EvictionPolicy, LayerPlan, Plan, Scores, Transform, docstrings, select_top
from kvpolicy.policies import vase
from tests.cli.tools import Command, Install


class Plain:
    needs = frozenset[str]()

    def __init__(self, budget, share=0.5):  # type: ignore[no-untyped-def]
        self.layer = LayerPlan(budget, budget + 8, 8, 4, window=0)
        self.share = share

    def plan(self, model: Any) -> Any:
        return Plan((self.layer,) * model.num_layers)

    def init(self, spec: Any, rows: Any) -> Any:
        return ()

    def select(self, view: Any, state: Any) -> Any:
        return select_top(Scores.of(view, view.positions, weights=False), view, view.budget), state


class Derived(Plain, EvictionPolicy): ...


class NoState(Plain):
    def init(self, spec: Any, rows: Any) -> Any:
        return None


def open_ended(*args: Any, **options: Any) -> Plain:
    return Plain(*args, **options)


@dataclass(frozen=True, repr=False)
class Bare(Transform): ...


@pytest.fixture(autouse=True)
def installed(install: Install) -> None:
    install(
        Plain=Plain, Derived=Derived, NoState=NoState, open_ended=open_ended, part=functools.partial(vase, recent=8)
    )


def test_list(kvpolicy: Command) -> None:
    said = kvpolicy("list").out
    rows = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert "prefill, decode" in rows["Plain"]
    assert "NoState.init returns None; write return ()" in rows["NoState"]


@pytest.mark.parametrize("name", ["Plain", "Derived"])
def test_show(name: str, kvpolicy: Command) -> None:
    head, *lines = (line.split() for line in kvpolicy("show", name).out.splitlines() if line.strip())
    assert head[0] == name
    assert lines == [
        ["It", "has", "no", "docstring."],
        ["parameter", "default"],
        ["budget", "(required)"],
        ["share", "0.5"],
    ]


def test_show_of_stars_and_of_a_partial(kvpolicy: Command) -> None:
    said = kvpolicy("show", "open_ended").out
    assert "*args" in said
    assert "**options" in said
    assert "(required)" not in said
    said = kvpolicy("show", "part").out
    assert "It has no docstring." in said
    assert "partial application" not in said


@pytest.mark.parametrize("name", ["Plain", "Derived"])
def test_explain(name: str, kvpolicy: Command) -> None:
    said = kvpolicy("explain", f"{name}(16, share=0.25)").out
    assert f"  {name}, a class that is not made of stages\n" in "\n".join(line.rstrip() for line in said.split("\n"))
    assert "Cut to 16 slots per KV head" in said
    assert "init returns None" in kvpolicy("explain", "NoState(16)").error


def test_check_and_generate(kvpolicy: Command, tiny: Path) -> None:
    assert kvpolicy("check", "Plain(12)", "--examples", 1).code == 0
    result = kvpolicy("generate", "--policy", "Plain(16)", "--model", tiny, "--max-new-tokens", 8, "Once upon a time")
    assert result.code == 0
    assert "Plain" in result.err
    assert " at 0x" not in result.err


def test_eval_asks_for_a_repr(kvpolicy: Command, tiny: Path, tmp_path: Path) -> None:
    task = ["--task", "passcode(length=200, count=2)", "--model", tiny, "--out", tmp_path / "results.jsonl"]
    error = kvpolicy("eval", "--policy", "Plain(b)", "--budget", 64, *task).error
    assert "Plain has no __repr__" in error
    assert "as in Plain(1024)" in error


def test_a_dataclass_without_a_docstring_says_nothing() -> None:
    assert docstrings.summary(Bare) == ""
