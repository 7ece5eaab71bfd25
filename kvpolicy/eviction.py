"""Evictions: show a policy what a store holds, and do what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.band import Band, Span
from kvpolicy.compaction import compress
from kvpolicy.integrity import insist_on_keep
from kvpolicy.row import Row
from kvpolicy.store import Store
from kvpolicy.view import DEFAULT_WORKSPACE, StageState, State, View
from kvpolicy.window import oldest_first, unrolled

__all__ = ["LogitSpec", "evict", "fill_from"]

_BYTES_PER_SLOT = 96  #: what tiers, keys of the total order and masks of one slot take at once


@dataclass(frozen=True)
class LogitSpec:
    """Say what a model's attention does to logits, and which heads these are.

    Attributes:
        scaling: what logits are multiplied by.
        softcap: what they are capped with, or None.
        sinks: ``[layers, Hq]``, a logit that takes part in every softmax, or None.
        num_layers: layers of the model.
        num_heads: KV heads of the model.
        head_offset: the global index of head 0.
        all_reduce: sums a tensor over the ranks that share these heads, or None on one device.
        workspace: bytes that the temporaries of one eviction may take.
        absorb: what makes queries of a layer, counted within the store, ask the keys that the store
            holds, ``[rows, Hq, W, query_dim]`` to ``[rows, Hq, W, D]``; None where they do.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    num_layers: int = 1
    num_heads: int = 1
    head_offset: int = 0
    all_reduce: Callable[[Tensor], Tensor] | None = None
    workspace: int = DEFAULT_WORKSPACE
    absorb: Callable[[int, Tensor], Tensor] | None = None


def evict(store: Store, due: Sequence[bool], logits: LogitSpec, shown: Sequence[bool] | None = None) -> None:
    """Cut the rows that are due to their budget, in every layer of the store, in place.

    Rows that are not due keep everything. Policies see them, too, and may remember something.

    Args:
        store: modified.
        due: for each request.
        logits: what the model's attention does.
        shown: requests that a policy is shown although nothing has to go; every one by default. The
            others under the same policy are shown with them, and with those that are due.
    """
    store.settle()
    budgets = [
        plan.budget if is_due else row.length for plan, row, is_due in zip(store.plans, store.rows, due, strict=True)
    ]
    every = _whole_view(store, budgets, logits)
    most = max(1, logits.workspace // 2 // _bytes_per_row(store))
    for band in store.bands:
        here = slice(band.first, band.stop)
        if not any(due[here]) and not any([True] if shown is None else shown[here]):
            continue
        limit = _limit(store.rows[here], budgets[here])
        for span in band.spans(most):
            view = _rows_of(every, span.store)
            view = dataclasses.replace(view, recent=band.plan.recent, max_budget=max(budgets[here]), max_victims=limit)
            view = _with_window(view, store, band, span.store, logits)
            keep, state = band.policy.select(view, band.state_of(span))
            insist_on_keep(keep, view, band.policy)
            band.remember(span, state)
            if limit > 0:
                store.compact(band, span, keep, view.lengths, torch.minimum(view.budget, view.lengths), limit)
        for r in range(band.first, band.stop):
            store.rows[r] = store.rows[r].evicted(budgets[r], band.plan.recent)


def _limit(rows: Sequence[Row], budgets: Sequence[int]) -> int:
    """Return the largest number of slots that a row must lose."""
    return max(0, *(row.length - budget for row, budget in zip(rows, budgets, strict=True)))


def _bytes_per_row(store: Store) -> int:
    """Return what the temporaries of one row take: of its slots, its window, and its fresh tokens."""
    spec, fresh = store.spec, max(row.length - row.settled for row in store.rows)
    queries = spec.num_query_heads * store.window.size * (spec.head_dim + (spec.query_dim or 0))
    tokens = spec.num_heads * fresh * (spec.head_dim + spec.value_dim)
    return spec.num_heads * spec.capacity * _BYTES_PER_SLOT + (queries + tokens) * store.keys.element_size()


def _whole_view(store: Store, budgets: Sequence[int], logits: LogitSpec) -> View:
    """Return a view of all rows; what differs between policies is filled in later."""
    layers, heads, device = len(store.layers), store.spec.num_heads, store.spec.device
    lengths, settled = store.column("length"), store.column("settled")
    newest = max(row.length - row.settled for row in store.rows)
    fresh = settled[:, None] + torch.arange(newest, device=device)
    fresh = torch.where(fresh < lengths[:, None], fresh, -1)
    by_head = torch.tensor(budgets, device=device)[:, None].expand(-1, heads)
    return View(
        keys=store.keys.flatten(0, 1),
        values=store.values.flatten(0, 1),
        positions=store.positions.flatten(0, 1),
        order=store.order.flatten(0, 1),
        fresh=fresh[:, None].expand(-1, heads, -1).repeat(layers, 1, 1),
        budget=by_head.repeat(layers, 1),
        lengths=lengths[:, None].expand(-1, heads).repeat(layers, 1),
        layer=torch.tensor(store.layers, device=device).repeat_interleave(len(store.rows)),
        recent=0,
        max_budget=0,
        max_victims=0,
        sink_logits=None if logits.sinks is None else logits.sinks.repeat_interleave(len(store.rows), 0),
        **_of_rows(store.rows, layers, device),
        **_of_model(logits),
    )


def _with_window(view: View, store: Store, band: Band, at: slice, logits: LogitSpec) -> View:
    """Return a view of some rows with the queries that their policy asked for, oldest first."""
    size, window = band.plan.window, store.window
    if not size:
        return view
    places = (window.at * len(store.layers))[at]
    queries, positions = oldest_first(window.queries.flatten(0, 1)[at], window.positions.flatten(0, 1)[at], places)
    queries, positions = queries[:, :, -size:], positions[:, -size:]
    if logits.absorb is not None:
        queries = _absorbed(queries, at, len(store.rows), logits.absorb)
    lse = None
    if window.lse is not None and _whole(store.rows[band.first : band.stop], size):
        lse = unrolled(window.lse.flatten(0, 1)[at], places, -3, -1)[:, :, -size:]
    return dataclasses.replace(view, queries=queries, query_positions=positions, lse=lse)


def _whole(rows: Sequence[Row], window: int) -> bool:
    """Return whether the slots still hold all that any query of the window saw: its log-sum-exp is exact."""
    return all(row.whole(window) for row in rows)


def _absorbed(queries: Tensor, at: slice, requests: int, absorb: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return the queries of some of the ``layers * requests`` rows, absorbed layer by layer."""
    parts = []
    for layer in range(at.start // requests, (at.stop - 1) // requests + 1):
        start, stop = max(at.start, layer * requests), min(at.stop, (layer + 1) * requests)
        parts.append(absorb(layer, queries[start - at.start : stop - at.start]))
    return torch.cat(parts)


def fill_from(
    store: Store,
    index: int,
    keys: Tensor,
    values: Tensor,
    counts: Sequence[int],
    after: Sequence[Row],
    logits: LogitSpec,
) -> None:
    """Cut one layer to its budget while the tokens of a turn do not fit into its slots.

    What the layer holds and the new tokens are one temporary layer; its survivors become the
    layer's slots. Every layer is filled before the next one runs, so that one layer's turn is all
    that memory must hold besides the slots.

    Args:
        store: settled, see :meth:`Store.settle`; one layer of it is modified.
        index: the layer, counted within the store; its queries are in the window already.
        keys: ``[requests, H, S_old + T, D]``: the slots in use, up to the longest row, then the
            new tokens, left-padded.
        values: ``[requests, H, S_old + T, Dv]``.
        counts: new tokens of each row.
        after: every row with the new tokens and before any is dropped.
        logits: what the attention of this layer does, its sinks ``[1, Hq]``.
    """
    heads, device, old = store.spec.num_heads, store.spec.device, store.longest
    budgets = [min(row.length, plan.budget) for row, plan in zip(after, store.plans, strict=True)]
    lengths = torch.tensor([row.length for row in after], device=device)
    positions, order, fresh = _slots_of_turn(store, index, keys.shape[2], counts)
    window, at = store.window.after(counts, [row.seen for row in store.rows])
    asked, asked_positions = oldest_first(store.window.queries[index], window, at)
    if logits.absorb is not None and store.window.size:
        asked = logits.absorb(index, asked)
    held = store.window.lse
    lse = None if held is None else unrolled(held[index], at, -3, -1)
    by_head = torch.tensor(budgets, device=device)[:, None].expand(-1, heads)
    view = View(
        keys=keys,
        values=values,
        positions=positions,
        order=order,
        fresh=fresh,
        budget=by_head,
        lengths=lengths[:, None].expand(-1, heads),
        layer=torch.full((len(after),), store.layers[index], device=device),
        recent=0,
        max_budget=0,
        max_victims=0,
        sink_logits=None if logits.sinks is None else logits.sinks.expand(len(after), -1),
        **_of_rows(after, 1, device),
        **_of_model(logits),
    )
    masks, states = [], []
    for band in store.bands:
        here, span, size = slice(band.first, band.stop), band.layer(index), band.plan.window
        part = dataclasses.replace(
            _rows_of(view, here),
            recent=band.plan.recent,
            max_budget=max(budgets[here]),
            max_victims=_limit(after[here], budgets[here]),
            queries=asked[here, :, -size:] if size else None,
            query_positions=asked_positions[here, -size:] if size else None,
            lse=lse[here, :, -size:] if size and lse is not None and _whole(after[here], size) else None,
        )
        keep, state = band.policy.select(part, _state_of_turn(store, band, span, old, keys.shape[2] - old))
        insist_on_keep(keep, part, band.policy)
        store.broken[span.store] += keep.broken
        masks.append(keep.mask)
        states.append(state)
    in_order = order.to(torch.int64)
    survivors = compress(in_order, torch.cat(masks).gather(-1, in_order), max(budgets), -1)
    store.fill(index, survivors, keys, values, positions, states)


def _slots_of_turn(store: Store, index: int, size: int, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return positions, order and fresh slots of what a layer holds joined with a turn's tokens."""
    device, heads, old = store.spec.device, store.spec.num_heads, store.longest
    width = size - old
    count = torch.tensor(counts, device=device)[:, None, None]
    length, settled, seen = (store.column(name)[:, None, None] for name in ("length", "settled", "seen"))
    pad = width - count
    slot, column = torch.arange(size, device=device), torch.arange(width, device=device)
    new = torch.where(column >= pad, seen + column - pad, -1).expand(-1, heads, -1)
    positions = torch.cat([store.positions[index, :, :, :old], new.to(torch.int32)], -1)
    # In position order: the old slots, the new ones, then whatever is free, each slot once.
    held = torch.cat(
        [store.order[index, :, :, :old].to(torch.int64), new.new_zeros(len(counts), heads, width)],
        -1,
    )
    free = slot - length - count
    free = torch.where(free < old - length, length + free, free + length)
    order = torch.where(slot < length, held, torch.where(slot < length + count, old + pad + slot - length, free))
    unsettled = length - settled
    rank = torch.arange(max(row.length - row.settled for row in store.rows) + width, device=device)
    fresh = torch.where(rank < unsettled, settled + rank, old + pad + rank - unsettled)
    fresh = torch.where(rank < unsettled + count, fresh, -1).expand(-1, heads, -1)
    return positions, order.to(torch.int32), fresh


def _state_of_turn(store: Store, band: Band, span: Span, old: int, width: int) -> State:
    """Return the state of a layer's slots, followed by that of tokens that nobody has seen."""
    empty = band.policy.init(dataclasses.replace(store.spec, capacity=width), band.count)
    joined: list[StageState | None] = []
    for held, new in zip(band.state_of(span), empty, strict=True):
        if held is None or new is None:
            joined.append(None)
            continue
        pairs = zip(held.slots, new.slots, strict=True)
        joined.append(StageState(tuple(torch.cat([a[:, :, :old], b], 2) for a, b in pairs), held.rows))
    return tuple(joined)


def _of_rows(rows: Sequence[Row], layers: int, device: torch.device) -> dict[str, Any]:
    """Return the view's fields that count what happened to each row, repeated for each layer."""
    names = {
        "seen": "seen",
        "prompt": "prompt_length",
        "evictions": "evictions",
        "request": "request",
        "seed": "seed",
    }
    return {
        to: torch.tensor([getattr(row, of) for row in rows], dtype=torch.int64, device=device).repeat(layers)
        for of, to in names.items()
    }


def _of_model(logits: LogitSpec) -> dict[str, Any]:
    return {
        "num_layers": logits.num_layers,
        "num_heads": logits.num_heads,
        "head_offset": logits.head_offset,
        "all_reduce": logits.all_reduce,
        "scaling": logits.scaling,
        "softcap": logits.softcap,
        "workspace": logits.workspace,
    }


def _rows_of(view: View, at: slice) -> View:
    """Return some rows of a view."""
    fields = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
    some: dict[str, Any] = {name: value[at] for name, value in fields.items() if isinstance(value, Tensor)}
    return dataclasses.replace(view, **some)
