"""The slots of a cache: preallocated, never grown, compacted in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.band import Band, Span, bands_of
from kvpolicy.compaction import move_, moves, reorder_
from kvpolicy.errors import UsageError
from kvpolicy.host import on_device, on_host
from kvpolicy.policy import EvictionPolicy, LayerPlan
from kvpolicy.row import Row
from kvpolicy.scores import Keep
from kvpolicy.view import LayerSpec, State
from kvpolicy.window import QueryWindow

__all__ = ["Slots", "Store"]


class Slots(NamedTuple):
    """Show the slots of some rows.

    Attributes:
        keys: ``[rows, H, S, D]``; see :class:`~kvpolicy.scattered.Scattered` for what does not lie in one block.
        values: ``[rows, H, S, Dv]``.
        positions: ``[rows, H, S]`` int32, -1 where free.
        order: ``[rows, H, S]`` int32, the slots in position order, free slots last.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    order: Tensor


class Store:
    """Hold the slots of layers of equal shape and budget, in one arena, for a batch of requests.

    Slots ``[0, length)`` of a row are in use, in every head and layer; ``positions`` says which
    token each holds. Positions of slots appended since the last eviction stay implicit until
    :meth:`settle`: they are consecutive, and end at ``seen - 1``. Every tensor keeps its address
    for the life of the store.

    Args:
        policy: what every request follows, or one for each request.
        plan: budget, capacity, interval, recent and window of each layer, or one for each request.
        spec: heads, sizes, dtype and device of each layer.
        layers: which layers of the model these are.
        rows: one record a request.
        drafts: tokens that may be taken back at once; the slots and the window hold as many more.
        lse: keep the log-sum-exp of each query of the window, which the engine's kernel returns; see
            :meth:`observe`.

    Attributes:
        plans: one a request.
        bands: the requests that follow one policy, and what it remembers.
        spec: heads, sizes, dtype and device of each layer.
        layers: which layers of the model these are.
        rows: one record a request.
        keys: ``[layers, requests, H, C, D]``.
        values: ``[layers, requests, H, C, Dv]``; a part of ``keys`` where the spec says so.
        positions: ``[layers, requests, H, C]`` int32, -1 where free.
        order: ``[layers, requests, H, C]`` int32, the slots in position order, free slots last.
        window: the newest queries.
        broken: ``[layers * requests]`` int64, guarded tokens that had to go, for the receipt.
    """

    def __init__(
        self,
        policy: EvictionPolicy | Sequence[EvictionPolicy],
        plan: LayerPlan | Sequence[LayerPlan],
        spec: LayerSpec,
        layers: Sequence[int],
        rows: Sequence[Row],
        drafts: int = 0,
        lse: bool = False,
    ) -> None:
        policies = policy if isinstance(policy, Sequence) else [policy] * len(rows)
        self.plans = tuple(plan) if isinstance(plan, Sequence) else (plan,) * len(rows)
        if spec.capacity != max(one.capacity for one in self.plans) + drafts:
            raise UsageError(f"a layer of {spec.capacity} slots cannot follow {plan} with {drafts} drafts")
        self.spec, self.layers, self.rows, self.drafts = spec, tuple(layers), list(rows), drafts
        self.bands: tuple[Band, ...] = bands_of(policies, self.plans, len(self.layers))
        self._ends: tuple[Tensor, Tensor, Tensor] | None = None
        lead, device = (len(self.layers), len(self.rows)), spec.device
        asked = max(one.window for one in self.plans)
        size = asked + drafts if asked else 0
        with torch.inference_mode(False):  # a cache may outlive the mode in which it is made
            self._allocate(lead)
            query_dim = spec.query_dim or spec.head_dim
            self.window = QueryWindow(*lead, spec.num_query_heads, size, query_dim, spec.dtype, device, lse)
            self.broken = torch.zeros(lead[0] * lead[1], dtype=torch.int64, device=device)

    def _allocate(self, lead: tuple[int, int]) -> None:
        """Allocate the slots of ``lead`` layers and requests, and what the policies remember of them."""
        spec, device = self.spec, self.spec.device
        slots = (*lead, spec.num_heads, spec.capacity)
        self.keys = torch.zeros(*slots, spec.head_dim, dtype=spec.dtype, device=device)
        self.values = self.keys[..., : spec.value_dim]
        if not spec.values_in_keys:
            self.values = torch.zeros(*slots, spec.value_dim, dtype=spec.dtype, device=device)
        self.positions = torch.full(slots, -1, dtype=torch.int32, device=device)
        self.order = torch.arange(spec.capacity, dtype=torch.int32, device=device).expand(slots).contiguous()
        for band in self.bands:
            band.state = band.begin(spec)

    # What it holds

    @property
    def uniform(self) -> bool:
        """Return whether every row uses the same number of slots."""
        return all(row.length == self.rows[0].length for row in self.rows)

    @property
    def longest(self) -> int:
        """Return the slots in use of the longest row."""
        return max(row.length for row in self.rows)

    def longest_in(self, index: int) -> int:
        """Return the slots in use of the longest row of one layer, and of its longest head."""
        return self.longest

    @property
    def ragged(self) -> bool:
        """Return whether heads may have slots of different numbers."""
        return False

    @property
    def widest(self) -> int:
        """Return the slots that a view of a row shows of each head."""
        return self.spec.capacity

    @property
    def slot_axes(self) -> tuple[int, ...]:
        """Return the axes of slots, behind layers and requests."""
        return self.spec.num_heads, self.spec.capacity

    @staticmethod
    def of_head(x: Tensor, index: int, request: int, head: int) -> Tensor:
        """Return the slots of one head of a tensor such as ``positions``."""
        return x[index, request, head]

    def rows_of(self, index: int) -> slice:
        """Return where the rows of a layer are among all ``layers * requests`` of them."""
        return slice(index * len(self.rows), (index + 1) * len(self.rows))

    def column(self, name: str) -> Tensor:
        """Return one count of every row, ``[requests]`` int64 on the store's device."""
        return on_device([getattr(row, name) for row in self.rows], self.spec.device)

    @property
    def arenas(self) -> tuple[Tensor, ...]:
        """Return the memory of keys and values: one tensor where values lie in keys."""
        return (self.keys,) if self.spec.values_in_keys else (self.keys, self.values)

    def tensors(self) -> list[Tensor]:
        """Return every tensor of slots, window and policy state."""
        held = [t for band in self.bands for t in band.tensors()]
        return [
            *self.arenas,
            self.positions,
            self.order,
            *self.window.tensors(),
            *held,
        ]

    def nbytes(self) -> int:
        """Return the bytes allocated for slots, window and policy state.

        For each layer and request, with ``C`` slots, ``e`` bytes an element and a window of ``W``:
        ``H * C * (D + Dv) * e`` for keys and values, ``8 * H * C`` for positions and order,
        ``Hq * W * D * e + 4 * W`` for the window where there is one, ``4 * Hq * W`` more (twice that
        for a float64 cache) where it holds log-sum-exps, and what the stages remember.
        Counters, a few integers a row, are not counted.
        """
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def kept(self) -> dict[int, Tensor]:
        """Return the kept positions of each layer, ascending, -1 behind the last: a copy on the host."""
        self.settle()
        return {layer: self.in_order(index).cpu() for index, layer in enumerate(self.layers)}

    # What an eviction reads

    def slots_of(self, request: int) -> float:
        """Return the slots in use of one request: a sum over layers, of each a mean over heads."""
        return float(len(self.layers) * self.rows[request].length)

    def lengths(self) -> Tensor:
        """Return the slots in use of each head, ``[layers * requests, H]`` int64 on the host."""
        return self._by_row([row.length for row in self.rows])

    def goals(self, due: Sequence[bool]) -> Tensor:
        """Return the slots that each head is to keep, ``[layers * requests, H]`` int64 on the host.

        Args:
            due: which requests are cut to their budget; the others keep what they hold.
        """
        pairs = zip(self.plans, self.rows, due, strict=True)
        return self._by_row([plan.budget if is_due else row.length for plan, row, is_due in pairs])

    def _by_row(self, counts: Sequence[int]) -> Tensor:
        return on_host(counts).repeat(len(self.layers))[:, None].expand(-1, self.spec.num_heads)

    def over_budget(self, rows: Sequence[Row]) -> list[bool]:
        """Return which rows, given as they were counted, hold more than their budget."""
        return [row.length > plan.budget for row, plan in zip(rows, self.plans, strict=True)]

    def sharing(self, rows: Sequence[Row], due: Sequence[bool]) -> list[bool]:
        """Return which of the rows that are due have their slots shared over the heads anew: none."""
        return [False] * len(rows)

    def slots(self, at: slice) -> Slots:
        """Return the slots of some of the ``layers * requests`` rows, as a view shows them."""
        return Slots(*(t.flatten(0, 1)[at] for t in (self.keys, self.values, self.positions, self.order)))

    def in_use(self, index: int, more: int = 0) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, ``[requests, H, S, D]``, up to ``more`` slots behind the longest row."""
        size = self.longest + more
        return self.keys[index, :, :, :size], self.values[index, :, :, :size]

    def in_order(self, index: int) -> Tensor:
        """Return the positions of a layer's slots in use, ascending: ``[requests, H, S]``, -1 behind the last."""
        at = self.rows_of(index)
        slots, longest = self.slots(at), int(self.lengths()[at].max())
        return slots.positions.gather(-1, slots.order[..., :longest].to(torch.int64))

    def state_of(self, band: Band, span: Span) -> State:
        """Return what a policy remembers of some rows, its slots in the places of :meth:`slots`."""
        return band.state_of(span)

    def remember(self, band: Band, span: Span, state: State) -> None:
        """Take over what a policy remembers of some rows; modifies the band's tensors."""
        band.remember(span, state)

    def spans(self, band: Band, most: int) -> Iterator[Span]:
        """Yield all rows of a band, at most ``most`` at once, each time some that one view can show."""
        return band.spans(most)

    # Writing tokens

    def append(
        self, index: int, keys: Tensor, values: Tensor, counts: Sequence[int], behind: Sequence[int] | None = None
    ) -> None:
        """Write new tokens behind the last slot of each row; :meth:`advance` makes them count.

        Modifies ``keys`` and ``values`` of one layer.

        Args:
            index: the layer, counted within this store.
            keys: ``[requests, H, T, D]``, left-padded.
            values: ``[requests, H, T, Dv]``.
            counts: new tokens of each row, which are its last columns.
            behind: how many slots of each row stay before them, where that is not ``length``.

        Raises:
            UsageError: they do not fit; nothing was written.
        """
        width = keys.shape[2]
        used = self.insist_on_room(counts, behind)
        if len(set(used)) == 1 and all(count == width for count in counts):
            self.keys[index, :, :, used[0] : used[0] + width].copy_(keys)
            self.values[index, :, :, used[0] : used[0] + width].copy_(values)
            return
        if width == 1 and all(counts) and behind is None:
            at = self._last_slots()
            self.keys[index].index_put_(at, keys[:, :, 0])
            self.values[index].index_put_(at, values[:, :, 0])
            return
        for r, (length, count) in enumerate(zip(used, counts, strict=True)):
            self.keys[index, r, :, length : length + count].copy_(keys[r, :, width - count :])
            self.values[index, r, :, length : length + count].copy_(values[r, :, width - count :])

    def insist_on_room(self, counts: Sequence[int], behind: Sequence[int] | None = None) -> list[int]:
        """Return how many slots of each row stay before new tokens; the arguments are those of :meth:`append`.

        Raises:
            UsageError: the new tokens do not fit behind them.
        """
        used = [row.length for row in self.rows] if behind is None else list(behind)
        if any(length + count > self.spec.capacity for length, count in zip(used, counts, strict=True)):
            why = "it was not evicted when it was due"
            if any(plan.interval is None for plan in self.plans):
                why = "the policy evicts at the end of a turn only; bind it with a larger max_new_tokens"
            raise UsageError(
                f"a row holds {max(used)} of {self.spec.capacity} slots and cannot take {max(counts)} more: {why}"
            )
        return used

    def _last_slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return indices of the first free slot of every row and head; made once a step."""
        if self._ends is None:
            device = self.spec.device
            rows, heads = (
                torch.arange(len(self.rows), device=device),
                torch.arange(self.spec.num_heads, device=device),
            )
            self._ends = (rows[:, None], heads[None], self.column("length")[:, None])
        return self._ends

    def fill(
        self,
        index: int,
        survivors: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        states: Sequence[State],
        kept: Tensor,
    ) -> None:
        """Replace the slots of one layer by survivors of a larger, temporary layer.

        Modifies every tensor of one layer but the window; :meth:`advance` makes it count.

        Args:
            index: the layer, counted within this store.
            survivors: ``[requests, H, N]`` slots of the temporary layer in position order, -1 padded.
            keys: ``[requests, H, S, D]``.
            values: ``[requests, H, S, Dv]``.
            positions: ``[requests, H, S]``.
            states: of the temporary layer, one a band.
            kept: ``[requests, H]`` int64 on the host, how many survivors each head has.
        """
        used, size = survivors >= 0, survivors.shape[-1]
        self.keys[index, :, :, :size].copy_(_picked(keys, survivors))
        self.values[index, :, :, :size].copy_(_picked(values, survivors))
        self.positions[index].fill_(-1)
        self.positions[index, :, :, :size].copy_(torch.where(used, _picked(positions, survivors), -1))
        self.order[index].copy_(torch.arange(self.spec.capacity, device=self.spec.device))
        for band, state in zip(self.bands, states, strict=True):
            here, mine = band.layer(index).band, survivors[band.first : band.stop]
            for held_stage, new in zip(band.state, state, strict=True):
                if held_stage is None or new is None:
                    continue
                for held, given in zip(held_stage.slots, new.slots, strict=True):
                    mask = (mine >= 0).view(*mine.shape, *[1] * (given.dim() - 3))
                    held[here].zero_()
                    held[here, :, :size].copy_(torch.where(mask, _picked(given, mine), 0))
                for held, given in zip(held_stage.rows, new.rows, strict=True):
                    held[here].copy_(given)

    def observe(self, index: int, queries: Tensor, counts: Sequence[int], lse: Tensor | None = None) -> None:
        """Write the newest queries of one layer; :meth:`advance` makes them count.

        Args:
            index: the layer, counted within this store.
            queries: ``[requests, Hq, T, D]``, left-padded.
            counts: new queries of each row, which are the last columns.
            lse: ``[requests, Hq, T]``, for a store that holds it: the natural logarithm of the sum of
                ``exp(logit)`` over all that each query saw, its own token, what was not evicted
                before, and the sink logit among it; scaled and capped as the model's logits are.

        Raises:
            UsageError: a store that holds log-sum-exps is given none, or the reverse.
        """
        self.window.write(index, queries, counts, lse)

    def advance(self, rows: Sequence[Row]) -> None:
        """Make what was written to every layer count.

        Args:
            rows: every row after it; see :meth:`Row.advanced` and :meth:`Row.evicted`.
        """
        counts = [after.seen - row.seen for row, after in zip(self.rows, rows, strict=True)]
        self.window.advance(counts, [row.seen for row in self.rows])
        self.rows = list(rows)
        self._ends = None

    # Evicting

    def settled_positions(self) -> Tensor:
        """Return ``positions`` as :meth:`settle` would leave them; modifies nothing."""
        slots = torch.arange(self.spec.capacity, device=self.spec.device)
        length, settled, seen = (self.column(name)[:, None, None] for name in ("length", "settled", "seen"))
        new = (slots >= settled) & (slots < length)
        return torch.where(new, (slots + seen - length).to(self.positions.dtype), self.positions)

    def settle(self) -> None:
        """Write the positions of slots appended since the last eviction.

        Modifies ``positions``; ``order`` holds already, since such slots are in position order.
        """
        first = min(row.settled for row in self.rows)
        slots = torch.arange(first, self.longest, device=self.spec.device)
        length, settled, seen = (self.column(name)[:, None, None] for name in ("length", "settled", "seen"))
        new = (slots >= settled) & (slots < length)
        behind = self.positions[..., first : self.longest]
        behind.copy_(torch.where(new, (slots + seen - length).to(torch.int32), behind))

    def compact(self, band: Band, span: Span, keep: Keep, lengths: Tensor, kept: Tensor, limit: int) -> None:
        """Drop what ``keep`` does not name: survivors of the tail move into the holes.

        Modifies keys, values, positions, order and slot-aligned state of some rows, in place, in
        ``O(evicted)`` bytes of keys and values; assigning ``rows`` makes it count.

        Args:
            band: whose rows.
            span: which of them.
            keep: for these rows.
            lengths: ``[rows, H]`` slots in use.
            kept: ``[rows, H]`` survivors.
            limit: the largest ``lengths - kept``, known on the host.
        """
        at = span.store
        positions, order = self.positions.flatten(0, 1)[at], self.order.flatten(0, 1)[at]
        source, target = moves(keep.mask, keep.victims, lengths, kept, limit)
        self._move(at, source, target)
        held = [t[span.band] for t in band.slots()]
        move_([positions, *held], source, target)
        first, last = max(0, min(row.length for row in self.rows) - limit), self.longest
        reorder_(order[..., :last], keep.mask[..., :last], kept, first, source, target)
        free = torch.arange(first, last, device=positions.device) >= kept[..., None]
        positions[..., first:last].masked_fill_(free, -1)
        for tensor in held:  # the next token of a slot begins with nothing
            tensor[:, :, first:last].masked_fill_(free.view(*free.shape, *[1] * (tensor.dim() - 3)), 0)
        self.broken[at] += keep.broken

    def _move(self, at: slice, source: Tensor, target: Tensor) -> None:
        """Move keys and values of some rows to other slots of their heads; see :func:`~kvpolicy.compaction.move_`."""
        move_([arena.flatten(0, 1)[at] for arena in self.arenas], source, target)

    def cut(self, band: Band, due: Sequence[bool]) -> None:
        """Count an eviction of the rows of a policy: those that are due were cut, the others were seen by it."""
        for r in range(band.first, band.stop):
            row = self.rows[r]
            self.rows[r] = row.evicted(band.plan.budget if due[r] else row.length, band.plan.recent)

    def cut_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Return rows of a turn, given as they were counted, as they are once :meth:`fill` has cut them."""
        pairs = zip(rows, self.plans, strict=True)
        return [row.evicted(min(row.length, plan.budget), plan.recent) for row, plan in pairs]

    # Undoing, reordering, starting again

    def crop(self, counts: Sequence[int]) -> None:
        """Forget the newest tokens of each row, as if they had never been seen.

        Modifies every tensor of the store as far as needed. Attention that later evictions have
        already accumulated from these tokens stays.

        Args:
            counts: tokens of each row to forget.

        Raises:
            UsageError: tokens so old that some heads have evicted some of them; nothing was changed.
        """
        self.check_crop(counts)
        left = [row.length - count for row, count in zip(self.rows, counts, strict=True)]
        if any(length < row.settled for row, length in zip(self.rows, left, strict=True)):
            self._drop_newest(counts, left)
        for row, count, length in zip(self.rows, counts, left, strict=True):
            row.seen -= count
            row.length, row.settled = length, min(row.settled, length)
            row.decoded, row.prompt = max(0, row.decoded - count), min(row.prompt, row.seen)
        # settle() may have written positions of tokens that the policy has not seen: they go, too.
        self.positions.masked_fill_(self.positions >= self.column("seen")[:, None, None], -1)
        self.window.crop(counts, [row.seen for row in self.rows])
        self._ends = None

    def check_crop(self, counts: Sequence[int]) -> None:
        """Raise what :meth:`crop` would; modifies nothing."""
        certain = min(row.seen - row.intact for row in self.rows)
        if not all(0 <= count <= row.seen - row.intact for row, count in zip(self.rows, counts, strict=True)):
            raise UsageError(
                f"{max(counts)} tokens cannot be taken back: only the newest {certain} are certainly still in every "
                "head; take back fewer, or reset() and begin again"
            )

    def _drop_newest(self, counts: Sequence[int], left: Sequence[int]) -> None:
        self.settle()
        heads, layers = self.spec.num_heads, len(self.layers)
        below = self.column("seen") - torch.tensor(counts, device=self.spec.device)
        positions = self.positions.flatten(0, 1)
        mask = (positions >= 0) & (positions < below.repeat(layers)[:, None, None])
        lengths = self.column("length").repeat(layers)[:, None].expand(-1, heads)
        kept = torch.tensor(left, device=self.spec.device).repeat(layers)[:, None].expand(-1, heads)
        none_broken = torch.zeros_like(self.broken)
        for band in self.bands:
            for span in band.spans(len(none_broken)):
                at = span.store
                keep = Keep(mask[at], None, none_broken[at])
                self.compact(band, span, keep, lengths[at], kept[at], max(counts))

    def reorder(self, requests: Tensor) -> None:
        """Replace every row by the one that ``requests`` names, as beam search does.

        Modifies every tensor, in place.

        Args:
            requests: ``[requests]`` integers.

        Raises:
            UsageError: the number of rows would change, or a row that does not exist is named.
        """
        self.check_reorder(requests)
        named = requests.tolist()
        self._copy_rows(self, named)
        self.rows = [replace(self.rows[r]) for r in named]
        self._ends = None

    def check_reorder(self, requests: Tensor) -> None:
        """Raise what :meth:`reorder` would; modifies nothing."""
        named = requests.tolist()
        if len(named) != len(self.rows) or not all(0 <= r < len(self.rows) for r in named):
            raise UsageError(f"reorder({named}): name one of the {len(self.rows)} rows for each of them")
        if any(not all(band.first <= r < band.stop for r in named[band.first : band.stop]) for band in self.bands):
            raise UsageError(
                f"reorder({named}): a row can only become one that follows the same policy; give the beams of a prompt "
                "one policy"
            )

    def fork(self, requests: Sequence[int]) -> Store:
        """Return a new store whose rows are copies of some rows of this one; modifies nothing.

        Args:
            requests: which, each as often as it is named.
        """
        policies = [self._band_of(r).policy for r in requests]
        plans, rows = [self.plans[r] for r in requests], [replace(self.rows[r]) for r in requests]
        capacity = max(plan.capacity for plan in plans) + self.drafts
        spec = replace(self.spec, capacity=capacity)
        new = Store(policies, plans, spec, self.layers, rows, self.drafts, self.window.lse is not None)
        new._copy_rows(self, requests)
        return new

    def _band_of(self, request: int) -> Band:
        return next(band for band in self.bands if band.first <= request < band.stop)

    def _copy_rows(self, source: Store, requests: Sequence[int]) -> None:
        """Replace the tensors of every row by those of the rows that are named of a store, which may be this one.

        Slots in use lie at the front, so a store with fewer slots, whose rows never use more, takes them all.
        """
        at, size = torch.tensor(list(requests), device=self.spec.device), self.spec.capacity
        for mine, theirs in zip((*self.arenas, self.positions), (*source.arenas, source.positions), strict=True):
            mine.copy_(theirs.index_select(1, at)[:, :, :, :size])
        slots = torch.arange(size, device=self.spec.device, dtype=self.order.dtype)
        used = torch.tensor([source.rows[r].length for r in requests], device=self.spec.device)[:, None, None]
        self.order.copy_(torch.where(slots < used, source.order.index_select(1, at)[..., :size], slots))
        layers = len(self.layers)
        _by_layer(self.broken, layers).copy_(_by_layer(source.broken, layers).index_select(1, at))
        self.window.copy_rows(source.window, at)
        for band in self.bands:
            named = requests[band.first : band.stop]
            origins = [source._band_of(r) for r in named]
            slot_aligned = {id(tensor) for tensor in band.slots()}
            for number, mine in enumerate(band.tensors()):
                parts = [
                    _by_layer(origin.tensors()[number], layers)[:, r - origin.first]
                    for origin, r in zip(origins, named, strict=True)
                ]
                whole = torch.stack(parts, 1).flatten(0, 1)
                mine.copy_(whole[:, :, :size] if id(mine) in slot_aligned else whole)

    def reset(self) -> None:
        """Forget everything but the requests' names and seeds; modifies every tensor, in place."""
        self.positions.fill_(-1)
        self.order.copy_(torch.arange(self.spec.capacity, device=self.spec.device))
        self.broken.zero_()
        self.window.reset()
        for band in self.bands:
            band.remember(Span(slice(None), slice(None)), band.policy.init(self.spec, band.layers * band.count))
        self.rows = [Row(request=row.request, seed=row.seed) for row in self.rows]
        self._ends = None

    def check_integrity(self) -> None:
        """Check that the parts of this store agree with each other; modifies nothing.

        Raises:
            IntegrityError: they contradict each other; the message says what, and where.
        """
        from kvpolicy.integrity import check_integrity

        check_integrity(self)


def _by_layer(x: Tensor, layers: int) -> Tensor:
    """Return ``[layers * requests, ...]`` as ``[layers, requests, ...]``."""
    return x.view(layers, -1, *x.shape[1:])


def _picked(x: Tensor, slots: Tensor) -> Tensor:
    """Return some slots ``[R, H, N]`` of ``[R, H, S, ...]``; anything where -1 is named."""
    at = slots.clamp(min=0).view(*slots.shape, *[1] * (x.dim() - 3))
    return x.gather(2, at.expand(*slots.shape, *x.shape[3:]))
