"""Whether the parts of a store agree with each other: :func:`check_integrity`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from kvpolicy.errors import IntegrityError
from kvpolicy.host import insist
from kvpolicy.window import oldest_first

if TYPE_CHECKING:
    from kvpolicy.policy import EvictionPolicy
    from kvpolicy.row import Row
    from kvpolicy.scores import Keep
    from kvpolicy.store import Store
    from kvpolicy.view import View

__all__ = ["check_integrity", "insist_on_keep"]


def check_integrity(store: Store) -> None:
    """Check that counts, positions, order, window and state of a store agree; modifies nothing.

    Reads every position, so that it waits for the device: for tests and bug reports.

    Raises:
        IntegrityError: two parts contradict each other; the message says which, and where.
    """
    _check_rows(store)
    _check_tensors(store)
    positions, order = store.settled_positions().cpu(), store.order.cpu().to(torch.int64)
    lengths = store.lengths().view(len(store.layers), len(store.rows), -1).tolist()
    for index, layer in enumerate(store.layers):
        for r, row in enumerate(store.rows):
            for head in range(store.spec.num_heads):
                where = f"layer {layer}, request {r}, head {head}"
                held = replace(row, length=lengths[index][r][head])
                _check_head(where, held, *(store.of_head(t, index, r, head) for t in (positions, order)))
            _check_window(store, index, r)


def _check_rows(store: Store) -> None:
    capacity = store.widest
    for r, row in enumerate(store.rows):
        where = f"request {r}"
        if not 0 <= row.length <= capacity:
            _refuse(where, f"length={row.length}, and there are {capacity} slots")
        if not 0 <= row.settled <= row.length:
            _refuse(where, f"settled={row.settled} of length={row.length} slots")
        for name in ("length", "prompt", "decoded", "intact"):
            if not 0 <= getattr(row, name) <= row.seen:
                _refuse(where, f"{name}={getattr(row, name)}, and seen={row.seen}")
        if row.seen - row.intact > row.length:
            _refuse(
                where,
                f"every token from intact={row.intact} to seen={row.seen} is there, more than length={row.length}",
            )


def _check_tensors(store: Store) -> None:
    spec, window = store.spec, store.window
    lead = (len(store.layers), len(store.rows))
    slots = (*lead, *store.slot_axes)
    size = store.window.size
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("positions", store.positions, slots, torch.int32),
        ("order", store.order, slots, torch.int32),
        ("broken", store.broken, (lead[0] * lead[1],), torch.int64),
        (
            "window.queries",
            window.queries,
            (*lead, spec.num_query_heads, size, spec.query_dim or spec.head_dim),
            spec.dtype,
        ),
        ("window.positions", window.positions, (*lead, size), torch.int32),
    ]
    if window.lse is not None:
        precise = torch.float64 if spec.dtype == torch.float64 else torch.float32
        expected.append(("window.lse", window.lse, (*lead, spec.num_query_heads, size), precise))
    if store.arenas:  # else keys and values are somebody else's
        expected += [
            ("keys", store.keys, (*slots, spec.head_dim), spec.dtype),
            ("values", store.values, (*slots, spec.value_dim), spec.dtype),
        ]
    for number, band in enumerate(store.bands):
        rows, name = band.layers * band.count, f"bands[{number}].state"
        for stage, held in enumerate(band.state):
            if held is not None:
                expected += [
                    (f"{name}[{stage}].slots", t, (rows, *slots[2:], *t.shape[len(slots) - 1 :]), t.dtype)
                    for t in held.slots
                ]
                expected += [(f"{name}[{stage}].rows", t, (rows, *t.shape[1:]), t.dtype) for t in held.rows]
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape:
            _refuse(name, f"shape {tuple(tensor.shape)}, and the store's sizes make it {shape}")
        if tensor.dtype != dtype:
            _refuse(name, f"{tensor.dtype}, and should be {dtype}")
        if tensor.device != store.broken.device:
            _refuse(name, f"on {tensor.device}, and the keys are on {store.broken.device}")
        if not tensor.is_contiguous() and not (spec.values_in_keys and name == "values"):
            _refuse(name, "not contiguous, and slots are moved as lines of memory")


def _check_head(where: str, row: Row, positions: Tensor, order: Tensor) -> None:
    used, free = positions[: row.length], positions[row.length :]
    if bool((free != -1).any()):
        slot = row.length + int((free != -1).nonzero()[0])
        _refuse(
            where,
            f"slot {slot} lies behind length={row.length}, and has position {int(positions[slot])}",
        )
    outside = (used < 0) | (used >= row.seen)
    if bool(outside.any()):
        slot = int(outside.nonzero()[0])
        _refuse(
            where,
            f"slot {slot} is in use and has position {int(used[slot])}, outside [0, seen={row.seen})",
        )
    ascending = used.sort().values
    twice = ascending[1:][ascending[1:] == ascending[:-1]].tolist()
    if twice:
        _refuse(where, f"position {twice[0]} is held by two slots")
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        _refuse(where, f"order is no permutation of {len(order)} slots: {order.tolist()}")
    if not torch.equal(positions[order][: row.length], ascending):
        _refuse(
            where,
            f"in order, positions are {positions[order].tolist()}; they should ascend, free slots last",
        )
    newest = int((used >= row.intact).sum())
    if newest != row.seen - row.intact:
        _refuse(
            where,
            f"{newest} tokens from intact={row.intact} on are there, "
            f"and should be all {row.seen - row.intact} up to seen={row.seen}",
        )


def _check_window(store: Store, index: int, request: int) -> None:
    window, seen = store.window, store.rows[request].seen
    if not window.size:
        return
    where = f"layer {store.layers[index]}, request {request}"
    if not 0 <= window.at[request] < window.size:
        _refuse(where, f"the next query goes to place {window.at[request]} of {window.size}")
    one = slice(request, request + 1)
    held = oldest_first(window.queries[index, one], window.positions[index, one], window.at[one])
    positions = held[1][0].tolist()
    present = [position for position in positions if position != -1]
    expected = list(range(seen - len(present), seen))
    if positions != [-1] * (window.size - len(present)) + expected:
        _refuse(
            where,
            f"the window's queries have positions {positions}, oldest first; after seen={seen} tokens "
            f"they should be absent, then {expected}",
        )


def _refuse(where: str, what: str) -> NoReturn:
    raise IntegrityError(f"{where}: {what}")


def insist_on_keep(keep: Keep, view: View, policy: EvictionPolicy) -> None:
    """Stop a policy whose answer would corrupt slots; on a GPU, without waiting.

    Args:
        keep: what the policy said.
        view: what it was shown.
        policy: to be named.

    Raises:
        IntegrityError: in some head another number of slots than ``min(budget, tokens)`` would
            stay, a free slot or not all of the last tokens, or the victims are others than those
            that the mask drops; nothing was changed.
    """
    kept, found = torch.minimum(view.budget, view.lengths), keep.mask.sum(-1)
    right = found == kept
    if view.sharing is not None:
        right |= (view.sharing & (found.sum(-1) == kept.sum(-1)))[:, None]
    right = right.all() & (keep.mask <= view.valid).all()
    right &= (keep.mask | view.candidates | ~view.valid).all()
    if keep.victims is not None:
        size = view.shape[2]
        slots = torch.where(keep.victims < 0, size, keep.victims)  # padding goes to a place that is cut off
        named = torch.zeros(*slots.shape[:-1], size + 1, dtype=torch.bool, device=slots.device)
        named = named.scatter(-1, slots, True)[..., :size]
        right &= (named == (view.valid & ~keep.mask)).all()
    text = (
        f"{policy!r} did not keep exactly min(budget, tokens) slots of every head, the last {view.recent} tokens among "
        "them, or named other victims: run kvpolicy.testing.check_policy on it"
    )
    insist(right, IntegrityError(text))
