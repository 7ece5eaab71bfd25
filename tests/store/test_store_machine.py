"""Random sequences of everything that can happen to a store, against a model in plain Python."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from kvpolicy import (
    AccumulatedAttention,
    Attention,
    KeyNorm,
    LayerSpec,
    ModelSpec,
    Policy,
    Recency,
    Sinks,
    Stochastic,
    TopK,
    UsageError,
    ValueGuard,
)
from kvpolicy.eviction import LogitSpec, evict, fill_from
from kvpolicy.row import Row
from kvpolicy.store import Store
from tests.store.model import CacheModel, Recorder

POLICIES = (
    Policy(Recency() >> Sinks(1) >> TopK(6), interval=4, recent=2),
    Policy(KeyNorm() >> ValueGuard(sinks=1) >> Stochastic() >> TopK(7), interval=5, recent=3),
    Policy(AccumulatedAttention(3) + KeyNorm() >> Stochastic(0.5) >> TopK(6), interval=3, recent=2),
    Policy(Attention(4, pool=3) >> ValueGuard() >> TopK(8), interval=None, recent=1),
)
DIM, VALUE_DIM = 4, 8
KINDS = st.integers(0, 2**32 - 1)


class StoreMachine(RuleBasedStateMachine):
    """Tell a store and its model the same."""

    store: Store

    @initialize(
        policy=st.sampled_from(POLICIES),
        layers=st.integers(1, 2),
        requests=st.integers(1, 3),
        heads=st.integers(1, 2),
        dtype=st.sampled_from((torch.float32, torch.bfloat16)),
        workspace=st.sampled_from((2**28, 1)),
    )
    def begin(
        self,
        policy: Policy,
        layers: int,
        requests: int,
        heads: int,
        dtype: torch.dtype,
        workspace: int,
    ) -> None:
        self.policy = Recorder(policy)
        plan = policy.plan(ModelSpec(num_layers=layers, max_new_tokens=5)).layers[0]
        assert plan is not None
        spec = LayerSpec(heads, 2 * heads, DIM, VALUE_DIM, plan.capacity, dtype, torch.device("cpu"))
        rows = [Row(request=r, seed=10 + r) for r in range(requests)]
        self.plan, self.store = plan, Store(self.policy, plan, spec, range(layers), rows)
        self.logits = LogitSpec(0.5, num_layers=layers, num_heads=heads, workspace=workspace)
        self.model = CacheModel(self.store)
        self.addresses = [t.data_ptr() for t in self.store.tensors()]

    # Tokens

    @rule(steps=st.integers(1, 4), seed=KINDS)
    def decode(self, steps: int, seed: int) -> None:
        for step in range(min(steps, self.plan.capacity - self.store.longest)):
            self._append([1] * len(self.store.rows), seed + step, decoding=True)

    @rule(data=st.data(), seed=KINDS, pad=st.integers(0, 2))
    def append_ragged(self, data: st.DataObject, seed: int, pad: int) -> None:
        room = [self.plan.capacity - row.length for row in self.store.rows]
        counts = [data.draw(st.integers(0, min(n, 5))) for n in room]
        if any(counts):
            self._append(counts, seed, decoding=False, pad=pad)

    @rule(data=st.data(), seed=KINDS)
    def long_turn(self, data: st.DataObject, seed: int) -> None:
        counts = [data.draw(st.integers(1, self.plan.budget + 6)) for _ in self.store.rows]
        after = [row.advanced(n, decoding=False) for row, n in zip(self.store.rows, counts, strict=True)]
        if all(row.length <= self.plan.budget for row in after):
            self._append(counts, seed, decoding=False)
            return
        keys, values, queries = self._tokens(max(counts), seed)
        store, held = self.store, slice(0, self.store.longest)
        store.settle()
        for index in range(len(store.layers)):
            self._model_adds(index, keys, values, queries, counts)
            store.observe(index, queries[index], counts)
            joined = (
                torch.cat([store.keys[index, :, :, held], keys[index]], 2),
                torch.cat([store.values[index, :, :, held], values[index]], 2),
            )
            self.policy.answers.clear()
            fill_from(store, index, *joined, counts, after, self.logits)
            self.model.replay(self.policy.answers, index)
        budget = self.plan.budget
        store.advance([row.evicted(min(row.length, budget), self.plan.recent) for row in after])

    def _append(self, counts: list[int], seed: int, *, decoding: bool, pad: int = 0) -> None:
        keys, values, queries = self._tokens(max(counts) + pad, seed)
        for index in range(len(self.store.layers)):
            self.store.append(index, keys[index], values[index], counts)
            self.store.observe(index, queries[index], counts)
            self._model_adds(index, keys, values, queries, counts)
        rows = self.store.rows
        self.store.advance([row.advanced(n, decoding=decoding) for row, n in zip(rows, counts, strict=True)])

    def _tokens(self, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        spec, random = self.store.spec, torch.Generator().manual_seed(seed)
        lead = (len(self.store.layers), len(self.store.rows))

        def made(heads: int, dim: int) -> Tensor:
            return torch.randn(*lead, heads, width, dim, generator=random).to(spec.dtype)

        queries = made(spec.num_query_heads, DIM)
        return made(spec.num_heads, DIM), made(spec.num_heads, VALUE_DIM), queries

    def _model_adds(self, index: int, keys: Tensor, values: Tensor, queries: Tensor, counts: list[int]) -> None:
        width = keys.shape[3]
        for r, (row, count) in enumerate(zip(self.model.rows[index], counts, strict=True)):
            new = slice(width - count, width)
            mine = [x[index, r, :, new] for x in (keys, values, queries)]
            row.add(mine[0], mine[1], mine[2], self.plan.window)

    @rule()
    def append_too_much(self) -> None:
        keys, values, _ = self._tokens(self.plan.capacity + 1, 0)
        counts = [self.plan.capacity + 1] * len(self.store.rows)
        with pytest.raises(UsageError, match="cannot take"):
            self.store.append(0, keys[0], values[0], counts)

    # Evictions

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        due = [data.draw(st.booleans()) for _ in self.store.rows]
        before = [dataclasses.replace(row) for row in self.store.rows]
        self.policy.answers.clear()
        evict(self.store, due, self.logits)
        self.model.replay(self.policy.answers)
        for row, old, is_due in zip(self.store.rows, before, due, strict=True):
            cut = is_due and old.length > self.plan.budget
            assert row.length == (self.plan.budget if cut else old.length)
            assert row.evictions == old.evictions + cut

    @rule()
    def settle(self) -> None:
        self.store.settle()

    # Undoing

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        counts = [data.draw(st.integers(0, row.seen - row.intact)) for row in self.store.rows]
        self.store.crop(counts)
        for layer in self.model.rows:
            for row, count in zip(layer, counts, strict=True):
                row.crop(count)

    @rule()
    def crop_too_much(self) -> None:
        before = [dataclasses.replace(row) for row in self.store.rows]
        counts = [0] * len(self.store.rows)
        counts[-1] = self.store.rows[-1].seen - self.store.rows[-1].intact + 1
        with pytest.raises(UsageError, match="certainly still"):
            self.store.crop(counts)
        assert self.store.rows == before

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        count = len(self.store.rows)
        named = [data.draw(st.integers(0, count - 1)) for _ in range(count)]
        before = [dataclasses.replace(row) for row in self.store.rows]
        self.store.reorder(torch.tensor(named))
        assert self.store.rows == [before[r] for r in named]
        self.model.rows = [[layer[r].copy() for r in named] for layer in self.model.rows]

    @precondition(lambda self: len(self.store.rows) > 1)
    @rule()
    def reorder_wrongly(self) -> None:
        for named in ([0], [0] * (len(self.store.rows) - 1) + [len(self.store.rows)]):
            with pytest.raises(UsageError, match="reorder"):
                self.store.reorder(torch.tensor(named))

    @rule()
    def reset(self) -> None:
        names = [(row.request, row.seed) for row in self.store.rows]
        self.store.reset()
        assert [(row.request, row.seed) for row in self.store.rows] == names
        assert all(row.seen == row.length == row.evictions == 0 for row in self.store.rows)
        self.model = CacheModel(self.store)

    # What always holds

    @invariant()
    def store_is_its_model(self) -> None:
        self.store.check_integrity()
        self.model.check(self.store)

    @invariant()
    def memory_is_what_was_allocated(self) -> None:
        store, spec, c, w = self.store, self.store.spec, self.plan.capacity, self.plan.window
        assert [t.data_ptr() for t in store.tensors()] == self.addresses
        size, rows = spec.dtype.itemsize, len(store.layers) * len(store.rows)
        each = spec.num_heads * c * (DIM + VALUE_DIM) * size + 8 * spec.num_heads * c
        each += (spec.num_query_heads * w * DIM * size + 4 * w) if w else 0
        held = [t for s in store.bands[0].state if s is not None for t in (*s.slots, *s.rows)]
        assert store.nbytes() == rows * each + sum(t.numel() * t.element_size() for t in held)


TestStore = StoreMachine.TestCase
THOROUGH = os.environ.get("KVPOLICY_HYPOTHESIS") == "thorough"
TestStore.settings = settings(
    max_examples=2000 if THOROUGH else 60, stateful_step_count=40 if THOROUGH else 20, deadline=None
)
