"""Policies with a budget to be filled in."""

from __future__ import annotations

import pytest

from kvpolicy import EvictionPolicy, Policy, PolicyError, registry
from kvpolicy.errors import KVPolicyError
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.leaderboard import ABLATION, LEADERBOARD, QUICK
from kvpolicy.evaluation.templates import Filled, fill, takes_budget
from kvpolicy.policies import h2o, pyramidkv, random_eviction, snapkv, vase


def policies(templates: list[str], budgets: list[int]) -> list[EvictionPolicy | None]:
    return [one.policy for one in fill(templates, budgets)]


def test_a_bare_name_takes_the_budget_first() -> None:
    assert policies(["vase", " snapkv "], [256]) == [vase(256), snapkv(256)]
    assert policies(["pyramidkv"], [128, 256]) == [pyramidkv(128), pyramidkv(256)]
    for name in registry.policies():
        assert takes_budget(name)
        if name != "duo_attention":  # which names the heads of every layer, too
            assert len(fill([name], [300])) == 1
    with pytest.raises(PolicyError, match="duo_attention with b=300: duo_attention needs retrieval: duo_att"):
        fill(["duo_attention"], [300])


def test_b_is_the_budget_wherever_it_stands() -> None:
    (found,) = policies(["vase(b, interval=b // 8, recent=b // 4 - 2)"], [256])
    assert found == vase(256, interval=32, recent=62)
    assert policies(["random_eviction(b, recent=2 * (b - 200) + 1)"], [256]) == [random_eviction(256, recent=113)]
    assert policies(["h2o(budget=b)"], [64]) == [h2o(64)]
    (chain,) = policies(["Policy(-1 * ValueNorm() >> Sinks(b // 64) >> TopK(b), interval=b // 8)"], [256])
    assert chain == Policy.parse("Policy(-1 * ValueNorm() >> Sinks(4) >> TopK(256), interval=32)")
    assert policies(["ValueGuard() >> TopK(b)"], [256]) == [Policy.parse("ValueGuard() >> TopK(256)")]
    assert policies(["Recency() >> TopK(PerHead((b, b // 2)))"], [64]) == [
        Policy.parse("Recency() >> TopK(PerHead((64, 32)))")
    ]


def test_full_and_a_policy_without_b_stand_once_whatever_the_budgets() -> None:
    assert fill(["full", "vase(96)", "vase"], [128, 256]) == [
        Filled("full", 0, None),
        Filled("vase(96)", 0, vase(96)),
        Filled("vase", 128, vase(128)),
        Filled("vase", 256, vase(256)),
    ]
    assert [one.text for one in fill(["full", "vase(96)"], [])] == ["full", vase(96).text(full=True)]
    assert not takes_budget("full")
    assert not takes_budget("vase(96)")


def test_a_name_before_a_template_stays_in_the_label_alone() -> None:
    assert fill(["everything: full", "VaSE, small: vase(b, recent=b // 8)", "H: h2o"], [128]) == [
        Filled("everything: full", 0, None),
        Filled("VaSE, small: vase(b, recent=b // 8)", 128, vase(128, recent=16)),
        Filled("H: h2o", 128, h2o(128)),
    ]
    assert takes_budget("a: vase")
    assert not takes_budget("b: vase(96)")


def test_duplicates_come_once() -> None:
    assert len(fill(["vase", "full", "vase", "full"], [64, 128, 64])) == 3
    # The same policy under two labels is two rows of a table, and one under one label is one.
    assert [one.label for one in fill(["vase", "vase(b)"], [128])] == ["vase", "vase(b)"]
    # A budget that changes nothing is there as it was asked for.
    assert [one.budget for one in fill(["vase(b // b * 128)"], [64, 256])] == [64, 256]


def test_a_template_without_its_budget_says_so() -> None:
    for template in ("vase", "Recency() >> TopK(b)", "vase(128, recent=b // 8)"):
        with pytest.raises(EvaluationError, match="has no budget: add `budgets` 256"):
            fill(["full", template], [])


def test_budgets_that_go_nowhere_say_so() -> None:
    with pytest.raises(EvaluationError, match=r"`budgets` 128, 256 goes nowhere: .* write b"):
        fill(["full", "vase(96)"], [128, 256])
    assert len(fill(["vase(96)", "vase"], [128])) == 2  # it goes somewhere


@pytest.mark.parametrize("budget", [0, -5])
def test_a_budget_is_at_least_one(budget: int) -> None:
    with pytest.raises(EvaluationError, match=f"`budgets` {budget}: it is at least 1"):
        fill(["vase"], [128, budget])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("vaze", "did you mean 'vase'"),
        ("vaze(b)", "did you mean 'vase'"),
        ("Recencyy() >> TopK(b)", "did you mean 'Recency'"),
        ("vase(B)", "B"),
        ("vase(budgt=b)", "budgt"),
        ("vase(b", "cannot read"),
        ("", "empty"),
        ("ful", "'ful'"),
        ("vase(b / 2)", "write // in a policy"),
        ("vase(b // 0)", "128 // 0 divides by zero in a policy: write another divisor"),
        ("vase(b ** 2)", "b=128"),
        ("b", "128"),
        ("ValueGuard() >> Stochastic(1.0)", "no selector"),
    ],
)
def test_what_is_no_policy_is_refused_in_one_line(template: str, why: str) -> None:
    with pytest.raises(KVPolicyError, match=why) as caught:
        fill([template, "vase"], [128])
    assert isinstance(caught.value, PolicyError | EvaluationError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("templates", [LEADERBOARD, ABLATION, QUICK])
@pytest.mark.parametrize("budget", [64, 256, 6144])
def test_what_is_compared_fits_every_budget(templates: tuple[str, ...], budget: int) -> None:
    found = fill(list(templates), [budget])
    assert [one.label for one in found] == list(templates)
    assert len({one.text for one in found}) == len(templates)
    for one in found:
        assert one.budget == (0 if one.text == "full" else budget)
        assert one.policy is None or Policy.parse(one.text) == one.policy
