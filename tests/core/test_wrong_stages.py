"""Stages of other people that are wrong are told so by name, and before a token is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvpolicy import (
    CompositionError,
    Constant,
    KeyNorm,
    ParameterError,
    Policy,
    Scorer,
    Scores,
    Selector,
    TopK,
    Transform,
)
from tests.core.views import view_of


@dataclass(frozen=True, repr=False)
class NoScore(Scorer):
    pass


@dataclass(frozen=True, repr=False)
class NoApply(Transform):
    pass


@dataclass(frozen=True, repr=False)
class NoSelect(Selector):
    pass


@dataclass(frozen=True, repr=False)
class NoBudgets(Selector):
    def select(self, scores: Scores, view: Any) -> Any:
        return None


@dataclass(frozen=True, repr=False)
class Stretches(Transform):
    """Give heads' numbers, or a mask of rows, to all that torch would stretch them to."""

    what: str

    def apply(self, scores: Scores, view: Any, state: Any) -> Scores:
        if self.what == "numbers":
            return scores.replace(scores.values.mean(1), weights=True)
        return scores.guard((view.positions < 2)[:, 0], 2)


@dataclass(frozen=True, repr=False)
class Returns(Scorer):
    what: str

    def score(self, view: Any, state: Any) -> Any:
        norms = view.values.norm(dim=-1)
        match self.what:
            case "tensor":
                return norms
            case "rows":
                return Scores.of(view, norms.mean(1), weights=True)
            case _:
                return Scores.of(view, "abc", weights=True)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (lambda: NoScore() >> TopK(4), r"NoScore has no method score\(\), which makes a Scorer"),
        (lambda: KeyNorm() >> NoApply() >> TopK(4), r"NoApply has no method apply\(\), which makes a Transform"),
        (lambda: KeyNorm() >> NoSelect(), r"NoSelect has no method select\(\), which makes a Selector"),
        (lambda: KeyNorm() >> NoBudgets(), r"NoBudgets has no method budgets\(\), which makes a Selector"),
    ],
)
def test_a_stage_without_its_method_is_refused_where_it_is_composed(chain: Any, message: str) -> None:
    with pytest.raises(CompositionError, match=message):
        chain()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tensor", r"Returns\.score\(\) returned Tensor; return Scores\.of"),
        ("rows", r"a score a slot is \[2, 2, 9\], found \[2, 9\]"),
        ("text", r"a score a slot is \[2, 2, 9\], found str"),
    ],
)
def test_what_is_no_score_a_slot_is_refused(what: str, message: str) -> None:
    view = view_of(torch.randn(2, 2, 9, 4, generator=torch.Generator().manual_seed(0)), budget=4, recent=2)
    policy = Policy(Returns(what) >> TopK(4), recent=2)
    with pytest.raises(CompositionError if what == "tensor" else ParameterError, match=message):
        policy.select(view, (None, None))


@pytest.mark.parametrize(("what", "message"), [("numbers", "a score a slot is"), ("mask", "a bool a slot is")])
def test_what_a_transform_would_stretch_over_rows_is_refused(what: str, message: str) -> None:
    view = view_of(torch.randn(2, 2, 9, 4, generator=torch.Generator().manual_seed(0)), budget=4, recent=2)
    policy = Policy(Constant() >> Stretches(what) >> TopK(4), recent=2)
    with pytest.raises(ParameterError, match=rf"{message} \[2, 2, 9\], found \[2, 9\]"):
        policy.select(view, (None, None, None))
