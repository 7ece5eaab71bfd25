"""Checks of what a policy keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from kvpolicy.errors import BindError, KVPolicyError
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec, Plan, Policy
from kvpolicy.scores import Scores
from kvpolicy.stage import Piped, Scorer, Transform
from kvpolicy.testing.changes import permuted_slots
from kvpolicy.testing.kept import (
    Case,
    assert_counts,
    assert_recent,
    assert_same,
    assert_sound,
    assert_valid,
    assert_victims,
    select,
)
from kvpolicy.testing.running import check, for_all
from kvpolicy.testing.strategies import NOT_FINITE, view_specs_for
from kvpolicy.testing.views import RowSpec, ViewSpec
from kvpolicy.view import State, View

__all__ = [
    "assert_guarded",
    "check_budget",
    "check_edges",
    "check_guards",
    "check_not_finite",
    "check_plan",
    "check_recent",
    "check_valid",
    "check_victims",
    "first_plan",
]


@check
def check_plan(policy: EvictionPolicy) -> None:
    """Check that the sizes a policy plans fit into each other, and do not change when asked again.

    A policy that names its layers one by one names three; it may refuse other models.
    """
    for layers, tokens in ((1, 5), (3, 8), (4, 64)):
        model = ModelSpec(num_layers=layers, max_new_tokens=tokens)
        try:
            plan = policy.plan(model)
        except BindError:
            if layers == 3:
                raise
            continue
        assert isinstance(plan, Plan), f"plan() returned {plan!r}"
        assert len(plan.layers) == layers, f"{len(plan.layers)} plans for {layers} layers"
        assert policy.plan(model) == plan, "a second call of plan() returns something else"
        for layer in plan.layers:
            if layer is not None:
                _check_layer(layer, tokens)


def _check_layer(layer: LayerPlan, tokens: int) -> None:
    assert layer.interval is None or layer.interval >= 1, f"{layer}: interval is at least 1"
    assert layer.window >= 0, f"{layer}: window is not negative"
    assert 0 <= layer.recent < layer.budget, f"{layer}: recent is below the budget"
    grown = tokens if layer.interval is None else layer.interval
    assert layer.capacity >= layer.budget + grown, (
        f"{layer}: between two evictions {grown} tokens are added to {layer.budget}"
    )


@check
def check_valid(policy: EvictionPolicy) -> None:
    """Check that no free slot is kept."""
    _for_views(policy, lambda case: assert_valid(case.view, case.keep), "check_valid")


@check
def check_budget(policy: EvictionPolicy) -> None:
    """Check that each head keeps exactly ``min(budget, tokens)`` slots."""
    _for_views(policy, lambda case: assert_counts(case.view, case.keep), "check_budget")


@check
def check_victims(policy: EvictionPolicy) -> None:
    """Check that the victims, where they are named, are what the mask drops, each once."""
    _for_views(policy, lambda case: assert_victims(case.view, case.keep), "check_victims")


@check
def check_recent(policy: EvictionPolicy) -> None:
    """Check that the last ``recent`` tokens of a row stay in every head."""
    _for_views(policy, assert_recent, "check_recent")


@check
def check_guards(policy: EvictionPolicy) -> None:
    """Check that no slot is dropped while one of a lower protection tier is kept.

    Guards are kept whenever they fit, then, and the highest tiers where they do not. Tiers are
    those that the transforms of a policy give; a policy without stages has nothing to check here.
    """
    if not isinstance(policy, Policy):
        return

    _for_views(policy, lambda case: assert_guarded(policy, case), "check_guards")


def assert_guarded(policy: Policy, case: Case) -> None:
    """Assert that no slot is dropped while one of a lower protection tier is kept."""
    tier, view, keep = tiers(policy, case), case.view, case.keep.mask
    dropped = torch.where(view.valid & ~keep, tier, -1).amax(-1)
    lowest = torch.where(keep, tier, 99).amin(-1)
    for row, head in (dropped > lowest).nonzero().tolist():
        raise AssertionError(
            f"row {row}, head {head} drops a slot of tier {int(dropped[row, head])} and keeps "
            f"one of tier {int(lowest[row, head])}"
        )


def tiers(policy: Policy, case: Case) -> Tensor:
    """Return the protection tier of each slot, ``[B, H, S]``: the highest that any transform gives it.

    A transform is told the scores and the tiers that stand before it, as a guard of the highest scores among
    those that no other one protects must be.
    """
    view, chain = case.view, policy.chain
    assert chain.scorer is not None
    states = tuple(
        stage.update(view.at(index), held)
        for index, (stage, held) in enumerate(zip(policy.stages, case.state, strict=True))
    )
    scorer = chain.scorer if chain.transform is None else Piped(chain.scorer, chain.transform)
    return _with_tiers(scorer, view, states, 0).tier


def _with_tiers(node: Scorer, view: View, states: State, at: int) -> Scores:
    """Return what a scorer says, whose first leaf is number ``at``; a tier is never lowered on the way."""
    if isinstance(node, Piped):
        scores = _with_tiers(node.scorer, view, states, at)
        at += sum(1 for _ in node.scorer.leaves())
        for number, step in enumerate(node.transform.leaves(), at):
            assert isinstance(step, Transform)
            said = step.apply(scores, view.at(number), states[number])
            scores = dataclasses.replace(said, tier=torch.maximum(scores.tier, said.tier))
        return scores
    scores = node.score_with(view.at(at), states)
    for part in node.parts():
        assert isinstance(part, Scorer)
        inner = _with_tiers(part, view, states, at)
        scores = dataclasses.replace(scores, tier=torch.maximum(scores.tier, inner.tier))
        at += sum(1 for _ in part.leaves())
    return scores


@check
def check_not_finite(policy: EvictionPolicy) -> None:
    """Check that infinite or undefined input is refused or kept in a defined order.

    Numbers whose squares overflow must leave a full cache, too; in which order is not defined,
    since it depends on how a product is summed.
    """

    def test(spec: ViewSpec) -> None:
        try:
            case = select(policy, spec.view())
        except (KVPolicyError, ValueError):
            return
        assert_sound(case.view, case.keep)
        if spec.data == "huge":  # a fused multiply-add overflows later: kernels differ, rightly
            return
        moved, state = permuted_slots(case.view, case.state, spec.generator)
        again = select(policy, moved, state)
        assert_same(policy, case, again.kept, "moving tokens to other slots")

    for_all(view_specs_for(policy, data=NOT_FINITE), test, name="check_not_finite")


@check
def check_edges(policy: EvictionPolicy) -> None:
    """Check that empty rows, a single slot, budgets beyond the length and all of them at once are answered rightly."""
    plan = first_plan(policy)
    if plan is None:
        return
    b, r = plan.budget, plan.recent
    lengths = {
        "an empty row": [0],
        "a single token": [1],
        "nothing but recent tokens": [r],
        "one token less than the budget": [b - 1],
        "as many tokens as the budget": [b],
        "one token more than the budget": [b + 1],
        "a full layer": [plan.capacity],
        "rows of all lengths": [0, 1, r, b, b + 1, plan.capacity],
    }
    for name, rows in lengths.items():
        for due in (True, False):
            for spare in (0, 3):
                for prompt in (0, plan.capacity):
                    view = _edge(plan, rows, due, spare, prompt)
                    try:
                        assert_sound(view, select(policy, view).keep)
                    except Exception as error:
                        raise AssertionError(f"{name}, {due=}, {spare=}, {prompt=}: {error!r}") from error


def _edge(plan: LayerPlan, lengths: list[int], due: bool, spare: int, prompt: int) -> View:
    rows = [RowSpec(length=n, fresh=n, budget=plan.budget if due else None, prompt=min(n, prompt)) for n in lengths]
    spec = ViewSpec(tuple(rows), spare=spare, recent=plan.recent, window=plan.window, num_layers=3)
    return spec.view()


def first_plan(policy: EvictionPolicy) -> LayerPlan | None:
    """Return the sizes of the first layer of a small model that evicts, or None."""
    layers = policy.plan(ModelSpec(num_layers=3, max_new_tokens=8)).layers
    return next((layer for layer in layers if layer is not None), None)


def _for_views(policy: EvictionPolicy, test: Callable[[Case], None], name: str) -> None:
    """Run a test on a policy's answers to many views."""
    for_all(view_specs_for(policy), lambda spec: test(select(policy, spec.view())), name=name)
