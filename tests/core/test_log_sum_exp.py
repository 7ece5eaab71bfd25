"""Scores from the kernel's log-sum-exp are those of the softmax, and are not taken where it is stale."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from kvpolicy import (
    AccumulatedAttention,
    Attention,
    Keep,
    LastQuery,
    LayerSpec,
    ModelSpec,
    Policy,
    Scorer,
    TopK,
    UsageError,
    View,
    tiles,
)
from kvpolicy.eviction import LogitSpec, evict, fill_from
from kvpolicy.probabilities import received
from kvpolicy.row import Row
from kvpolicy.scorers.attention import newest
from kvpolicy.store import Store
from kvpolicy.testing import RowSpec, make_view, with_state
from kvpolicy.view import State
from kvpolicy.window import QueryWindow

SCORERS = [
    Attention(4, pool=1, over="all"),
    Attention(3, over="all"),
    Attention(4, over="all", reduce="max"),
    AccumulatedAttention(4),
    LastQuery(),
]
ROWS = (
    RowSpec(length=40, evicted=50, evictions=1, budget=30),
    RowSpec(length=33, budget=30, layer=1),
    RowSpec(length=3, fresh=3, prompt=3, budget=None),  # fewer tokens than the window asks
    RowSpec(length=35, evicted=45, evictions=1, budget=30, asked=2),  # queries that are absent
)


def lse_of(view: View) -> Tensor:
    """Return the log-sum-exp of each query, written out over all slots in float64."""
    assert view.queries is not None
    assert view.query_positions is not None
    keys = view.keys.double().repeat_interleave(view.queries.shape[1] // view.shape[1], 1)
    at = view.positions.repeat_interleave(view.queries.shape[1] // view.shape[1], 1)
    logits = view.queries.double() @ keys.mT * view.scaling
    if view.softcap is not None:
        logits = view.softcap * torch.tanh(logits / view.softcap)
    seen = (at[:, :, None] >= 0) & (at[:, :, None] <= view.query_positions[:, None, :, None])
    logits = torch.where(seen, logits, -torch.inf)
    if view.sink_logits is not None:
        sinks = view.sink_logits.double()[:, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    lse = logits.logsumexp(-1)
    absent = (view.query_positions < 0)[:, None]
    return torch.where(absent, -1e3, lse).to(view.compute_dtype)  # what is absent may hold anything


def score(stage: Scorer, view: View) -> Tensor:
    b, h, s = view.shape
    assert view.queries is not None
    spec = LayerSpec(h, view.queries.shape[1], 4, 4, s, view.keys.dtype, torch.device("cpu"))
    state = stage.update(view, stage.init(spec, b))
    if state is not None:
        return state.slots[0]
    return stage.score(view, state).values


@pytest.fixture(params=["one block", "blocks of columns"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "blocks of columns":
        monkeypatch.setattr(tiles, "_CPU_TILE", 700)


MODELS: list[dict[str, Any]] = [{}, {"softcap": 1.5}, {"sinks": True}, {"free": "nan", "spare": 9}]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("stage", SCORERS, ids=repr)
@pytest.mark.parametrize("more", MODELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_those_of_the_softmax(stage: Scorer, more: dict[str, Any], dtype: torch.dtype) -> None:
    view = make_view(rows=ROWS, window=4, dtype=dtype, **more)
    by_lse = dataclasses.replace(view, lse=lse_of(view))
    expected, found = score(stage, view), score(stage, by_lse)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert expected.max() > 0.05
    policy = Policy(stage >> TopK(30), recent=2)
    state = with_state(policy, view)
    kept, again = (policy.select(one, state)[0] for one in (view, by_lse))
    assert torch.equal(kept.mask, again.mask)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("more", MODELS, ids=str)
def test_in_float64_they_agree_to_the_last_digits(reduce: Literal["mean", "max"], more: dict[str, Any]) -> None:
    view = make_view(rows=ROWS, window=4, dtype=torch.float64, **more)
    queries, positions = newest(view, 4)
    weight = (positions >= 0).double()
    ask = partial(received, view, queries, positions, view.valid, weight, causal=True, reduce=reduce)
    lse = lse_of(view)
    assert torch.allclose(ask(temperature=1.0, lse=lse), ask(temperature=1.0), rtol=0, atol=1e-12)
    assert torch.equal(ask(temperature=0.5, lse=lse), ask(temperature=0.5)), "other logits have another sum"


@pytest.mark.parametrize("stage", SCORERS, ids=repr)
def test_a_wrong_log_sum_exp_shows(stage: Scorer) -> None:
    """It is read, then: the tests above could fail."""
    view = make_view(rows=ROWS, window=4)
    wrong = dataclasses.replace(view, lse=lse_of(view) + 0.1)
    assert not torch.allclose(score(stage, wrong), score(stage, view), rtol=0, atol=1e-4)


def test_over_the_candidates_it_is_not_read() -> None:
    view = make_view(rows=ROWS, window=4)
    wrong = dataclasses.replace(view, lse=lse_of(view) + 0.1)
    assert torch.equal(score(Attention(4), wrong), score(Attention(4), view))


class Watched:
    """A policy that notes whether it was shown log-sum-exps, and insists that they are right."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.shown = policy, list[bool]()
        self.needs, self.plan, self.init = policy.needs, policy.plan, policy.init

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        self.shown.append(view.lse is not None)
        if view.lse is not None:
            assert view.query_positions is not None
            there = (view.query_positions >= 0)[:, None].expand_as(view.lse)
            assert torch.allclose(view.lse[there], lse_of(view)[there], atol=1e-5)
        return self.policy.select(view, state)


LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 4
LOGITS = LogitSpec(scaling=DIM**-0.5, num_layers=LAYERS, num_heads=HEADS)


class Engine:
    """Two stores that are given the same tokens; one is told the log-sum-exps, too."""

    def __init__(self, policy: Policy, rows: int = 2, drafts: int = 0) -> None:
        self.watched, self.generator = Watched(policy), torch.Generator().manual_seed(0)
        plan = policy.plan(ModelSpec(LAYERS)).layers[0]
        assert plan is not None
        capacity, device = plan.capacity + drafts, torch.device("cpu")
        spec = LayerSpec(HEADS, HEADS * GROUP, DIM, DIM, capacity, torch.float32, device)
        layers = range(LAYERS)
        self.told = Store(self.watched, plan, spec, layers, [Row() for _ in range(rows)], drafts, lse=True)
        self.plain = Store(policy, plan, spec, layers, [Row() for _ in range(rows)], drafts)

    @property
    def stores(self) -> tuple[Store, Store]:
        return self.told, self.plain

    def add(self, *counts: int, decoding: bool = True) -> None:
        """Let every row see some tokens, and write down what its queries saw."""
        width, rows = max(counts), len(counts)
        for index in range(LAYERS):
            keys = torch.randn(rows, HEADS, width, DIM, generator=self.generator)
            queries = torch.randn(rows, HEADS * GROUP, width, DIM, generator=self.generator) * 2
            for store in self.stores:
                store.append(index, keys, keys, counts)
            lse = torch.full(queries.shape[:3], torch.nan)  # columns of padding hold no token
            for r, (row, count) in enumerate(zip(self.told.rows, counts, strict=True)):
                for t in range(count):
                    column, seen = width - count + t, row.length + t + 1
                    held = self.told.keys[index, r, :, :seen].repeat_interleave(GROUP, 0)
                    logits = (held @ queries[r, :, column, :, None])[..., 0] * LOGITS.scaling
                    lse[r, :, column] = logits.logsumexp(-1)
            self.told.observe(index, queries, counts, lse)
            self.plain.observe(index, queries, counts)
        for store in self.stores:
            store.advance([row.advanced(n, decoding=decoding) for row, n in zip(store.rows, counts, strict=True)])

    def evict(self, *due: bool) -> bool:
        """Evict, and return whether the policy was shown log-sum-exps."""
        for store in self.stores:
            evict(store, due, LOGITS)
            store.check_integrity()
        assert torch.equal(self.told.positions, self.plain.positions)
        assert torch.equal(self.told.keys, self.plain.keys)
        return self.watched.shown[-1]


def policy_of(stage: Scorer, interval: int = 4) -> Policy:
    return Policy(stage >> TopK(12), interval=interval, recent=2)


@pytest.mark.parametrize("stage", SCORERS, ids=repr)
def test_a_store_that_is_told_keeps_the_same_tokens(stage: Scorer) -> None:
    engine = Engine(policy_of(stage))
    engine.add(12, 5, decoding=False)
    assert engine.evict(False, False), "nothing was ever evicted"
    for step in range(6):
        for _ in range(4):
            engine.add(1, 1)
        assert engine.evict(True, step > 0), "the window holds no more than an interval"


def test_queries_older_than_an_eviction_are_asked_without() -> None:
    engine = Engine(policy_of(AccumulatedAttention(8)))
    engine.add(12, 12, decoding=False)
    shown = [engine.evict(False, False)]
    for _ in range(3):
        for _ in range(4):
            engine.add(1, 1)
        shown.append(engine.evict(True, True))
    assert shown == [True, True, False, False]  # from the second eviction on, four of eight queries are older


@pytest.mark.parametrize("back", [1, 2, 3])
def test_drafts_that_are_taken_back_leave_it_right(back: int) -> None:
    engine = Engine(policy_of(Attention(4, over="all")), drafts=3)
    engine.add(12, 12, decoding=False)
    engine.evict(False, False)
    for _ in range(2):
        engine.add(4, 4)
        engine.add(3, 3)
        for store in engine.stores:
            store.crop([back, 3])
        engine.evict(True, True)
    assert engine.watched.shown == [True, True, True]


def test_behind_a_crop_into_what_was_seen_before_an_eviction_it_waits_for_new_queries() -> None:
    engine = Engine(policy_of(Attention(4, over="all")))
    engine.add(12, 12, decoding=False)
    engine.add(4, 4)
    assert engine.evict(True, True)
    for store in engine.stores:
        store.crop([2, 2])
    engine.add(3, 3)
    assert not engine.evict(False, False), "the oldest of four queries saw what has gone"


def test_it_moves_with_its_rows() -> None:
    engine = Engine(policy_of(Attention(4, over="all")))
    engine.add(12, 9, decoding=False)
    engine.add(1, 1)
    for store in engine.stores:
        store.reorder(torch.tensor([1, 1]))
    engine.add(3, 3)
    engine.evict(True, True)
    assert engine.watched.shown == [True]
    for _ in range(4):
        engine.add(1, 1)
    fork = engine.told.fork([1])
    assert fork.window.lse is not None
    assert engine.told.window.lse is not None
    assert torch.equal(fork.window.lse[:, 0], engine.told.window.lse[:, 1])
    evict(fork, [True], LOGITS)
    assert engine.watched.shown == [True, True]


def test_a_smaller_window_takes_the_newest() -> None:
    large, small = (QueryWindow(1, 2, 1, size, 1, torch.float32, torch.device("cpu"), lse=True) for size in (5, 3))
    asked = torch.arange(14.0).view(2, 1, 7, 1)
    large.write(0, asked, [7, 4], asked[..., 0])
    large.advance([7, 4], [0, 0])
    small.copy_rows(large, torch.tensor([1, 0]))
    assert small.lse is not None
    assert torch.equal(small.lse, small.queries[..., 0])
    assert small.lse.flatten().tolist() == [11, 12, 13, 4, 5, 6]


def test_a_turn_is_cut_by_it() -> None:
    """A prompt that does not fit is a temporary layer; its queries are in the window by then."""
    watched = Watched(policy_of(Attention(4, over="all")))
    plan = watched.plan(ModelSpec(1)).layers[0]
    assert plan is not None
    spec = LayerSpec(HEADS, HEADS * GROUP, DIM, DIM, plan.capacity, torch.float32, torch.device("cpu"))
    store = Store(watched, plan, spec, [0], [Row(), Row()], lse=True)
    view = make_view(
        rows=(RowSpec(length=20, fresh=20, prompt=20),) * 2, window=4, head_dim=DIM, shuffle=False, spare=0
    )
    assert view.queries is not None
    store.window.align([3, 2])
    store.observe(0, view.queries, [20, 20], lse_of(view))
    rows = [row.advanced(20, decoding=False) for row in store.rows]
    fill_from(store, 0, view.keys, view.values, [20, 20], rows, LOGITS)
    assert watched.shown == [True]


def test_what_is_not_told_is_refused() -> None:
    engine = Engine(policy_of(Attention(4, over="all")))
    queries = torch.zeros(2, HEADS * GROUP, 1, DIM)
    with pytest.raises(UsageError, match="pass observe"):
        engine.told.observe(0, queries, [1, 1])
    with pytest.raises(UsageError, match="lse=True"):
        engine.plain.observe(0, queries, [1, 1], queries[..., 0])


def test_bytes_are_those_of_the_formula() -> None:
    told, plain = Engine(policy_of(Attention(4, over="all"))).stores
    assert told.nbytes() - plain.nbytes() == LAYERS * 2 * 4 * HEADS * GROUP * 4
    assert told.window.nbytes() - plain.window.nbytes() == told.nbytes() - plain.nbytes()
    assert told.tensors()[6] is told.window.lse
