"""What a policy saves and costs on a model: :func:`costs_of`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kvpolicy.cli.shapes import ModelShape
from kvpolicy.explanation import interval_of
from kvpolicy.footprint import Footprint, footprint
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec
from kvpolicy.roofline import Cost, eviction_cost, step_cost

__all__ = ["Costs", "costs_of"]


@dataclass(frozen=True)
class Costs:
    """Hold what a policy takes of a model, for a batch of requests.

    Attributes:
        name: of the model.
        evicting: layers that the policy evicts from.
        others: layers that are not full attention, which nothing evicts from and nothing here counts.
        dtype: of keys, values and weights.
        batch: requests.
        tokens: of each, in the full cache.
        memory: bytes of the layers that may evict.
        eviction: the work of one eviction of all layers and requests.
        step: the work of decoding one token of each request.
        interval: decoded tokens between two evictions, or None.
        eviction_seconds: of one eviction, at the speeds given.
        step_seconds: of one decoded token.
    """

    name: str
    evicting: int
    others: int
    dtype: str
    batch: int
    tokens: int
    memory: Footprint
    eviction: Cost
    step: Cost
    interval: int | None
    eviction_seconds: float | None = None
    step_seconds: float | None = None

    @property
    def share(self) -> float | None:
        """Return the part of the time of decoding that evictions take."""
        if self.eviction_seconds is None or self.step_seconds is None or self.interval is None:
            return None
        return self.eviction_seconds / (self.eviction_seconds + self.interval * self.step_seconds)

    def at(self, bandwidth: float | None, flops: float | None) -> Costs:
        """Return the costs with times.

        Args:
            bandwidth: GB/s; None tells no time.
            flops: TFLOP/s; None: products take no time.
        """
        if bandwidth is None:
            return self
        speeds = bandwidth * 1e9, None if flops is None else flops * 1e12
        eviction, step = (one.seconds(*speeds) for one in (self.eviction, self.step))
        return dataclasses.replace(self, eviction_seconds=eviction, step_seconds=step)

    def data(self) -> dict[str, Any]:
        """Return everything, sums among it, as JSON can write it."""
        found = dataclasses.asdict(self)
        found["memory"]["total"], found["share"] = self.memory.total, self.share
        return found


def costs_of(policy: EvictionPolicy, shape: ModelShape, *, batch: int, tokens: int, max_new_tokens: int) -> Costs:
    """Return what a policy takes of a model.

    Args:
        policy: to be followed.
        shape: of the model.
        batch: requests.
        tokens: of each, in the full cache.
        max_new_tokens: decoded at most, for a policy without an interval.

    Raises:
        BudgetError: the policy does not fit the model.
    """
    plan = policy.plan(ModelSpec(len(shape.layers), max_new_tokens, shape.num_heads))
    eviction, known = Cost(0, 0, 0), dict[Any, Cost]()
    for one, layer in zip(plan.layers, shape.layers, strict=True):
        if one is not None:
            if (one, layer) not in known:
                known[one, layer] = eviction_cost(policy, one, layer, hidden=shape.hidden) * batch
            eviction += known[one, layer]
    slots = [tokens if one is None else min(tokens, _held(one)) for one in plan.layers]
    return Costs(
        name=shape.name,
        evicting=sum(one is not None for one in plan.layers),
        others=len(shape.skipped),
        dtype=str(shape.layers[0].dtype).removeprefix("torch."),
        batch=batch,
        tokens=tokens,
        memory=footprint(policy, shape.layers, batch=batch, tokens=tokens, max_new_tokens=max_new_tokens),
        eviction=eviction,
        step=step_cost(shape.layers, slots, batch=batch, weights=shape.weights, parameters=shape.parameters),
        interval=interval_of(plan.layers),
    )


def _held(plan: LayerPlan) -> int:
    """Return the slots in use between two evictions, on average over time and heads."""
    budget = plan.budget if plan.heads is None else sum(plan.heads) // len(plan.heads)
    return budget + (plan.capacity - plan.budget) // 2
