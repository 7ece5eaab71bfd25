"""How many slots guards protect together, counted on views and by arithmetic."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvpolicy import (
    BudgetError,
    KeyNorm,
    LayerSpec,
    MassGuard,
    ModelSpec,
    Policy,
    Prompt,
    Recency,
    ScoreGuard,
    Sinks,
    TopK,
    ValueGuard,
    policies,
)
from kvpolicy.scores import Tier
from kvpolicy.stage import Transform
from tests.core.views import view_of

SLOTS, BUDGET, RECENT = 60, 24, 4
CASES: dict[str, tuple[Transform, int, int]] = {
    "sinks are nested": (Sinks(3) >> Sinks(8), 8, 8),
    "sinks of a guard": (Sinks(3) >> ValueGuard(0.5), 12, 12),
    "more sinks than a guard has": (Sinks(10) >> ValueGuard(0.5), 12, 18),
    "both ends of a prompt": (Prompt(0.5) >> ValueGuard(0.5, sinks=2), 12, 22),
    "two ends, and sinks between": (Prompt(0.5) >> Sinks(9), 12, 15),
    "scores are on top": (Sinks(3) >> ScoreGuard(0.6), 15, 15),
    "sinks behind scores": (ScoreGuard(0.5) >> Sinks(8), 10, 18),
    "scores and values": (Sinks(2) >> ScoreGuard(0.4) >> ValueGuard(0.25, sinks=0), 10, 16),
    "most of the attention": (MassGuard(1.0), 0, 20),
    "most of the attention, and sinks": (Sinks(3) >> MassGuard(1.0), 3, 23),
    "all of them": (Prompt(0.5) >> Sinks(2) >> ValueGuard(0.25, sinks=0), 12, 18),
}


def protected(guards: Transform, values: torch.Tensor, prompt: int) -> int:
    """Count the candidates that guards protect in a view."""
    more = {"queries": torch.zeros(1, 1, 2, 4), "prompt_length": torch.tensor([prompt])}  # uniform attention
    view = view_of(values, budget=BUDGET, recent=RECENT, **more)
    scorer = Recency() >> guards
    stages = list(scorer.leaves())
    spec = LayerSpec(1, 1, 4, 4, SLOTS, torch.float32, torch.device("cpu"))
    state = tuple(stage.update(view, stage.init(spec, 1)) for stage in stages)
    scores = scorer.score_with(view, state)
    return int(((scores.tier >= Tier.VALUE) & view.candidates).sum())


@pytest.mark.parametrize("name", CASES)
def test_guards_protect_no_more_than_they_say_and_may_protect_as_many(name: str) -> None:
    guards, least, most = CASES[name]
    policy = Policy(KeyNorm() >> guards >> TopK(BUDGET), recent=RECENT)
    assert policy.guarded(BUDGET) == (least, most)
    size = torch.ones(SLOTS)
    size[20:40] += torch.arange(20)  # the largest values are neither sinks nor near the ends of a prompt of 50
    found = []
    for prompt in (0, 1, 7, 12, 13, 50):
        for order in (torch.arange(SLOTS), torch.arange(SLOTS).flip(0)):
            sizes = torch.where(torch.tensor(prompt == 50), size, size[order])
            values = sizes[:, None] * torch.tensor([1.0, -1.0, 0.0, 0.0])
            found.append(protected(guards, values[None, None], prompt))
    assert max(found) == most
    assert all(count <= most for count in found)


def test_what_may_overflow_is_planned_and_what_must_is_refused() -> None:
    chain = KeyNorm() >> Prompt(0.6) >> ValueGuard(0.6) >> TopK(100)
    policy = Policy(chain, recent=10)
    assert policy.guarded(100) == (60, 116)
    assert policy.plan(ModelSpec(1)).layers[0] is not None
    with pytest.raises(BudgetError, match="protects 60 slots and recent=50 more"):
        dataclasses.replace(policy, recent=50).plan(ModelSpec(1))


def test_scores_come_on_top_of_what_is_guarded_before() -> None:
    policy = Policy(KeyNorm() >> Sinks(10) >> ScoreGuard(0.6) >> TopK(20), recent=4)
    assert policy.guarded(20) == (19, 19)
    with pytest.raises(BudgetError, match=r"Sinks\(10\) and ScoreGuard\(0.6\) protect 19 slots and recent=4 more"):
        policy.plan(ModelSpec(1))
    beside = (KeyNorm() >> Sinks(10)) + (Recency() >> ScoreGuard(0.6))
    assert Policy(beside >> TopK(20), recent=4).guarded(20) == (10, 19)


def test_what_recipes_guard() -> None:
    assert policies.criticalkv(1024).guarded(1024) == (480, 480)
    assert policies.nacl(1024).guarded(1024) == (614 + 10, 614 + 10)
    assert policies.defensivekv(1024).guarded(1024) == (0, 992)
    with pytest.raises(BudgetError, match=r"write a share of at most 0\.9"):
        policies.nacl(100, share=0.95, recent=10)
