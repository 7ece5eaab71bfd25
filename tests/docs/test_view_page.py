"""The table of what a view holds is that of the code, and true of a view."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy import Keep, LayerPlan, LayerSpec, ModelSpec, Plan, Scores, State, View, select_top
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.catalog import NEEDS
from kvpolicy.testing import RowSpec, ViewSpec, make_view
from tests.docs.view_page import PAGE, computed, fields, render

TEXT = PAGE.read_text("utf-8")
SIZES = {"H": 2, "Hq": 4, "D": 6, "Dv": 5, "W": 3, "D / 2": 3}


def test_the_table_is_not_stale() -> None:
    assert render(TEXT) == TEXT, "docs/write-a-policy.md is stale: python -m tests.docs.view_page"
    stale = TEXT.replace("the logical position of each slot's token", "anything")
    assert render(stale) == TEXT != stale


def test_shapes_and_dtypes_are_those_of_a_view() -> None:
    spec = ViewSpec(rows=(RowSpec(),) * 3, heads=2, group=2, head_dim=6, value_dim=5, window=3, sinks=True)
    view = make_view(spec)
    sizes = SIZES | {"B": 3, "S": view.shape[2], "F": view.fresh.shape[-1]}
    compared = 0
    for one in (*fields(), *computed()):
        found = getattr(view, one.name)
        assert isinstance(found, torch.Tensor) <= bool(one.shape), one.name
        if one.shape and found is not None:
            assert list(found.shape) == [sizes[size] for size in one.shape.strip("[]").split(", ")], one.name
            said = {"in the cache's dtype": "float32", "float": "float32"}.get(one.dtype, one.dtype)
            assert str(found.dtype) == f"torch.{said}", one.name
            compared += 1
    assert compared == 21


class Watching:
    """Remember what it is shown."""

    def __init__(self, needs: frozenset[str], *, window: int, shared: bool) -> None:
        self.needs, self.seen = needs, list[View]()
        self.layer = LayerPlan(8, 16, 4, 2, window=window, shared=shared)

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((self.layer,) * model.num_layers)

    def init(self, spec: LayerSpec, rows: int) -> State:
        return ()

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        self.seen.append(view)
        return select_top(Scores.of(view, view.positions, weights=False), view, view.budget), state


@pytest.fixture(scope="module")
def model() -> Any:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("asks", [True, False])
def test_a_field_is_offered_where_what_it_needs_is_declared(asks: bool, model: Any) -> None:
    needs = {one.name: one.needs.strip('"') for one in fields() if one.needs}
    assert set(needs.values()) == set(NEEDS) - {"every_query"}, "every need but that is for a field"
    del needs["all_reduce"], needs["lse"]  # nothing to reduce on one device, and an engine need not tell
    policy = Watching(frozenset(needs.values()) if asks else frozenset(), window=2 if asks else 0, shared=asks)
    with torch.no_grad(), EvictionCache(model, policy) as cache:
        model(torch.arange(1, 13)[None], past_key_values=cache)
    (view,) = policy.seen
    assert {name: getattr(view, name) is not None for name in needs} == dict.fromkeys(needs, asks)


def test_what_else_may_be_missing_says_so() -> None:
    missing = re.compile(r"\bNone\b")
    for one in fields():
        if getattr(View, one.name, 0) is None:
            assert missing.search(one.meaning), f"View does not say when {one.name} is None"
