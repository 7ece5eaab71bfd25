"""What an eviction must read, write and multiply at least: :func:`eviction_cost`.

What a policy reads of keys, values and queries, and what it multiplies, is not declared anywhere: its own
``select`` runs once on torch's ``meta`` device, which has shapes and no memory, and is watched. The rest is
the store's: places that are read, survivors that change theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpolicy.eviction import LogitSpec, evict
from kvpolicy.footprint import planned_store, token_nbytes
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec, Plan
from kvpolicy.row import Row
from kvpolicy.scores import Keep
from kvpolicy.store import Store
from kvpolicy.view import LayerSpec, State, View

__all__ = ["Cost", "bytes_to_move", "eviction_cost", "step_cost"]

_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}  #: where their factors begin
_PICKS = {"index", "index_select", "gather", "take", "embedding"}  #: what reads no more than it gives


@dataclass(frozen=True)
class Cost:
    """Count the work of one eviction.

    Attributes:
        read: bytes, each once.
        written: bytes.
        flops: of products of matrices, two for each multiplication and addition.
    """

    read: int
    written: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        """Return the work of both."""
        return Cost(self.read + other.read, self.written + other.written, self.flops + other.flops)

    def __mul__(self, times: int) -> Cost:
        """Return the work of several."""
        return Cost(self.read * times, self.written * times, self.flops * times)

    def seconds(self, bandwidth: float, flops: float | None = None) -> float:
        """Return the time that no machine can beat: that of the bytes, or of the products if they take longer.

        Args:
            bandwidth: bytes a second.
            flops: floating-point operations a second; None takes no time.

        >>> Cost(read=600, written=400, flops=6000).seconds(bandwidth=1000, flops=2000)
        3.0
        """
        memory = (self.read + self.written) / bandwidth
        return memory if flops is None else max(memory, self.flops / flops)


def bytes_to_move(store: Store, moved: int) -> int:
    """Return the bytes of what changes its place: rows of moved slots, and the order of all.

    Args:
        store: before the eviction or behind it.
        moved: slots that change their place, over all layers, requests and heads.
    """
    spec = store.spec
    row = token_nbytes(spec) // spec.num_heads + store.positions.element_size() + _remembered(store)
    return moved * row + len(store.layers) * spec.num_heads * store.longest * store.order.element_size()


def eviction_cost(policy: EvictionPolicy, plan: LayerPlan, layer: LayerSpec, *, hidden: int | None = None) -> Cost:
    """Return the least work of one eviction of a full layer of one request, while decoding.

    Bytes are those of what must be read or written, each once: keys, values and queries as far as the policy
    reads them; positions, order and remembered numbers of every slot; and survivors that lie where slots are
    given up, as many as there are victims at most. Where heads differ, each counts as their mean. A policy that
    reads the output projection reads that, too, in the dtype of the cache.

    Args:
        policy: whose plan it is.
        plan: of the layer.
        layer: its sizes; capacity and device do not matter.
        hidden: numbers that the layer's output has, for policies that read its projection; as many as the values
            of all query heads together where None.

    >>> from kvpolicy import ModelSpec
    >>> from kvpolicy.policies import streaming_llm, vase
    >>> layer = LayerSpec(8, 32, 128, 128, 0, torch.bfloat16, torch.device("meta"))
    >>> for one in (streaming_llm(1024), vase(1024)):
    ...     print(eviction_cost(one, one.plan(ModelSpec(1)).layers[0], layer))
    Cost(read=333824, written=296960, flops=0)
    Cost(read=3254272, written=333824, flops=574881792)
    """
    grown = plan.capacity - plan.budget
    budget = plan.budget if plan.heads is None else sum(plan.heads) // len(plan.heads)
    # Heads of one number of slots, whatever the policy shares: what is read and multiplied is the same.
    plan = dataclasses.replace(plan, budget=budget, capacity=budget + grown, heads=None, shared=False, refresh=None)
    watch = _Watch(policy, plan)
    store = planned_store(watch, plan, layer, 1)
    full = Row(plan.capacity, budget, budget + plan.capacity, budget, plan.capacity, 1)
    store.rows = [full]
    logits = LogitSpec(1.0, num_layers=1, num_heads=layer.num_heads, workspace=2**62)
    if layer.query_dim is not None:  # latents are asked by longer queries
        logits = dataclasses.replace(
            logits, absorb=lambda _, queries: queries.new_zeros(*queries.shape[:-1], layer.head_dim)
        )
    with contextlib.suppress(_Decided):
        evict(store, [True], dataclasses.replace(logits, **_weights(policy.needs, layer, hidden)))
    slots, moved = layer.num_heads * plan.capacity, layer.num_heads * min(grown, budget)
    after = dataclasses.replace(full, length=budget)
    store.rows = [after]
    written = bytes_to_move(store, moved)
    remembered = _remembered(store) * slots
    order = layer.num_heads * budget * store.order.element_size()
    places = slots * (store.positions.element_size() + store.order.element_size())
    read = watch.read + places + remembered + written - order
    return Cost(read, written + remembered, watch.flops)


def step_cost(layers: Sequence[LayerSpec], slots: Sequence[int], *, batch: int, weights: int, parameters: int) -> Cost:
    """Return the least work of decoding one token of each request.

    Every weight is read once and multiplied by each token; keys and values of every slot are read.

    Args:
        layers: those whose cache counts.
        slots: in use, of each of them, per KV head.
        batch: requests.
        weights: bytes.
        parameters: numbers.
    """
    held = sum(token_nbytes(layer) * count for layer, count in zip(layers, slots, strict=True))
    attended = sum(
        2 * layer.num_query_heads * (layer.head_dim + layer.value_dim) * count
        for layer, count in zip(layers, slots, strict=True)
    )
    written = sum(map(token_nbytes, layers))
    return Cost(weights + batch * held, batch * written, batch * (2 * parameters + attended))


def _remembered(store: Store) -> int:
    """Return the bytes that are remembered of each slot; what is a row's counts once, and nearly nothing."""
    return sum(
        t.element_size() * t[(0,) * len(store.slot_axes) + (0,)].numel()
        for held in store.bands[0].state
        if held is not None
        for t in held.slots
    )


def _weights(needs: frozenset[str], layer: LayerSpec, hidden: int | None) -> dict[str, Any]:
    """Return what a policy needs of a model's weights, as a LogitSpec holds it: shapes, and no memory."""
    found: dict[str, Any] = {}
    if "output_projection" in needs:
        sizes = hidden or layer.num_query_heads * layer.value_dim, layer.num_query_heads, layer.value_dim
        found["output"] = (torch.empty(sizes, dtype=layer.dtype, device="meta"),)
    if "rotary" in needs:
        found["rotary"] = torch.empty(layer.head_dim // 2, dtype=torch.float64, device="meta")
    return found


class _Decided(Exception):  # not an error: the policy has answered
    """Stop an eviction behind the policy's answer."""


@dataclass
class _Watch:
    """Be a policy whose ``select`` is watched, and ends the eviction."""

    policy: EvictionPolicy
    planned: LayerPlan
    read: int = 0
    flops: int = 0

    @property
    def needs(self) -> frozenset[str]:
        return self.policy.needs

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((self.planned,) * model.num_layers)

    def init(self, spec: LayerSpec, rows: int) -> State:
        return self.policy.init(spec, rows)

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        projections = view.output.weights if view.output is not None else ()
        meter = _Meter([t for t in (view.keys, view.values, view.queries, *projections) if t is not None])
        with meter:
            self.policy.select(view, state)
        self.read, self.flops = meter.read, meter.flops
        raise _Decided


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count what is read of some tensors, each once at most, and the products of matrices."""

    def __init__(self, arenas: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arenas, self.flops = arenas, 0
        self._read: dict[int, int] = {_storage(t): 0 for t in arenas}

    @property
    def read(self) -> int:
        """Return the bytes read of all the tensors."""
        return sum(min(t.nbytes, self._read[_storage(t)]) for t in self.arenas)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1].rstrip("_")
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in _PRODUCTS:
            self.flops += 2 * results[0].numel() * args[_PRODUCTS[name]].shape[-1]
        for one in given if not func.is_view else ():
            if (place := _storage(one)) in self._read:
                picked = results[0].numel() if name in _PICKS and results else one.numel()
                self._read[place] += min(picked, one.numel()) * one.element_size()
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
