"""Intervals cover what they claim to, and a difference has one sign whichever way it is taken."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.statistics import (
    Interval,
    by_problem,
    mean_interval,
    paired_interval,
    rate_interval,
)

VALUES = st.floats(-100, 100).map(lambda value: round(value, 3))
SETS = st.dictionaries(st.sampled_from("abcdefghijkl"), VALUES, min_size=2)
FEW = settings(max_examples=20, deadline=None)  # each draws 10,000 resamples


def ends(interval: Interval) -> list[float]:
    return [interval.estimate, interval.low, interval.high]


@pytest.mark.parametrize(
    ("n", "skewed", "least"), [(6, 0, 0.90), (10, 0, 0.92), (30, 0, 0.93), (10, 1, 0.86), (30, 1, 0.91)]
)
def test_the_bootstrap_covers_what_it_claims(n: int, skewed: bool, least: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.empty(250, n, dtype=torch.float64)
    draws = draws.exponential_(generator=generator) if skewed else draws.normal_(1, generator=generator)
    found = [mean_interval(row.tolist()) for row in draws]
    covered = sum(one.low <= 1 <= one.high for one in found) / len(found)
    assert least <= covered <= 0.975  # the error of the simulation is 0.014


def test_wilson_covers_what_it_claims() -> None:
    n = 30
    intervals = [rate_interval([1.0] * k + [0.0] * (n - k)) for k in range(n + 1)]
    coverage: list[float] = []
    for percent in range(1, 100):
        p = percent / 100
        chance = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        coverage.append(sum(c for c, one in zip(chance, intervals, strict=True) if one.low <= p <= one.high))
    assert 0.94 < sum(coverage) / len(coverage) < 0.965
    assert min(coverage) > 0.83


def test_wilson_is_that_of_the_formula() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for k, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        found = rate_interval([1.0] * k + [0.0] * (n - k))
        assert ends(found) == pytest.approx([k / n, low, high], abs=6e-5)
        assert found.n == n


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_rate_lies_in_its_interval_which_has_a_width(rates: list[float]) -> None:
    found = rate_interval(rates)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert found.low < found.high


@FEW
@given(st.lists(VALUES, min_size=2, max_size=20), VALUES)
def test_a_mean_moves_with_its_values(values: list[float], shift: float) -> None:
    found, moved = mean_interval(values), mean_interval([value + shift for value in values])
    assert ends(moved) == pytest.approx([end + shift for end in ends(found)], abs=1e-9)
    assert found.low <= found.high


@FEW
@given(SETS, SETS)
def test_a_difference_taken_the_other_way_is_its_negative(a: dict[str, float], b: dict[str, float]) -> None:
    assume(len(a.keys() & b.keys()) >= 2)
    one, other = paired_interval(a, b), paired_interval(b, a)
    assert [one.estimate, one.low, one.high] == [-other.estimate, -other.high, -other.low]
    assert one.n == other.n == len(a.keys() & b.keys())


@FEW
@given(SETS, VALUES)
def test_a_difference_is_over_the_shared_problems_in_any_order(a: dict[str, float], shift: float) -> None:
    b = {problem: value / 2 for problem, value in a.items()}
    found = paired_interval(a, b)
    moved = paired_interval({p: v + shift for p, v in a.items()}, {p: v + shift for p, v in b.items()})
    assert ends(moved) == pytest.approx(ends(found), abs=1e-9)
    assert paired_interval(dict(reversed(a.items())) | {"more": 1.0}, b | {"other": 9.0}) == found


def test_pairing_finds_what_two_means_would_not() -> None:
    hard = {str(i): i / 40 for i in range(40)}
    better = {problem: value + 0.02 + 0.01 * (int(problem) % 3) for problem, value in hard.items()}
    assert paired_interval(better, hard).low > 0
    assert mean_interval(list(better.values())).low < mean_interval(list(hard.values())).high


@pytest.mark.parametrize(("differing", "excludes"), [(0, False), (1, False), (5, False), (6, True), (10, True)])
def test_fewer_than_six_problems_that_differ_tell_no_sign(differing: int, excludes: bool) -> None:
    for n in (10, 11):
        theirs = {f"{i:02}": 0.0 for i in range(n)}
        ours = {problem: float(int(problem) < differing) for problem in theirs}
        found = paired_interval(ours, theirs)
        assert found.estimate == pytest.approx(differing / n)
        assert found.excludes_zero == excludes
        assert found.high >= found.estimate


def test_seeds_are_averaged_before_problems_are_counted() -> None:
    assert by_problem([("b", 1.0), ("a", 0.5), ("b", 0.0)]) == {"a": 0.5, "b": 0.5}
    assert list(by_problem([("b", 1.0), ("a", 0.5)])) == ["a", "b"]
    one = by_problem((str(i), float(i % 2)) for i in range(10))
    assert by_problem((str(i), float(i % 2)) for i in range(10) for _ in range(5)) == one


@pytest.mark.parametrize("score", [0.0, 1.0, 0.5])
def test_equal_scores_have_an_interval_with_a_width(score: float) -> None:
    found = rate_interval([score] * 12)
    assert found.high - found.low > 0.2


def test_one_half_right_problem_does_not_narrow_an_interval() -> None:
    assert rate_interval([0.0] * 19 + [0.5]).high > rate_interval([0.0] * 20).high


def test_one_value_says_nothing_of_the_spread() -> None:
    assert mean_interval([2.0]) == Interval(2.0, -math.inf, math.inf, 1)
    assert not mean_interval([2.0]).excludes_zero


def test_what_has_no_interval_is_refused() -> None:
    for function in (mean_interval, rate_interval):
        with pytest.raises(EvaluationError, match="found none"):
            function([])
    with pytest.raises(EvaluationError, match="from 0 to 1"):
        rate_interval([0.5, 1.5])
    with pytest.raises(EvaluationError, match="found 1 among 2 and 3"):
        paired_interval({"a": 1.0, "b": 2.0}, {"b": 1.0, "c": 1.0, "d": 0.0})
