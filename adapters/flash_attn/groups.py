"""Layers of equal plan, and the store they share: :class:`Group`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpolicy.adapters import planning
from kvpolicy.errors import BindError, UsageError
from kvpolicy.growing import GrowingStore
from kvpolicy.host import on_device
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec
from kvpolicy.ragged import new_store
from kvpolicy.row import Row
from kvpolicy.store import Store
from kvpolicy.view import LayerSpec

__all__ = [
    "ADAPTER",
    "Group",
    "check_neighbours",
    "follow",
    "layers_by_plan",
    "made_store",
    "new_rows",
    "packed_places",
]

ADAPTER = "the flash_attn adapter"


@dataclass(eq=False)
class Group:
    """Hold the layers that share a plan, and so a store, while a forward pass goes through them.

    Attributes:
        store: of these layers.
        after: every row with the new tokens of a turn.
        lengths: ``[requests]`` int32 on the device, what attention is told of this forward pass; made
            when its first layer runs.
        packed: ``[requests, S]`` int64, see :func:`packed_places`; None where nothing has to move.
        turn_nbytes: what the largest turn so far held of one layer, besides the slots.
    """

    store: Store
    after: list[Row] = field(default_factory=list)
    lengths: Tensor | None = None
    packed: Tensor | None = None
    turn_nbytes: int = 0

    @property
    def evicts(self) -> bool:
        """Return whether a policy evicts from these layers, and does not leave them alone."""
        return bool(self.store.bands)

    def index(self, layer: int) -> int:
        """Return the place of a layer in the store."""
        return self.store.layers.index(layer)


def follow(policy: EvictionPolicy | Sequence[EvictionPolicy], batch_size: int) -> tuple[EvictionPolicy, ...]:
    """Return the policy of each row, checked.

    Raises:
        BindError: it is no policy, or there are as many as no batch of this size needs.
    """
    policies = planning.checked(policy, ADAPTER)
    if len(policies) not in (1, batch_size):
        raise BindError(f"{len(policies)} policies for batch_size={batch_size}: give one, or one for each row")
    return policies if len(policies) == batch_size else policies * batch_size


def layers_by_plan(
    policies: Sequence[EvictionPolicy], num_layers: int, num_heads: int, max_new_tokens: int | None
) -> list[tuple[tuple[LayerPlan, ...], list[int]]]:
    """Return the layers of each plan; the plans are one a row, and none where layers are left alone."""
    spec, layers = ModelSpec(num_layers, max_new_tokens, num_heads), tuple(range(num_layers))
    plans = {id(one): one.plan(spec) for one in policies}
    return planning.by_plan(layers, planning.plans_of_layers([plans[id(one)] for one in policies], layers))


def new_rows(batch_size: int, requests: Sequence[int] | None, seeds: Sequence[int] | None) -> list[Row]:
    """Return one record a row.

    Raises:
        BindError: names or seeds that are none, or as many as there are no rows.
    """
    columns = []
    for name, given in (("requests", requests), ("seeds", seeds)):
        numbers = planning.integers(name, given)
        if numbers is not None and len(numbers) != batch_size:
            raise BindError(f"{name} names {len(numbers)} rows, and batch_size is {batch_size}")
        columns.append(numbers or [0] * batch_size)
    return [Row(request=request, seed=seed) for request, seed in zip(*columns, strict=True)]


def made_store(
    policies: Sequence[EvictionPolicy],
    plans: Sequence[LayerPlan],
    spec: LayerSpec,
    layers: Sequence[int],
    rows: Sequence[Row],
    *,
    lse: bool,
) -> Store:
    """Return the store of layers that share a plan, empty.

    Args:
        policies: one a row.
        plans: one a row, or none where the layers are left alone.
        spec: of each layer; the slots are those that the plans ask for.
        layers: indices.
        rows: one record a row.
        lse: attention tells the log-sum-exp of each query.
    """
    if not plans:
        return GrowingStore(spec, layers, rows)
    return new_store(policies, plans, spec, layers, rows, lse=lse)


def check_neighbours(store: Store, rows: Sequence[int]) -> None:
    """Refuse to make a row one that follows an equal policy, but among other rows of the batch.

    Args:
        store: whose rows are replaced.
        rows: the row that each becomes.

    Raises:
        UsageError: rows under one policy do not stand next to each other, and one becomes another.
    """
    bands = [next((b for b in store.bands if b.first <= r < b.stop), None) for r in range(len(store.rows))]
    for place, row in enumerate(rows):
        mine, other = bands[place], bands[row] if 0 <= row < len(bands) else None
        if mine is not None and other is not None and mine is not other and mine.policy == other.policy:
            raise UsageError(
                f"reorder({list(rows)}): row {place} cannot become row {row}: both follow {mine.policy!r}, and rows "
                "of another policy lie between; let rows under one policy stand next to each other in the batch"
            )


def packed_places(store: Store, width: int, counts: Sequence[int]) -> Tensor | None:
    """Return where the tokens of each row lie in slots joined with a turn, without gaps.

    Args:
        store: before the turn.
        width: columns of the turn.
        counts: new tokens of each row, its last columns.

    Returns:
        ``[requests, longest + width]`` int64; anything behind the last token of a row. None where no
        row has a gap.
    """
    if store.uniform and min(counts) == width:
        return None
    device, old = store.spec.device, store.longest
    place = torch.arange(old + width, device=device)
    length = store.column("length")[:, None]
    pad = width - on_device(counts, device)[:, None]
    return torch.where(place < length, place, place + (old - length) + pad).clamp(max=old + width - 1)
