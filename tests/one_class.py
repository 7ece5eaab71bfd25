"""Policies in one class, without the algebra, as a third party writes and registers them."""

from __future__ import annotations

import dataclasses
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch

from kvpolicy import (
    EvictionPolicy,
    Keep,
    LayerPlan,
    LayerSpec,
    ModelSpec,
    Plan,
    Scores,
    StageState,
    State,
    View,
    registry,
    select_top,
)
from kvpolicy.registry import Registered


class ShortKeys:
    """Keep short keys and remember how long each is: what ``knorm`` does, in a class that shares nothing with it."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, budget: int, *, interval: int = 64, recent: int = 64) -> None:
        self.layer = LayerPlan(budget, budget + interval, interval, recent, window=0)

    def __repr__(self) -> str:
        return f"short_keys({self.layer.budget}, interval={self.layer.interval}, recent={self.layer.recent})"

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((self.layer,) * model.num_layers)

    def init(self, spec: LayerSpec, rows: int) -> State:
        return (StageState((torch.zeros(rows, spec.num_heads, spec.capacity, device=spec.device),)),)

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        held = state[0].slots[0]
        length = torch.linalg.vector_norm(view.keys, dim=-1, dtype=view.compute_dtype).to(torch.float32)
        fresh = torch.where(view.fresh < 0, view.shape[2], view.fresh)
        new = torch.zeros(*held.shape[:-1], view.shape[2] + 1, dtype=torch.bool, device=held.device)
        held = torch.where(new.scatter(-1, fresh, True)[..., :-1], length, held)  # read once: what it remembers decides
        scores = Scores.of(view, -held, weights=False)
        return select_top(scores, view, view.budget), (StageState((held,)),)


def wary(budget: int) -> EvictionPolicy:
    """Return a policy that takes no interval, and asks for its newest queries."""
    return _Planned(LayerPlan(budget, budget + 8, 8, 4, window=4), needs=frozenset({"queries"}))


def layered(budget: int) -> EvictionPolicy:
    """Return a policy that leaves every layer beyond the second alone."""
    return _Planned(LayerPlan(budget, budget + 8, 8, 4, window=0), layers=2)


def headed(budget: int) -> EvictionPolicy:
    """Return a policy that gives heads budgets of their own."""
    return _Planned(LayerPlan(budget, budget + 8, 8, 4, window=0, heads=(budget, budget - 1)))


class Nameless(ShortKeys):
    """Has a ``repr`` that makes nothing."""

    def __repr__(self) -> str:
        return "<nameless>"


def once(budget: int) -> EvictionPolicy:
    """Return a policy that evicts at the end of a turn only."""
    return _Planned(LayerPlan(budget, budget + 8, None, 4, window=0))


def strange(budget: int) -> EvictionPolicy:
    """Return a policy that needs what no engine has."""
    return _Planned(LayerPlan(budget, budget + 8, 8, 4, window=0), needs=frozenset({"tea"}))


class _Planned(ShortKeys):
    def __init__(self, layer: LayerPlan, *, needs: frozenset[str] = frozenset(), layers: int | None = None) -> None:
        self.layer, self.needs, self.layers = layer, needs, layers  # type: ignore[misc]

    def plan(self, model: ModelSpec) -> Plan:
        known = model.num_layers if self.layers is None else self.layers
        return Plan(tuple(self.layer if n < known else None for n in range(model.num_layers)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Planned) and dataclasses.astuple(self.layer) == dataclasses.astuple(other.layer)

    __hash__ = None  # type: ignore[assignment]


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process know these policies by name, as it would know those of an installed package."""
    known = dict(registry.policies())
    for name in ("wary", "layered", "headed", "once", "strange", "Nameless"):
        known[name] = Registered(name, EntryPoint(name, f"tests.one_class:{name}", "kvpolicy.policies"))
    known["short_keys"] = Registered(
        "short_keys", EntryPoint("short_keys", "tests.one_class:ShortKeys", "kvpolicy.policies")
    )
    monkeypatch.setattr(registry, "policies", lambda: known)
