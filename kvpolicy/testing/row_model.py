"""What a store should hold, in plain words: every token ever seen, and which of them each head has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy.policy import EvictionPolicy, ModelSpec, Plan
from kvpolicy.scores import Keep
from kvpolicy.store import Store
from kvpolicy.testing.kept import Case, assert_recent, assert_sound
from kvpolicy.view import LayerSpec, StageState, State, View

__all__ = ["CacheModel", "Recorder", "RowModel"]

#: (stage, tensor) -> head -> position -> what the policy remembers
Memory = dict[tuple[int, int], list[dict[int, float]]]


@dataclass
class RowModel:
    """Hold one layer of one request.

    Attributes:
        heads: KV heads.
        keys: of every token seen, ``[H, D]`` each.
        values: of every token seen.
        queries: the newest ones that the window can hold, with their positions.
        held: positions, of each head.
        memory: what stages remember of tokens; a token that is not named has 0.
        rows: what stages remember of the row; a tensor that is not named is what ``policy.init`` gives.
    """

    heads: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    queries: list[tuple[int, Tensor]] = field(default_factory=list)
    held: list[set[int]] = field(default_factory=list)
    memory: Memory = field(default_factory=dict)
    rows: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.held = self.held or [set() for _ in range(self.heads)]

    def copy(self) -> RowModel:
        """Return a copy that shares nothing which changes."""
        memory = {where: [dict(head) for head in heads] for where, heads in self.memory.items()}
        held = [set(head) for head in self.held]
        return RowModel(self.heads, [*self.keys], [*self.values], [*self.queries], held, memory, dict(self.rows))

    def add(self, keys: Tensor, values: Tensor, queries: Tensor, window: int) -> None:
        """Take new tokens, ``[heads, count, dim]``."""
        for t in range(keys.shape[1]):
            position = len(self.keys)
            self.keys.append(keys[:, t])
            self.values.append(values[:, t])
            self.queries = [*self.queries, (position, queries[:, t])][-window:] if window else []
            for head in self.held:
                head.add(position)

    def crop(self, count: int) -> None:
        """Forget the newest tokens."""
        seen = len(self.keys) - count
        self.keys, self.values = self.keys[:seen], self.values[:seen]
        self.queries = [one for one in self.queries if one[0] < seen]
        self.held = [{p for p in head if p < seen} for head in self.held]
        for heads in self.memory.values():
            for head in heads:
                for position in [p for p in head if p >= seen]:
                    del head[position]

    def answered(self, view: View, keep: Keep, state: State, row: int) -> None:
        """Do what a policy said of this row."""
        mask, positions = keep.mask[row], view.positions[row].tolist()
        self.held = [
            {p for p, kept in zip(at, head, strict=True) if kept}
            for at, head in zip(positions, mask.tolist(), strict=True)
        ]
        for stage, told in enumerate(state):
            for number, tensor in enumerate(() if told is None else told.slots):
                heads = tensor[row].tolist()
                self.memory[stage, number] = [
                    {p: x for p, x in zip(at, line, strict=True) if p in kept}
                    for at, line, kept in zip(positions, heads, self.held, strict=True)
                ]
            for number, tensor in enumerate(() if told is None else told.rows):
                self.rows[stage, number] = tensor[row].flatten().tolist()

    def check(self, store: Store, index: int, request: int, positions: Tensor) -> None:
        """Assert that the store holds this."""
        length, seen = store.rows[request].length, store.rows[request].seen
        assert seen == len(self.keys)
        assert all(len(head) == length for head in self.held)
        at = positions[index, request, :, :length].to(torch.int64)
        assert [set(head) for head in at.tolist()] == self.held
        if length:
            for held, known in ((store.keys, self.keys), (store.values, self.values)):
                every = torch.stack(known, 1)  # [H, seen, D]
                wanted = every.gather(1, at[..., None].expand(-1, -1, every.shape[-1]))
                assert torch.equal(held[index, request, :, :length], wanted)
        self._check_memory(store, index * len(store.rows) + request, at)
        self._check_window(store, index, request)

    def _check_memory(self, store: Store, row: int, at: Tensor) -> None:
        length = at.shape[1]
        for stage, held in enumerate(store.bands[0].state):
            for number, tensor in enumerate(() if held is None else held.slots):
                known = self.memory.get((stage, number), [{} for _ in self.held])
                wanted = [
                    [head.get(position, 0.0) for position in line]
                    for head, line in zip(known, at.tolist(), strict=True)
                ]
                assert tensor[row, :, :length].tolist() == wanted
                assert not tensor[row, :, length:].any(), "a free slot remembers something"
            for number, tensor in enumerate(() if held is None else held.rows):
                begun = store.bands[0].policy.init(replace(store.spec, capacity=1), 1)[stage]
                assert begun is not None
                known_row = self.rows.get((stage, number), begun.rows[number].flatten().tolist())
                assert tensor[row].flatten().tolist() == known_row

    def _check_window(self, store: Store, index: int, request: int) -> None:
        window = store.window
        found = {
            position: window.queries[index, request, :, place]
            for place, position in enumerate(window.positions[index, request].tolist())
            if position != -1
        }
        assert found.keys() == {position for position, _ in self.queries}
        assert all(torch.equal(found[position], query) for position, query in self.queries)


class Recorder:
    """Ask another policy, and remember what it answered.

    Args:
        policy: the other one.

    Attributes:
        answers: the view, the slots to keep and the state behind it, of each question.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.answers: list[tuple[View, Keep, State]] = []

    @property
    def needs(self) -> frozenset[str]:
        """Return what the other policy needs."""
        return self.policy.needs

    def plan(self, model: ModelSpec) -> Plan:
        """Return the sizes that the other policy plans."""
        return self.policy.plan(model)

    def init(self, spec: LayerSpec, rows: int) -> State:
        """Return the other policy's state of empty rows."""
        return self.policy.init(spec, rows)

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        """Return what the other policy answers, which is well formed and keeps the last tokens."""
        asked = {name: _copied(value) for name, value in vars(view).items()}
        keep, after = self.policy.select(view, state)
        assert_sound(view, keep)
        assert_recent(Case(view, state, keep, after))
        held = tuple(
            None if one is None else StageState(tuple(map(_copied, one.slots)), tuple(map(_copied, one.rows)))
            for one in after
        )
        self.answers.append((View(**asked), keep, held))
        return keep, after


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class CacheModel:
    """Hold every row of every layer of a store.

    Args:
        store: empty.

    Attributes:
        rows: of each layer, those of each request.
    """

    def __init__(self, store: Store) -> None:
        heads = store.spec.num_heads
        self.rows = [[RowModel(heads) for _ in store.rows] for _ in store.layers]

    def replay(self, answers: Sequence[tuple[View, Keep, State]], index: int | None = None) -> None:
        """Do what a policy said: of one layer, or of all layers in order."""
        layers = self.rows if index is None else [self.rows[index]]
        rows = iter([row for layer in layers for row in layer])
        for view, keep, state in answers:
            for number in range(view.shape[0]):
                next(rows).answered(view, keep, state, number)
        assert next(rows, None) is None, "the policy was not asked about every row"

    def check(self, store: Store) -> None:
        """Assert that the store holds this."""
        positions = store.settled_positions()
        for index, layer in enumerate(self.rows):
            for request, row in enumerate(layer):
                row.check(store, index, request, positions)
