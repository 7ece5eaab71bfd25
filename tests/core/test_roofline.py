"""What an eviction costs at least, and what memory a policy takes, by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kvpolicy import (
    Adaptive,
    Attention,
    BudgetError,
    KeyDifference,
    LayerSpec,
    ModelSpec,
    PerHead,
    PerLayer,
    Policy,
    Recency,
    TopK,
    policies,
)
from kvpolicy.footprint import footprint
from kvpolicy.ragged import new_store
from kvpolicy.roofline import Cost, eviction_cost, step_cost
from kvpolicy.row import Row

H, HQ, D, BUDGET, EVERY = 2, 6, 16, 40, 8
SLOTS = H * (BUDGET + EVERY)
LAYER = LayerSpec(H, HQ, D, D, 0, torch.bfloat16, torch.device("meta"))
PLACES = SLOTS * 8  #: positions and order, read
PAIR, POSITION = 2 * D * 2, 4  #: bytes of a slot
ORDER = H * BUDGET * 4  #: written


def cost(policy: Policy, layer: LayerSpec = LAYER) -> Cost:
    [plan] = policy.plan(ModelSpec(1, EVERY)).layers
    assert plan is not None
    return eviction_cost(policy, plan, layer)


def small(name: str, **options: Any) -> Policy:
    return getattr(policies, name)(BUDGET, interval=EVERY, **options)


def test_what_asks_nothing_moves_what_is_evicted() -> None:
    moved = H * EVERY * (PAIR + POSITION)
    assert cost(small("streaming_llm", recent=10)) == Cost(PLACES + moved, moved + ORDER, 0)


def test_attention_reads_every_key_and_query_and_multiplies_them() -> None:
    found, window = cost(Policy(Attention(12) >> TopK(BUDGET), interval=EVERY, recent=12)), 12
    moved = H * EVERY * (PAIR + POSITION)
    asked = SLOTS * D * 2 + HQ * window * D * 2
    averaged = SLOTS * HQ // H * window * 2
    assert found == Cost(PLACES + moved + asked, moved + ORDER, 2 * HQ * window * (BUDGET + EVERY) * D + averaged)


def test_a_number_of_a_token_is_read_from_new_tokens_alone() -> None:
    found = cost(small("knorm", recent=10))
    moved = H * EVERY * (PAIR + POSITION + 4)
    assert found == Cost(PLACES + moved + SLOTS * 4 + H * EVERY * PAIR, moved + ORDER + SLOTS * 4, 0)


@pytest.mark.parametrize("hidden", [None, 40])
def test_a_policy_that_projects_values_reads_the_projection(hidden: int | None) -> None:
    window, wide = 12, hidden or HQ * D
    policy = small("criticalkv", window=window)
    [plan] = policy.plan(ModelSpec(1)).layers
    assert plan is not None
    found = eviction_cost(policy, plan, LAYER, hidden=hidden)
    moved = H * EVERY * (PAIR + POSITION + 4)
    attended = SLOTS * D * 2 + HQ * window * D * 2
    projected = H * EVERY * D * 2 + wide * HQ * D * 2
    products = 2 * HQ * window * (BUDGET + EVERY) * D + SLOTS * HQ // H * window * 2 + 2 * HQ * EVERY * D * wide
    assert found == Cost(PLACES + moved + SLOTS * 4 + attended + projected, moved + ORDER + SLOTS * 4, products)


def test_expected_attention_reads_keys_and_queries() -> None:
    found = cost(small("expected_attention", window=12, recent=12))
    assert found.read > PLACES + SLOTS * D * 2 + HQ * 12 * D * 2
    assert found.flops == 2 * HQ * 13 * (BUDGET + EVERY) * D  # twelve queries, and their mean


def test_a_key_counts_once_however_many_stages_read_it() -> None:
    one = Policy(KeyDifference() >> TopK(BUDGET), interval=EVERY, recent=10)
    two = Policy(KeyDifference() + KeyDifference() >> TopK(BUDGET), interval=EVERY, recent=10)
    assert cost(one).read == cost(two).read
    assert 2 * cost(one).flops == cost(two).flops > 0


@pytest.mark.parametrize("allocator", [PerHead((50, 30)), Adaptive(BUDGET, 0.5)])
def test_heads_that_differ_count_as_their_mean(allocator: Any) -> None:
    even = Policy(Attention(4, over="all") >> TopK(BUDGET), interval=EVERY, recent=4)
    assert cost(Policy(Attention(4, over="all") >> TopK(allocator), interval=EVERY, recent=4)) == cost(even)


def test_every_recipe_has_a_cost() -> None:
    for name in policies.__all__:
        given: dict[str, Any] = {"retrieval": ((True, False),)} if name == "duo_attention" else {}
        policy = getattr(policies, name)(512, **given)
        [plan] = policy.plan(ModelSpec(1, EVERY)).layers
        assert plan is not None
        grown, heads = plan.capacity - plan.budget, plan.heads or (plan.budget,)
        budget = sum(heads) // len(heads)
        found, slots = cost(policy), H * (budget + grown)
        moved = H * min(grown, budget) * (PAIR + POSITION)
        assert found.read >= slots * 8 + moved, name
        assert found.written >= moved + H * budget * 4, name
        if "queries" in policy.needs:
            assert found.read >= slots * (8 + D * 2) + moved, name  # every key
            assert found.flops >= 2 * HQ * D * (budget + grown), name  # by one query a head, at least


def test_latents_have_no_values_to_move() -> None:
    latents = LayerSpec(1, 4, 20, 16, 0, torch.float32, torch.device("meta"), values_in_keys=True)
    moved = EVERY * (20 * 4 + POSITION)
    found = cost(small("streaming_llm", recent=10), latents)
    assert found == Cost((BUDGET + EVERY) * 8 + moved, moved + BUDGET * 4, 0)


def test_latents_are_asked_by_longer_queries() -> None:
    latents = LayerSpec(1, 4, 20, 16, 0, torch.float32, torch.device("meta"), query_dim=12, values_in_keys=True)
    found = cost(Policy(Attention(4) >> TopK(BUDGET), interval=EVERY, recent=4), latents)
    assert found.flops >= 2 * 4 * 4 * (BUDGET + EVERY) * 20


def test_a_step_reads_weights_and_slots() -> None:
    found = step_cost([LAYER, LAYER], [10, 20], batch=3, weights=1000, parameters=500)
    assert found == Cost(1000 + 3 * 30 * H * PAIR, 3 * 2 * H * PAIR, 3 * (2 * 500 + 2 * HQ * 2 * D * 30))


@pytest.mark.parametrize(
    "policy",
    [
        small("vase", recent=10),
        small("h2o"),
        Policy(Recency() >> TopK(PerHead((30, 20))), interval=4, recent=4),
        Policy(Attention(4, over="all") >> TopK(Adaptive(BUDGET)), interval=4, recent=4),
    ],
)
def test_memory_is_what_the_stores_hold(policy: Policy) -> None:
    [plan] = policy.plan(ModelSpec(1, None, H)).layers
    assert plan is not None
    spec = dataclasses.replace(LAYER, capacity=plan.capacity, device=torch.device("cpu"))
    held = new_store(policy, plan, spec, [0], [Row(), Row(), Row()]).nbytes()
    found = footprint(policy, [LAYER] * 5, batch=3, tokens=100)
    assert found.total == 5 * held
    assert found.full == 5 * 3 * 100 * H * PAIR
    assert found.pairs + found.places + found.window + found.state == found.total


def test_layers_left_alone_hold_every_token() -> None:
    policy = Policy(Recency() >> TopK(PerLayer((BUDGET, None))), interval=EVERY, recent=4)
    found = footprint(policy, [LAYER] * 2, batch=2, tokens=100)
    assert (found.alone, found.full) == (2 * 100 * H * PAIR, 2 * 2 * 100 * H * PAIR)
    assert found.total - found.alone == 2 * SLOTS * (PAIR + 8)


def test_a_policy_without_an_interval_must_know_how_far_it_grows() -> None:
    policy = policies.snapkv(BUDGET, window=8)
    assert footprint(policy, [LAYER], batch=1, tokens=9, max_new_tokens=20).pairs == H * (BUDGET + 20) * PAIR
    with pytest.raises(BudgetError, match="max_new_tokens"):
        footprint(policy, [LAYER], batch=1, tokens=9)
