"""Everything that can happen to a store, in random order, against a model in plain Python: :func:`cache_machine`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from kvpolicy.errors import UnsupportedError, UsageError
from kvpolicy.eviction import LogitSpec, evict, fill_from
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec
from kvpolicy.row import Row
from kvpolicy.store import Store
from kvpolicy.testing.checks import PolicyOrFactory, fresh
from kvpolicy.testing.row_model import CacheModel, Recorder
from kvpolicy.view import DEFAULT_WORKSPACE, LayerSpec

__all__ = ["CacheMachine", "cache_machine"]

_DIM, _VALUE_DIM = 4, 8
_MODEL = ModelSpec(num_layers=3, max_new_tokens=5)
_SEEDS = st.integers(0, 2**32 - 1)


def cache_machine(policies: PolicyOrFactory | Sequence[PolicyOrFactory]) -> type[CacheMachine]:
    """Return a state machine that tells a store under a policy, and a model in plain Python, the same.

    Its rules are what engines do: append turns, short and long, and decoded tokens; evict; settle; crop; reorder;
    fork; reset; and, of appending, cropping and reordering, what is refused. After each of them the store agrees
    with itself and with the model, bit by bit: positions, keys, values, what the policy remembers of each token
    and row, and the window of queries; and it has the memory that it began with. Every answer of the policy is
    well formed and keeps the last tokens.

    How many runs and how many steps of each, hypothesis's current profile says, or the settings of the test::

        TestMine = cache_machine(MyPolicy(budget=8)).TestCase
        TestMine.settings = settings(max_examples=60, stateful_step_count=20)

    Small policies, with a budget of about ten and recent of two, meet most in a few steps.

    Args:
        policies: a policy, or a function that makes one; or several, of which each run draws one.

    Raises:
        UnsupportedError: heads keep different numbers of slots, or no layer evicts; ``check_store`` and
            ``check_oracle`` tell whole conversations to a store under such a policy.

    >>> from hypothesis import settings
    >>> from hypothesis.stateful import run_state_machine_as_test
    >>> from kvpolicy import KeyNorm, Policy, TopK
    >>> machine = cache_machine(Policy(KeyNorm() >> TopK(6), interval=4, recent=2))
    >>> run_state_machine_as_test(machine, settings=settings(max_examples=2, stateful_step_count=5, deadline=None))
    """
    every = tuple(policies) if isinstance(policies, Sequence) else (policies,)
    for one in every:
        plan, _ = _planned(fresh(one))
        if plan.head_wise:
            raise UnsupportedError(
                f"cache_machine({one!r}): heads keep different numbers of slots; run check_store and check_oracle, or "
                "give every head as many with TopK(budget)"
            )
    return type("Machine", (CacheMachine,), {"policies": every})


def _planned(policy: EvictionPolicy) -> tuple[LayerPlan, tuple[int, ...]]:
    """Return the plan of the first layer that evicts, and the layers that share it."""
    plans = policy.plan(_MODEL).layers
    plan = next((one for one in plans if one is not None), None)
    if plan is None:
        raise UnsupportedError(f"cache_machine({policy!r}): no layer evicts; give some layer a budget")
    return plan, tuple(index for index, other in enumerate(plans) if other == plan)


class CacheMachine(RuleBasedStateMachine):
    """Tell a store and its model the same; made by :func:`cache_machine`.

    Attributes:
        policies: of which each run draws one.
        store: what the rules change.
        model: what it should hold.
    """

    policies: tuple[PolicyOrFactory, ...] = ()
    store: Store

    @initialize(
        which=st.integers(0, 2**16),
        layers=st.integers(1, 2),
        requests=st.integers(1, 3),
        heads=st.integers(1, 2),
        dtype=st.sampled_from((torch.float32, torch.bfloat16)),
        workspace=st.sampled_from((DEFAULT_WORKSPACE, 1)),
    )
    def begin(self, which: int, layers: int, requests: int, heads: int, dtype: torch.dtype, workspace: int) -> None:
        """Begin with an empty store."""
        self.policy = Recorder(fresh(self.policies[which % len(self.policies)]))
        self.plan, alike = _planned(self.policy)
        spec = LayerSpec(heads, 2 * heads, _DIM, _VALUE_DIM, self.plan.capacity, dtype, torch.device("cpu"))
        rows = [Row(request=r, seed=10 + r) for r in range(requests)]
        self.store = Store(self.policy, self.plan, spec, alike[:layers], rows)
        random = torch.Generator().manual_seed(which)
        self.logits = LogitSpec(
            0.5,
            num_layers=_MODEL.num_layers,
            num_heads=heads,
            workspace=workspace,
            output=tuple(torch.randn(3, 2 * heads, _VALUE_DIM, generator=random).to(dtype) for _ in alike[:layers]),
            rotary=torch.rand(_DIM // 2, generator=random, dtype=torch.float64),
        )
        self._takes(self.store, CacheModel(self.store))

    def _takes(self, store: Store, model: CacheModel) -> None:
        self.store, self.model = store, model
        self.addresses = [t.data_ptr() for t in store.tensors()]

    # Tokens

    @rule(steps=st.integers(1, 4), seed=_SEEDS)
    def decode(self, steps: int, seed: int) -> None:
        """Decode some tokens."""
        for step in range(min(steps, self.plan.capacity - self.store.longest)):
            self._append([1] * len(self.store.rows), seed + step, decoding=True)

    @rule(data=st.data(), seed=_SEEDS, pad=st.integers(0, 2))
    def append_ragged(self, data: st.DataObject, seed: int, pad: int) -> None:
        """Append a short turn, of another length in each row."""
        room = [self.plan.capacity - row.length for row in self.store.rows]
        counts = [data.draw(st.integers(0, min(n, 5))) for n in room]
        if any(counts):
            self._append(counts, seed, decoding=False, pad=pad)

    @rule(data=st.data(), seed=_SEEDS)
    def long_turn(self, data: st.DataObject, seed: int) -> None:
        """Append a turn of more tokens than there are slots for."""
        store, budget = self.store, self.plan.budget
        counts = [data.draw(st.integers(1, budget + 6)) for _ in store.rows]
        after = [row.advanced(n, decoding=False) for row, n in zip(store.rows, counts, strict=True)]
        if all(row.length <= budget for row in after):
            self._append(counts, seed, decoding=False)
            return
        keys, values, queries = self._tokens(max(counts), seed)
        held = slice(0, store.longest)
        store.settle()
        for index in range(len(store.layers)):
            self._model_adds(index, keys, values, queries, counts)
            store.observe(index, queries[index], counts)
            joined = (
                torch.cat([store.keys[index, :, :, held], keys[index]], 2),
                torch.cat([store.values[index, :, :, held], values[index]], 2),
            )
            self.policy.answers.clear()
            assert self.logits.output is not None
            logits = dataclasses.replace(self.logits, output=self.logits.output[index : index + 1])
            fill_from(store, index, *joined, counts, after, logits)
            self.model.replay(self.policy.answers, index)
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

        queries = made(spec.num_query_heads, _DIM)
        return made(spec.num_heads, _DIM), made(spec.num_heads, _VALUE_DIM), queries

    def _model_adds(self, index: int, keys: Tensor, values: Tensor, queries: Tensor, counts: list[int]) -> None:
        width = keys.shape[3]
        for r, (row, count) in enumerate(zip(self.model.rows[index], counts, strict=True)):
            new = slice(width - count, width)
            mine = [x[index, r, :, new] for x in (keys, values, queries)]
            row.add(mine[0], mine[1], mine[2], self.plan.window)

    @rule()
    def append_too_much(self) -> None:
        """Append what does not fit, which is refused."""
        keys, values, _ = self._tokens(self.plan.capacity + 1, 0)
        counts = [self.plan.capacity + 1] * len(self.store.rows)
        _refused("cannot take", lambda: self.store.append(0, keys[0], values[0], counts))

    # Evictions

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """Cut some of the rows."""
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
        """Write down positions that are implicit."""
        self.store.settle()

    # Undoing

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        """Take back tokens that are certainly there."""
        counts = [data.draw(st.integers(0, row.seen - row.intact)) for row in self.store.rows]
        self.store.crop(counts)
        for layer in self.model.rows:
            for row, count in zip(layer, counts, strict=True):
                row.crop(count)

    @rule()
    def crop_too_much(self) -> None:
        """Take back more, which is refused."""
        before = [dataclasses.replace(row) for row in self.store.rows]
        counts = [0] * len(self.store.rows)
        counts[-1] = self.store.rows[-1].seen - self.store.rows[-1].intact + 1
        _refused("certainly still", lambda: self.store.crop(counts))
        assert self.store.rows == before

    # Rows

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        """Replace rows by others, as beam search does."""
        count = len(self.store.rows)
        named = [data.draw(st.integers(0, count - 1)) for _ in range(count)]
        before = [dataclasses.replace(row) for row in self.store.rows]
        self.store.reorder(torch.tensor(named))
        assert self.store.rows == [before[r] for r in named]
        self._renamed(named)

    @precondition(lambda self: len(self.store.rows) > 1)
    @rule()
    def reorder_wrongly(self) -> None:
        """Name rows that are not there, or too few, which is refused."""
        for named in ([0], [0] * (len(self.store.rows) - 1) + [len(self.store.rows)]):
            _refused("reorder", lambda named=named: self.store.reorder(torch.tensor(named)))  # type: ignore[misc]

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """Go on with copies of some rows, any number of them, and leave the old store as it was."""
        named = data.draw(st.lists(st.integers(0, len(self.store.rows) - 1), min_size=1, max_size=3))
        old, new = self.store, self.store.fork(named)
        self.model.check(old)
        assert not {t.data_ptr() for t in old.tensors() if t.numel()} & {t.data_ptr() for t in new.tensors()}
        assert new.rows == [old.rows[r] for r in named]
        self._renamed(named)
        self._takes(new, self.model)

    def _renamed(self, named: list[int]) -> None:
        self.model.rows = [[layer[r].copy() for r in named] for layer in self.model.rows]

    @rule()
    def reset(self) -> None:
        """Forget everything but the names of the requests."""
        names = [(row.request, row.seed) for row in self.store.rows]
        self.store.reset()
        assert [(row.request, row.seed) for row in self.store.rows] == names
        assert all(row.seen == row.length == row.evictions == 0 for row in self.store.rows)
        self.model = CacheModel(self.store)

    # What always holds

    @invariant()
    def store_is_its_model(self) -> None:
        """Compare the store with its model, and with itself."""
        self.store.check_integrity()
        self.model.check(self.store)

    @invariant()
    def memory_is_what_was_allocated(self) -> None:
        """Compare addresses with those at the beginning, and bytes with a sum."""
        store, spec, c, w = self.store, self.store.spec, self.plan.capacity, self.plan.window
        assert [t.data_ptr() for t in store.tensors()] == self.addresses
        size, rows = spec.dtype.itemsize, len(store.layers) * len(store.rows)
        each = spec.num_heads * c * (_DIM + _VALUE_DIM) * size + 8 * spec.num_heads * c
        each += (spec.num_query_heads * w * _DIM * size + 4 * w) if w else 0
        held = [t for s in store.bands[0].state if s is not None for t in (*s.slots, *s.rows)]
        assert store.nbytes() == rows * each + sum(t.numel() * t.element_size() for t in held)


def _refused(said: str, ask: Callable[[], None]) -> None:
    """Assert that a UsageError says this."""
    found = None
    try:
        ask()
    except UsageError as error:
        found = str(error)
    assert found is not None, f"nothing was refused; a UsageError should say {said!r}"
    assert said in found, found
