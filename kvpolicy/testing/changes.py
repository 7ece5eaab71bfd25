"""Changes of a view that must not change what a policy keeps, and one that may: rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.output import OutputProjection
from kvpolicy.view import StageState, State, View

__all__ = ["perturbed", "permuted_slots", "refilled", "selected_heads", "selected_rows", "widened"]

_OF_SLOTS = ("keys", "values", "positions")
_OF_HEADS = ("keys", "values", "positions", "order", "fresh", "budget", "lengths")
_SMALLEST = 4e-6  #: relative; a few times what summing in float32 in another order changes


def permuted_slots(view: View, state: State, seed: int) -> tuple[View, State]:
    """Return the same tokens in other slots, an order of its own in each head, and their state."""
    random = torch.Generator().manual_seed(seed)
    source = torch.rand(view.shape, generator=random).argsort(-1)  # new slot j holds old source[j]
    place = source.argsort(-1)

    def move(x: Tensor) -> Tensor:
        at = source.view(*source.shape, *[1] * (x.dim() - 3))
        return x.gather(2, at.expand(*source.shape, *x.shape[3:]))

    fresh = place.gather(-1, view.fresh.clamp(min=0))
    order = place.gather(-1, view.order.to(torch.int64)).to(view.order.dtype)
    changes: dict[str, Any] = {name: move(getattr(view, name)) for name in _OF_SLOTS}
    moved = dataclasses.replace(
        view,
        **changes,
        order=order,
        fresh=torch.where(view.fresh >= 0, fresh, -1),
    )
    return moved, _each(state, move, lambda rows: rows)


def selected_rows(view: View, state: State, rows: Sequence[int]) -> tuple[View, State]:
    """Return some rows, in the order named."""
    at = torch.tensor(list(rows))
    fields = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
    changes: dict[str, Any] = {name: x[at] for name, x in fields.items() if isinstance(x, Tensor | OutputProjection)}
    picked = dataclasses.replace(view, **changes)
    picked = dataclasses.replace(
        picked,
        max_budget=int(picked.budget.max()),
        max_victims=max(0, int((picked.lengths - picked.budget).max())),
    )
    return picked, _each(state, lambda slots: slots[at], lambda of_rows: of_rows[at])


def selected_heads(view: View, state: State, start: int, stop: int) -> tuple[View, State]:
    """Return some KV heads and their query heads, as one rank of several sees them."""
    changes: dict[str, Any] = {name: getattr(view, name)[:, start:stop].contiguous() for name in _OF_HEADS}
    if view.queries is not None:
        group = view.queries.shape[1] // view.shape[1]
        asked = slice(start * group, stop * group)
        changes["queries"] = view.queries[:, asked].contiguous()
    if view.sink_logits is not None:
        group = view.sink_logits.shape[1] // view.shape[1]
        changes["sink_logits"] = view.sink_logits[:, start * group : stop * group].contiguous()
    if view.output is not None:
        group = view.output.weights[0].shape[1] // view.shape[1]
        changes["output"] = view.output.heads(start * group, stop * group)
    part = dataclasses.replace(view, **changes, head_offset=view.head_offset + start)
    return part, _each(state, lambda slots: slots[:, start:stop].contiguous(), lambda rows: rows)


def widened(view: View, state: State, extra: int) -> tuple[View, State]:
    """Return the view with further free slots behind the others."""
    b, h, s = view.shape

    def pad(x: Tensor, fill: float) -> Tensor:
        more = torch.full((b, h, extra, *x.shape[3:]), fill, dtype=x.dtype, device=x.device)
        return torch.cat([x, more], 2)

    free = torch.arange(s, s + extra, dtype=view.order.dtype).expand(b, h, -1)
    wide = dataclasses.replace(
        view,
        keys=pad(view.keys, 0),
        values=pad(view.values, 0),
        positions=pad(view.positions, -1),
        order=torch.cat([view.order, free], 2),
    )
    return wide, _each(state, lambda slots: pad(slots, 0), lambda rows: rows)


def refilled(view: View, fill: float) -> View:
    """Return the view with other numbers in the slots that hold no token."""
    free = ~view.valid[..., None]
    return dataclasses.replace(
        view,
        keys=view.keys.masked_fill(free, fill),
        values=view.values.masked_fill(free, fill),
    )


def perturbed(view: View, seed: int) -> View:
    """Return the view with keys, values and queries changed by about the error of rounding.

    Each element of a vector is multiplied by a number of its own, the same for all tokens of a
    head, so that equal tokens stay equal.
    """
    random = torch.Generator().manual_seed(seed)
    size = max(2 * torch.finfo(view.keys.dtype).eps, _SMALLEST)

    def change(x: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], 1, x.shape[3])
        factor = 1 + size * torch.randn(shape, generator=random, dtype=torch.float64)
        return (x.to(torch.float64) * factor).to(x.dtype)

    queries = None if view.queries is None else change(view.queries)
    return dataclasses.replace(view, keys=change(view.keys), values=change(view.values), queries=queries)


def _each(state: State, of_slots: Callable[[Tensor], Tensor], of_rows: Callable[[Tensor], Tensor]) -> State:
    return tuple(
        None if held is None else StageState(tuple(map(of_slots, held.slots)), tuple(map(of_rows, held.rows)))
        for held in state
    )
