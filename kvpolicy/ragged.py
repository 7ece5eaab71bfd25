"""Slots of which each head has a number of its own: :class:`RaggedStore`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from kvpolicy.band import Band, Span
from kvpolicy.compaction import moves, reorder_
from kvpolicy.errors import BudgetError, UnsupportedError, UsageError
from kvpolicy.host import on_device, on_host, sent
from kvpolicy.policy import EvictionPolicy, LayerPlan
from kvpolicy.row import Row
from kvpolicy.scattered import Scattered
from kvpolicy.scores import Keep
from kvpolicy.store import Slots, Store
from kvpolicy.view import LayerSpec, StageState, State

__all__ = ["RaggedStore", "new_store"]


def new_store(
    policy: EvictionPolicy | Sequence[EvictionPolicy],
    plan: LayerPlan | Sequence[LayerPlan],
    spec: LayerSpec,
    layers: Sequence[int],
    rows: Sequence[Row],
    drafts: int = 0,
    lse: bool = False,
) -> Store:
    """Return slots for layers of equal shape and plan; ragged where heads may keep different numbers.

    The arguments are those of :class:`~kvpolicy.store.Store`.
    """
    plans = plan if isinstance(plan, Sequence) else [plan]
    kind = RaggedStore if any(one.head_wise for one in plans) else Store
    return kind(policy, plan, spec, layers, rows, drafts, lse)


class RaggedStore(Store):
    """Hold layers whose heads have different numbers of slots, one behind the other in one piece of memory.

    A head's slots are ``budget + interval`` lines, so that a layer takes exactly the sum over its heads.
    Where the policy shares a layer's slots, heads begin with equal parts and move once they are shared.
    How many slots each head has is known on the host: it is read where slots are shared, and nowhere else.

    ``row.length`` counts the slots of the longest head.

    Attributes:
        keys: ``[layers, requests, T, D]``, ``T`` lines, head by head.
        values: ``[layers, requests, T, Dv]``.
        positions: ``[layers, requests, T]`` int32, -1 where free.
        order: ``[layers, requests, T]`` int32, the slots of each head in position order, free slots last.
        budgets: ``[layers, requests, H]`` int64 on the host.
        held: ``[layers, requests, H]`` int64 on the host, slots in use.
    """

    def _allocate(self, lead: tuple[int, int]) -> None:
        spec, plan = self.spec, self.plans[0]
        if self.bands[1:]:
            raise UnsupportedError("budgets of heads and a policy for each row do not go together yet; give one policy")
        if self.drafts or spec.values_in_keys:
            what = "drafts" if self.drafts else "latent attention, which has one head,"
            raise UnsupportedError(f"budgets of heads and {what} do not go together yet; write TopK(budget)")
        if plan.heads is not None and len(plan.heads) != spec.num_heads:
            raise BudgetError(f"budgets for {len(plan.heads)} heads, and the layer has {spec.num_heads} KV heads")
        first = plan.heads if plan.heads is not None else (plan.budget,) * spec.num_heads
        self._first_budgets, self.slack = on_host(first), plan.capacity - plan.budget
        self.total = sum(first) + spec.num_heads * self.slack
        lines = (*lead, self.total)
        self.keys = torch.zeros(*lines, spec.head_dim, dtype=spec.dtype, device=spec.device)
        self.values = torch.zeros(*lines, spec.value_dim, dtype=spec.dtype, device=spec.device)
        self.positions = torch.full(lines, -1, dtype=torch.int32, device=spec.device)
        self.order = torch.zeros(lines, dtype=torch.int32, device=spec.device)
        self.budgets = self._first_budgets.repeat(*lead, 1)
        self.held = torch.zeros_like(self.budgets)
        self._filled: dict[int, Tensor] = {}
        self._place()
        self.order.view(-1).copy_(self._places(slice(None))[1])
        band = self.bands[0]
        band.state = tuple(self._flat(held) for held in band.begin(replace(spec, capacity=1)))

    def _flat(self, held: StageState | None) -> StageState | None:
        """Return the state of no tokens, ``[layers * requests, T, ...]``, given that of one slot a head."""
        if held is None:
            return None
        slots = tuple(t.new_zeros(t.shape[0], self.total, *t.shape[3:]) for t in held.slots)
        return StageState(slots, held.rows)

    # Where the slots of a head lie

    def _place(self) -> None:
        """Tell the device where the slots of each head lie, and how many are in use."""
        sizes = (self.budgets + self.slack).flatten(0, 1)
        device, starts = self.spec.device, sizes.cumsum(-1) - sizes
        first = starts + torch.arange(len(sizes), device="cpu")[:, None] * self.total
        self._starts = starts.view(self.budgets.shape).tolist()
        self._sizes, self._first, self._used = (sent(t, device) for t in (sizes, first, self.held.flatten(0, 1)))

    def _places(self, at: slice) -> tuple[Tensor, Tensor]:
        """Return the head, counted over some rows, and the slot of each of their lines: ``[rows * T]`` each."""
        sizes, first = self._sizes[at].flatten(), self._first[at].flatten()
        lines = torch.arange(len(self._sizes[at]) * self.total, device=sizes.device)
        heads = torch.arange(len(sizes), device=sizes.device)
        head = torch.repeat_interleave(heads, sizes, output_size=len(lines))
        return head, lines - (first - first[:1]).index_select(0, head)

    def _table(self, at: slice, size: int) -> Tensor:
        """Return the line of the first ``size`` slots of each head, ``[rows, H, size]``; beyond a head, its last."""
        slots = torch.arange(size, device=self._first.device)
        return self._first[at][..., None] + torch.minimum(slots, self._sizes[at][..., None] - 1)

    def _by_head(self, lines: Tensor, at: slice, free: Tensor | int) -> Tensor:
        """Return what stands in the slots of each head, ``[rows, H, S, ...]``, and ``free`` in those not in use."""
        table = self._table(at, int(self.budgets.flatten(0, 1)[at].max()) + self.slack)
        used = torch.arange(table.shape[-1], device=table.device) < self._used[at][..., None]
        found = lines.index_select(0, table.flatten()).view(*table.shape, *lines.shape[1:])
        return torch.where(used.view(*used.shape, *[1] * (found.dim() - 3)), found, free)

    # What an eviction reads

    @property
    def longest(self) -> int:
        """Return the slots in use of the longest head."""
        return int(self.held.max())

    @property
    def slot_axes(self) -> tuple[int, ...]:
        """Return the axis of lines, behind layers and requests."""
        return (self.total,)

    def of_head(self, x: Tensor, index: int, request: int, head: int) -> Tensor:  # type: ignore[override]
        """Return the slots of one head of a tensor such as ``positions``."""
        first = self._starts[index][request][head]
        return x[index, request, first : first + int(self.budgets[index, request, head]) + self.slack]

    def longest_in(self, index: int) -> int:
        """Return the slots in use of the longest head of one layer."""
        return int(self.held[index].max())

    @property
    def ragged(self) -> bool:
        """Return True."""
        return True

    @property
    def widest(self) -> int:
        """Return the slots of the largest head."""
        return int(self.budgets.max()) + self.slack

    @property
    def uniform(self) -> bool:
        """Return False: heads may differ."""
        return False

    def slots_of(self, request: int) -> float:
        """Return the slots in use of one request: a sum over layers, of each a mean over heads."""
        return float(self.held[:, request].double().mean(-1).sum())

    def lengths(self) -> Tensor:
        """Return the slots in use of each head, ``[layers * requests, H]`` int64 on the host."""
        return self.held.flatten(0, 1)

    def goals(self, due: Sequence[bool]) -> Tensor:
        """Return the slots that each head is to keep, ``[layers * requests, H]`` int64 on the host."""
        return torch.where(on_host(list(due), torch.bool)[:, None], self.budgets, self.held).flatten(0, 1)

    def over_budget(self, rows: Sequence[Row]) -> list[bool]:
        """Return which rows, given as they were counted, hold more than the budget of some head."""
        more = on_host([after.seen - row.seen for row, after in zip(self.rows, rows, strict=True)])
        return [bool(over) for over in (self.held + more[:, None] > self.budgets).any(-1).any(0)]

    def sharing(self, rows: Sequence[Row], due: Sequence[bool]) -> list[bool]:
        """Return which of the rows that are due have their slots shared over the heads anew."""
        plan, again = self.plans[0], self.plans[0].refresh
        return [
            plan.shared and is_due and (not row.evictions or (again is not None and row.evictions % again == 0))
            for row, is_due in zip(rows, due, strict=True)
        ]

    def slots(self, at: slice) -> Slots:
        """Return the slots of some of the ``layers * requests`` rows; keys and values are gathered when read."""
        order = self._by_head(self.order.flatten(), at, -1)
        slot = torch.arange(order.shape[-1], device=order.device, dtype=order.dtype)
        table = self._table(at, len(slot))
        return Slots(
            cast(Tensor, Scattered(self.keys.flatten(0, 2), table)),
            cast(Tensor, Scattered(self.values.flatten(0, 2), table)),
            self._by_head(self.positions.flatten(), at, -1),
            torch.where(order < 0, slot, order),
        )

    def in_use(self, index: int, more: int = 0) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, ``[requests, H, S, D]``, copied, ``more`` behind the longest head too."""
        table = self._table(self.rows_of(index), self.longest_in(index) + more)
        return Scattered(self.keys.flatten(0, 2), table).gathered(), Scattered(
            self.values.flatten(0, 2), table
        ).gathered()

    def sequences(self, index: int) -> tuple[Tensor, Tensor]:
        """Return where each (request, head) of a layer begins among its lines, and how many it has.

        Returns:
            ``[requests * H + 1]`` int32, and ``[requests * H]`` int32, a token that is about to count among them.
        """
        at = self.rows_of(index)
        first = self._first[at].flatten() - at.start * self.total
        end = first.new_full((1,), len(self.rows) * self.total)
        return torch.cat([first, end]).to(torch.int32), (self._used[at].flatten() + 1).to(torch.int32)

    def heads_of(self, index: int) -> list[list[tuple[Tensor, Tensor]]]:
        """Return the lines of each request and head of a layer as views: keys ``[slots, D]``, values ``[slots, Dv]``.

        The last is the one behind those in use: that of a token which is about to count.
        """
        keys, values, first = self.keys[index], self.values[index], self._starts[index]
        return [
            [
                (keys[r, start : start + used + 1], values[r, start : start + used + 1])
                for start, used in zip(starts, lengths, strict=True)
            ]
            for r, (starts, lengths) in enumerate(zip(first, self.held[index].tolist(), strict=True))
        ]

    def state_of(self, band: Band, span: Span) -> State:
        """Return what a policy remembers of some rows, copied, by head."""
        return tuple(
            held
            and StageState(
                tuple(self._by_head(t.flatten(0, 1), span.store, 0) for t in held.slots),
                tuple(t[span.band] for t in held.rows),
            )
            for held in band.state
        )

    def remember(self, band: Band, span: Span, state: State) -> None:
        """Take over what a policy remembers of some rows; modifies the band's tensors."""
        head, slot = self._places(span.store)
        for mine, new in zip(band.state, state, strict=True):
            if mine is not None and new is not None:
                for held, given in zip(mine.slots, new.slots, strict=True):
                    held[span.band].flatten(0, 1).copy_(given.flatten(0, 1)[head, slot])
                for held, given in zip(mine.rows, new.rows, strict=True):
                    held[span.band].copy_(given)

    # Writing tokens

    def append(
        self, index: int, keys: Tensor, values: Tensor, counts: Sequence[int], behind: Sequence[int] | None = None
    ) -> None:
        """Write new tokens behind the last slot of each head; see :meth:`Store.append`.

        Raises:
            UsageError: they do not fit; nothing was written.
        """
        width = keys.shape[2]
        if behind is not None:
            raise UnsupportedError("heads with budgets of their own take no drafts: their tokens are appended in order")
        self.insist_on_room(counts)
        at = self.rows_of(index)
        ends = self._first[at] + self._used[at]
        if width == 1 and all(counts):
            self.keys.flatten(0, 2).index_copy_(0, ends.flatten(), keys[:, :, 0].flatten(0, 1))
            self.values.flatten(0, 2).index_copy_(0, ends.flatten(), values[:, :, 0].flatten(0, 1))
            return
        for r, count in enumerate(counts):
            lines = (ends[r, :, None] + torch.arange(count, device=ends.device)).flatten()
            self.keys.flatten(0, 2).index_copy_(0, lines, keys[r, :, width - count :].flatten(0, 1))
            self.values.flatten(0, 2).index_copy_(0, lines, values[r, :, width - count :].flatten(0, 1))

    def insist_on_room(self, counts: Sequence[int], behind: Sequence[int] | None = None) -> list[int]:
        """Return how many slots the longest head of each row holds; see :meth:`Store.insist_on_room`."""
        if bool((self.held + on_host(list(counts))[:, None] > self.budgets + self.slack).any()):
            raise UsageError(
                f"a head holds {self.longest} slots and cannot take {max(counts)} more tokens: it was not evicted "
                "when it was due, or only the end of a turn evicts; bind the policy with a larger max_new_tokens"
            )
        return [int(held) for held in self.held.amax((0, 2))]

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
        """Replace the slots of one layer by survivors of a larger, temporary layer; see :meth:`Store.fill`.

        Where heads keep other numbers than before, their places move; :meth:`advance` or :meth:`cut` makes it count.
        """
        plan, at = self.plans[0], self.rows_of(index)
        shared = kept.sum(-1) == self.budgets[index].sum(-1)
        if plan.shared:  # a row that keeps its whole budget keeps as many in each head from now on
            self.budgets[index] = torch.where(shared[:, None], kept, self.budgets[index])
            self._place()
        self._filled[index] = kept
        head, slot = self._places(at)
        used = slot < sent(kept, slot.device).flatten()[head]
        source = survivors.flatten(0, 1)[head, slot.clamp(max=survivors.shape[-1] - 1)].clamp(min=0)
        heads = self.spec.num_heads
        row, head = head // heads, head % heads
        pick = (row, head, source)
        keys, values = (_plain(t[pick]) for t in (keys, values))  # what is read may be what is written
        moved = torch.where(used, positions[pick], -1)
        self.keys[index].flatten(0, 1).copy_(keys)
        self.values[index].flatten(0, 1).copy_(values)
        self.positions[index].flatten().copy_(moved)
        self.order[index].flatten().copy_(slot)
        for held_stage, new in zip(self.bands[0].state, states[0], strict=True):
            if held_stage is None or new is None:
                continue
            for held, given in zip(held_stage.slots, new.slots, strict=True):
                there = given[pick]
                held[at].flatten(0, 1).copy_(torch.where(used.view(-1, *[1] * (there.dim() - 1)), there, 0))
            for held, given in zip(held_stage.rows, new.rows, strict=True):
                held[at].copy_(given)

    def advance(self, rows: Sequence[Row]) -> None:
        """Make what was written to every layer count; see :meth:`Store.advance`."""
        counts = on_host([after.seen - row.seen for row, after in zip(self.rows, rows, strict=True)])
        filled = bool(self._filled)
        self._count(self.held + counts[:, None])
        super().advance(self._measured(rows) if filled else rows)

    def _count(self, held: Tensor) -> None:
        """Take over how many slots are in use: those that :meth:`fill` wrote, or these."""
        if self._filled:
            held = torch.stack([self._filled.pop(index) for index in range(len(self.layers))])
        self.held.copy_(held)
        self._used = sent(self.held.flatten(0, 1), self.spec.device)

    def _measured(self, rows: Sequence[Row]) -> list[Row]:
        longest = self.held.amax((0, 2)).tolist()
        return [replace(row, length=length, settled=length) for row, length in zip(rows, longest, strict=True)]

    def settled_positions(self) -> Tensor:
        """Return ``positions`` as :meth:`settle` would leave them; modifies nothing."""
        positions = self.positions.clone()
        self._settle(positions.view(-1))
        return positions

    def settle(self) -> None:
        """Write the positions of slots appended since the last eviction; modifies ``positions``."""
        self._settle(self.positions.view(-1))

    def _settle(self, positions: Tensor) -> None:
        layers = len(self.layers)
        ends = (self._first + self._used).view(layers, len(self.rows), -1)
        for r, row in enumerate(self.rows):
            new = torch.arange(row.length - row.settled, device=ends.device) - (row.length - row.settled)
            lines = ends[:, r, :, None] + new
            positions[lines] = (row.seen + new).to(positions.dtype).expand_as(lines)

    # Evicting and undoing

    def compact(self, band: Band, span: Span, keep: Keep, lengths: Tensor, kept: Tensor, limit: int) -> None:
        """Drop what ``keep`` does not name; see :meth:`Store.compact`: each head has holes and a tail of its own."""
        at = span.store
        source, target = moves(keep.mask, keep.victims, lengths, kept, limit)
        order = self.slots(at).order  # a copy
        reorder_(order, keep.mask, kept, 0, source, target)
        first = self._first[at][..., None]
        source, target = (source + first).flatten(), (target + first).flatten()
        states = [t for held in band.state if held is not None for t in held.slots]
        for tensor in (*(t.flatten(0, 2) for t in (*self.arenas, self.positions)), *(t.flatten(0, 1) for t in states)):
            tensor.index_copy_(0, target, tensor.index_select(0, source))
        head, slot = self._places(at)
        free = (slot >= kept.flatten()[head]).view(-1, self.total)
        self.positions.flatten(0, 1)[at].masked_fill_(free, -1)
        self.order.flatten(0, 1)[at].copy_(order.flatten(0, 1)[head, slot].view(-1, self.total))
        for tensor in states:
            tensor[at].masked_fill_(free.view(*free.shape, *[1] * (tensor.dim() - 2)), 0)
        self.broken[at] += keep.broken

    def cut(self, band: Band, due: Sequence[bool]) -> None:
        """Count an eviction: rows that are due were cut, the others were seen by the policy."""
        keep = self.goals(due).view_as(self.held)
        self._count(torch.minimum(self.held, keep))
        rows = [self._evicted(row) if is_due else row for row, is_due in zip(self.rows, due, strict=True)]
        self.rows = self._measured(rows)

    def cut_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Return rows of a turn, given as they were counted, as they are once :meth:`fill` has cut them."""
        return [self._evicted(row) if over else row for row, over in zip(rows, self.over_budget(rows), strict=True)]

    def _evicted(self, row: Row) -> Row:
        intact = max(row.intact, row.seen - self.plans[0].recent)
        return replace(row, evictions=row.evictions + 1, intact=intact)

    def crop(self, counts: Sequence[int]) -> None:
        """Forget the newest tokens of each row, which are in every head; see :meth:`Store.crop`."""
        self.check_crop(counts)
        self.settle()
        left, band = self.held - on_host(list(counts))[:, None], self.bands[0]
        kept, none = sent(left.flatten(0, 1), self.spec.device), torch.zeros_like(self.broken)
        below = self.column("seen") - on_device(list(counts), self.spec.device)
        below = below.repeat(len(self.layers))[:, None, None]
        for span in band.spans(len(none)):
            positions = self.slots(span.store).positions
            keep = Keep((positions >= 0) & (positions < below[span.store]), None, none[span.store])
            self.compact(band, span, keep, self._used[span.store], kept[span.store], max(counts))
        self._count(left)
        rows = [
            replace(row, seen=row.seen - n, decoded=max(0, row.decoded - n), prompt=min(row.prompt, row.seen - n))
            for row, n in zip(self.rows, counts, strict=True)
        ]
        unseen = [max(0, row.length - row.settled - n) for row, n in zip(self.rows, counts, strict=True)]
        self.rows = [replace(row, settled=row.length - n) for row, n in zip(self._measured(rows), unseen, strict=True)]
        self.window.crop(counts, [row.seen for row in self.rows])

    # Reordering, starting again

    def fork(self, requests: Sequence[int]) -> RaggedStore:
        """Return a new store whose rows are copies of some rows of this one; modifies nothing."""
        rows = [replace(self.rows[r]) for r in requests]
        lse = self.window.lse is not None
        new = RaggedStore(self.bands[0].policy, self.plans[0], self.spec, self.layers, rows, lse=lse)
        new._copy_rows(self, requests)
        return new

    def _copy_rows(self, source: Store, requests: Sequence[int]) -> None:
        assert isinstance(source, RaggedStore)
        host, at = on_host(list(requests)), on_device(list(requests), self.spec.device)
        pairs = [(self.budgets, source.budgets, host), (self.held, source.held, host)]
        pairs += [(mine, theirs, at) for mine, theirs in zip(self._by_layer(), source._by_layer(), strict=True)]
        for mine, theirs, named in pairs:
            mine.copy_(theirs.index_select(1, named))
        self.window.copy_rows(source.window, at)
        self._place()

    def _by_layer(self) -> list[Tensor]:
        """Return every tensor but the window's as ``[layers, requests, ...]``."""
        layers = len(self.layers)
        states = [t.view(layers, -1, *t.shape[1:]) for band in self.bands for t in band.tensors()]
        return [*self.arenas, self.positions, self.order, self.broken.view(layers, -1), *states]

    def reset(self) -> None:
        """Forget everything but the requests' names and seeds; modifies every tensor, in place."""
        self._filled.clear()
        self.budgets.copy_(self._first_budgets.expand_as(self.budgets))
        self.held.zero_()
        self._place()
        self.positions.fill_(-1)
        self.order.copy_(self._places(slice(None))[1].view(self.order.shape))
        self.broken.zero_()
        self.window.reset()
        band = self.bands[0]
        new = band.policy.init(replace(self.spec, capacity=1), band.layers * band.count)
        for mine, begun in zip(band.state, new, strict=True):
            if mine is not None and begun is not None:
                for held in mine.slots:
                    held.zero_()
                for held, given in zip(mine.rows, begun.rows, strict=True):
                    held.copy_(given)
        self.rows = [Row(request=row.request, seed=row.seed) for row in self.rows]


def _plain(x: Tensor | Scattered) -> Tensor:
    return x.gathered() if isinstance(x, Scattered) else x
