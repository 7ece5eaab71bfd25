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
from kvpolicy.host import on_device, on_host, sent
from kvpolicy.integrity import insist_on_keep
from kvpolicy.output import OutputProjection
from kvpolicy.policy import LayerPlan
from kvpolicy.row import Row
from kvpolicy.scattered import Scattered
from kvpolicy.store import Store
from kvpolicy.view import DEFAULT_WORKSPACE, StageState, State, View
from kvpolicy.window import oldest_first, unrolled

__all__ = ["LogitSpec", "due_rows", "evict", "evict_due", "fill_from", "is_end"]

_BY_ROW = (Tensor, Scattered, OutputProjection)  #: kinds of fields of a view that have an entry a row
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
        output: the output projection of each layer of the store, ``[hidden, Hq, Dv]``, for policies that need
            ``"output_projection"``; or None.
        rotary: ``[D / 2]`` float64, radians a position by which pairs of elements of queries and keys are turned,
            for policies that need ``"rotary"``; or None.
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
    output: tuple[Tensor, ...] | None = None
    rotary: Tensor | None = None


def evict_due(store: Store, before: Sequence[Row], logits: Callable[[], LogitSpec], *, turn: bool) -> None:
    """Evict where it is due, now that the tokens since ``before`` are there to stay.

    A row is due at the end of a turn, and where its count of decoded tokens has reached another multiple of
    the interval.

    Args:
        store: modified.
        before: its rows as they were.
        logits: what the model's attention does; called only if a policy is asked.
        turn: a turn ends.
    """
    due, shown = due_rows(store, before, store.rows, turn=turn)
    if any(due) or any(shown):
        evict(store, due, logits(), shown)


def due_rows(store: Store, before: Sequence[Row], after: Sequence[Row], *, turn: bool) -> tuple[list[bool], list[bool]]:
    """Return which rows are to be cut, and which a policy is to be shown though nothing has to go.

    Args:
        store: modified by nothing.
        before: its rows as they were.
        after: its rows with the tokens that are there to stay.
        turn: a turn ends.
    """
    at_end = [is_end(plan, old, row, turn=turn) for row, old, plan in zip(after, before, store.plans, strict=True)]
    due = [end and over for end, over in zip(at_end, store.over_budget(after), strict=True)]
    shown = [False] * len(due)
    for band in store.bands:
        if "every_query" in band.policy.needs:
            shown[band.first : band.stop] = at_end[band.first : band.stop]
    return due, shown


def is_end(plan: LayerPlan, before: Row, after: Row, *, turn: bool) -> bool:
    """Return whether a row has come to where its policy evicts, if it holds more than its budget.

    Args:
        plan: of its layers.
        before: the row as it was.
        after: the row with the tokens that are there to stay.
        turn: a turn ends.
    """
    return turn or (plan.interval is not None and after.decoded // plan.interval > before.decoded // plan.interval)


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
    if any(sharing := store.sharing(store.rows, due)):
        _share(store, due, sharing, logits)
        return
    goals, lengths = store.goals(due), store.lengths()
    columns = _of_rows(store.rows, store.layers, store.spec.device)
    most = max(1, logits.workspace // 2 // _bytes_per_row(store))
    for band in store.bands:
        here = slice(band.first, band.stop)
        if not any(due[here]) and not any([True] if shown is None else shown[here]):
            continue
        for span in store.spans(band, most):
            goal, held = goals[span.store], lengths[span.store]
            limit = max(0, int((held - goal).max()))
            view = _view(store, span.store, columns, goal, held, logits)
            view = dataclasses.replace(view, recent=band.plan.recent, max_budget=int(goal.max()), max_victims=limit)
            view = _with_window(view, store, band, span.store, logits)
            keep, state = band.policy.select(view, store.state_of(band, span))
            insist_on_keep(keep, view, band.policy)
            store.remember(band, span, state)
            if limit > 0:
                store.compact(band, span, keep, view.lengths, torch.minimum(view.budget, view.lengths), limit)
        store.cut(band, due)


def _view(store: Store, at: slice, columns: dict[str, Tensor], goal: Tensor, held: Tensor, logits: LogitSpec) -> View:
    """Return a view of some rows of a store; what a policy's plan decides is filled in later.

    Args:
        store: settled.
        at: which of the ``layers * requests`` rows.
        columns: what :func:`_of_rows` returned.
        goal: ``[rows, H]`` slots to keep, on the host.
        held: ``[rows, H]`` slots in use, on the host.
        logits: what the model's attention does.
    """
    lengths = sent(held, store.spec.device)
    mine: dict[str, Any] = {name: column[at] for name, column in columns.items()}
    new = mine.pop("new")[:, None, None]
    rank = torch.arange(max(row.length - row.settled for row in store.rows), device=lengths.device)
    fresh = torch.where(rank < new, lengths[..., None] - new + rank, -1)
    return View(
        **store.slots(at)._asdict(),
        fresh=fresh,
        budget=sent(goal, store.spec.device),
        lengths=lengths,
        recent=0,
        max_budget=0,
        max_victims=0,
        sink_logits=None if logits.sinks is None else logits.sinks.repeat_interleave(len(store.rows), 0)[at],
        **mine,
        **_of_model(logits),
        **_of_weights(logits, range(at.start, at.stop), len(store.rows)),
    )


def _bytes_per_row(store: Store) -> int:
    """Return what the temporaries of one row take: of its slots, its window, and its fresh tokens."""
    spec, fresh = store.spec, max(row.length - row.settled for row in store.rows)
    queries = spec.num_query_heads * store.window.size * (spec.head_dim + (spec.query_dim or 0))
    tokens = spec.num_heads * fresh * (spec.head_dim + spec.value_dim)
    return spec.num_heads * store.widest * _BYTES_PER_SLOT + (queries + tokens) * store.spec.dtype.itemsize


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
    if window.lse is not None and all(row.whole(size) for row in store.rows[band.first : band.stop]):
        lse = unrolled(window.lse.flatten(0, 1)[at], places, -3, -1)[:, :, -size:]
    return dataclasses.replace(view, queries=queries, query_positions=positions, lse=lse)


def _absorbed(queries: Tensor, at: slice, requests: int, absorb: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return the queries of some of the ``layers * requests`` rows, absorbed layer by layer."""
    parts = []
    for layer in range(at.start // requests, (at.stop - 1) // requests + 1):
        start, stop = max(at.start, layer * requests), min(at.stop, (layer + 1) * requests)
        parts.append(absorb(layer, queries[start - at.start : stop - at.start]))
    return torch.cat(parts)


def _share(store: Store, due: Sequence[bool], sharing: Sequence[bool], logits: LogitSpec) -> None:
    """Evict where rows share their slots over the heads anew: each layer is written afresh, behind itself."""
    columns, (band,) = _of_rows(store.rows, store.layers, store.spec.device), store.bands
    goals, lengths = store.goals(due), store.lengths()
    for index in range(len(store.layers)):
        span = band.layer(index)
        goal, held = goals[span.store], lengths[span.store]
        view = _view(store, span.store, columns, goal, held, logits)
        view = _with_window(view, store, band, span.store, logits)
        _cut_layer(store, index, view, goal, held, sharing, [store.state_of(band, span)])
    store.cut(band, due)


def _cut_layer(
    store: Store,
    index: int,
    view: View,
    goal: Tensor,
    held: Tensor,
    sharing: Sequence[bool],
    states: Sequence[State],
) -> None:
    """Let policies choose from a view of one layer, and write what stays into its slots.

    Args:
        store: one layer of it is modified.
        index: the layer, counted within the store.
        view: of every request, each with as many queries as some policy asks for.
        goal: ``[requests, H]`` slots to keep, on the host.
        held: ``[requests, H]`` slots that the view has in use, on the host.
        sharing: which requests share their slots over the heads.
        states: of the view's slots, one a band.
    """
    masks, after = [], []
    most = max(1, view.workspace // 2 // (view.shape[1] * view.shape[2] * _BYTES_PER_SLOT))
    for band, state in zip(store.bands, states, strict=True):
        seen: list[State] = []
        for first in range(band.first, band.stop, most):
            here = slice(first, min(first + most, band.stop))
            part = _part(view, here, band, goal[here], held[here], sharing[here])
            keep, new = band.policy.select(
                part, _rows_of_state(state, slice(first - band.first, here.stop - band.first))
            )
            insist_on_keep(keep, part, band.policy)
            start = store.rows_of(index).start
            store.broken[start + here.start : start + here.stop] += keep.broken
            masks.append(keep.mask)
            seen.append(new)
        after.append(_joined(seen))
    mask, order = torch.cat(masks), view.order.to(torch.int64)
    kept = torch.minimum(goal, held)
    if any(sharing):  # where slots are shared, and nowhere else, the host must know what was decided
        kept = torch.where(on_host(list(sharing), torch.bool)[:, None], mask.sum(-1).cpu(), kept)
    survivors = compress(order, mask.gather(-1, order), int(kept.max()), -1)
    store.fill(index, survivors, view.keys, view.values, view.positions, after, kept)


def _part(view: View, here: slice, band: Band, goal: Tensor, held: Tensor, sharing: Sequence[bool]) -> View:
    """Return some requests of a view of one layer, as their policy asks to see them."""
    size, shared = band.plan.window, None
    most, victims = int(goal.max()), int((held - goal).max())
    if any(sharing):  # a head may keep all that it holds, or next to nothing
        shared = sent(on_host(list(sharing), torch.bool), view.positions.device)
        most = victims = int(held.max())
    return dataclasses.replace(
        _rows_of(view, here),
        recent=band.plan.recent,
        max_budget=most,
        max_victims=victims,
        sharing=shared,
        queries=None if view.queries is None or not size else view.queries[here, :, -size:],
        query_positions=None if view.query_positions is None or not size else view.query_positions[here, -size:],
        lse=None if view.lse is None or not size else view.lse[here, :, -size:],
    )


def _rows_of_state(state: State, at: slice) -> State:
    return tuple(
        held and StageState(tuple(t[at] for t in held.slots), tuple(t[at] for t in held.rows)) for held in state
    )


def _joined(parts: Sequence[State]) -> State:
    """Return the states of all rows, given those of some after others."""
    if len(parts) == 1:
        return parts[0]
    joined: list[StageState | None] = []
    for stages in zip(*parts, strict=True):
        known = [one for one in stages if one is not None]
        slots, rows = zip(*(one.slots for one in known), strict=True), zip(*(one.rows for one in known), strict=True)
        joined.append(StageState(tuple(map(torch.cat, slots)), tuple(map(torch.cat, rows))) if known else None)
    return tuple(joined)


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
    device, old, rows = store.spec.device, store.longest_in(index), store.rows_of(index)
    held = store.lengths()[rows] + on_host(counts)[:, None]
    goal = torch.minimum(held, store.goals([True] * len(after))[rows])
    positions, order, fresh = _slots_of_turn(store, index, keys.shape[2], counts)
    window, at = store.window.after(counts, [row.seen for row in store.rows])
    asked, asked_positions = oldest_first(store.window.queries[index], window, at)
    if logits.absorb is not None and store.window.size:
        asked = logits.absorb(index, asked)
    lse = None
    if store.window.lse is not None and all(
        row.whole(plan.window) for row, plan in zip(after, store.plans, strict=True)
    ):
        lse = unrolled(store.window.lse[index], at, -3, -1)
    columns = _of_rows(after, store.layers[index : index + 1], device)
    del columns["new"]
    view = View(
        keys=keys,
        values=values,
        positions=positions,
        order=order,
        fresh=fresh,
        budget=sent(goal, device),
        lengths=sent(held, device),
        recent=0,
        max_budget=0,
        max_victims=0,
        queries=asked,
        query_positions=asked_positions,
        lse=lse,
        sink_logits=None if logits.sinks is None else logits.sinks.expand(len(after), -1),
        **columns,
        **_of_model(logits),
        **_of_weights(logits, range(len(after)), len(after)),
    )
    states = [_state_of_turn(store, band, band.layer(index), old, keys.shape[2] - old) for band in store.bands]
    sharing = store.sharing(after, store.over_budget(after))
    _cut_layer(store, index, view, goal, held, sharing, states)


def _slots_of_turn(store: Store, index: int, size: int, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return positions, order and fresh slots of what a layer holds joined with a turn's tokens."""
    device, heads, old = store.spec.device, store.spec.num_heads, store.longest_in(index)
    rows = store.rows_of(index)
    width, slots = size - old, store.slots(rows)
    count = on_device(counts, device)[:, None, None]
    length, seen = sent(store.lengths()[rows], device)[..., None], store.column("seen")[:, None, None]
    unsettled = (store.column("length") - store.column("settled"))[:, None, None]
    pad = width - count
    slot, column = torch.arange(size, device=device), torch.arange(width, device=device)
    new = torch.where(column >= pad, seen + column - pad, -1).expand(-1, heads, -1)
    positions = torch.cat([slots.positions[..., :old], new.to(torch.int32)], -1)
    # In position order: the old slots, the new ones, then whatever is free, each slot once.
    held = torch.cat([slots.order[..., :old].to(torch.int64), new.new_zeros(len(counts), heads, width)], -1)
    free = slot - length - count
    free = torch.where(free < old - length, length + free, free + length)
    order = torch.where(slot < length, held, torch.where(slot < length + count, old + pad + slot - length, free))
    settled = length - unsettled
    rank = torch.arange(max(row.length - row.settled for row in store.rows) + width, device=device)
    fresh = torch.where(rank < unsettled, settled + rank, old + pad + rank - unsettled)
    fresh = torch.where(rank < unsettled + count, fresh, -1)
    return positions, order.to(torch.int32), fresh


def _state_of_turn(store: Store, band: Band, span: Span, old: int, width: int) -> State:
    """Return the state of a layer's slots, followed by that of tokens that nobody has seen."""
    empty = band.policy.init(dataclasses.replace(store.spec, capacity=width), band.count)
    joined: list[StageState | None] = []
    for held, new in zip(store.state_of(band, span), empty, strict=True):
        if held is None or new is None:
            joined.append(None)
            continue
        pairs = zip(held.slots, new.slots, strict=True)
        joined.append(StageState(tuple(torch.cat([a[:, :, :old], b], 2) for a, b in pairs), held.rows))
    return tuple(joined)


def _of_rows(rows: Sequence[Row], layers: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return what happened to each row, repeated for each layer: fields of the view, and how many slots are new."""
    names = {
        "seen": "seen",
        "prompt": "prompt_length",
        "evictions": "evictions",
        "request": "request",
        "seed": "seed",
    }
    columns = {to: [getattr(row, of) for row in rows] for of, to in names.items()}
    columns["new"] = [row.length - row.settled for row in rows]
    found = {name: on_device(column, device).repeat(len(layers)) for name, column in columns.items()}
    found["layer"] = on_device(layers, device).repeat_interleave(len(rows))
    return found


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


def _of_weights(logits: LogitSpec, rows: Sequence[int], requests: int) -> dict[str, Any]:
    """Return what rows, of the ``layers * requests`` ones, are shown of their model's weights."""
    found: dict[str, Any] = {}
    if logits.output is not None:
        found["output"] = OutputProjection(logits.output, tuple(row // requests for row in rows))
    if logits.rotary is not None:
        found["rotary"] = logits.rotary.expand(len(rows), -1)
    return found


def _rows_of(view: View, at: slice) -> View:
    """Return some rows of a view."""
    fields = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
    some: dict[str, Any] = {name: value[at] for name, value in fields.items() if isinstance(value, _BY_ROW)}
    return dataclasses.replace(view, **some)
