"""Checks of a policy inside a cache: over many evictions, and beside another cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from kvpolicy.policy import EvictionPolicy
from kvpolicy.testing.keeping import first_plan
from kvpolicy.testing.kept import Case, Kept, unsure_positions
from kvpolicy.testing.replay import OrderedCache, Script, StoreCache, Tokens
from kvpolicy.testing.running import check, for_all

__all__ = ["check_caches_apart", "check_store", "same_as_ordered", "scripts"]

_SHARE = 0.3  #: of the examples: each is a whole conversation


@check
def check_store(policy: EvictionPolicy) -> None:
    """Check that a store keeps the same tokens as a cache that gathers them in position order.

    Over several turns and evictions: positions, and what the policy remembers of each token.
    """
    if first_plan(policy) is None:
        return

    def test(script: Script) -> None:
        same_as_ordered(policy, script)

    for_all(scripts(policy), test, name="check_store", share=_SHARE)


@check
def check_caches_apart(policy: EvictionPolicy) -> None:
    """Check that two caches under one policy object, in turn, are what each would be alone."""
    if first_plan(policy) is None:
        return

    def test(pair: tuple[Script, Script]) -> None:
        alone = [list(_run(copy.deepcopy(policy), script)) for script in pair]
        runs = [_run(policy, script) for script in pair]
        steps = max(len(one) for one in alone)
        for step in range(steps):
            for run, expected in zip(runs, alone, strict=True):
                found = next(run, None)
                assert found is None or found == expected[step], (
                    f"step {step}: a cache keeps other tokens when another one shares the policy"
                )

    for_all(st.tuples(scripts(policy), scripts(policy)), test, name="check_caches_apart", share=_SHARE)


@st.composite
def scripts(draw: DrawFn, policy: EvictionPolicy) -> Script:
    """Draw a conversation long enough for a policy to evict several times."""
    plan = first_plan(policy)
    assert plan is not None
    requests = draw(st.integers(1, 2))
    long, interval = plan.budget + 5, plan.interval or 3
    turns = []
    for turn in range(draw(st.integers(1, 3))):
        lengths = st.one_of(st.integers(1, long), st.just(long), st.just(plan.budget))
        counts = tuple(draw(lengths) for _ in range(requests))
        wait = draw(st.sampled_from((2 * interval, interval, 1, 3 * interval + 1)))
        turns.append((counts, 0 if plan.interval is None and turn else wait))
    return Script(
        turns=tuple(turns),
        layers=3,
        heads=draw(st.integers(1, 2)) if plan.heads is None else len(plan.heads),
        group=draw(st.integers(1, 2)),
        dtype=draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16))),
        generator=draw(st.integers(0, 2**32 - 1)),
    )


def _run(policy: EvictionPolicy, script: Script) -> Iterator[Kept]:
    """Yield what a store holds after each step: positions of each row and head."""
    cache, random = StoreCache(policy, script), torch.Generator().manual_seed(script.generator)
    for counts, decoding in script.steps():
        event = cache.step(Tokens.of(script, max(counts), random), counts, decoding)
        if event.asked:
            yield tuple(cache.kept(layer, request) for layer in cache.layers for request in range(script.requests))


def same_as_ordered(policy: EvictionPolicy, script: Script) -> None:
    """Assert that a store holds what a cache in position order holds, after each eviction."""
    cache, random = StoreCache(policy, script), torch.Generator().manual_seed(script.generator)
    twins = [
        OrderedCache(policy, cache, layer, request) for layer in cache.layers for request in range(script.requests)
    ]
    for number, (counts, decoding) in enumerate(script.steps()):
        tokens = Tokens.of(script, max(counts), random)
        event = cache.step(tokens, counts, decoding)
        sure = True
        for twin in twins:
            count, due = counts[twin.request], event.due[twin.request]
            case = twin.step(tokens, count, decoding, event.asked, due)
            if case is not None:
                sure = _same_row(policy, cache, twin, case, number) and sure
        if not sure:
            return  # rounding decided between two tokens: from here on both answers are right


def _same_row(policy: EvictionPolicy, cache: StoreCache, twin: OrderedCache, case: Case, step: int) -> bool:
    """Assert that a row of a store holds what its twin holds; return whether rounding had no say."""
    where = f"step {step}, layer {twin.layer}, request {twin.request}"
    found, expected = cache.kept(twin.layer, twin.request), case.kept[0]
    if found != expected:
        unsure = unsure_positions(policy, case, same_state=True)[0]
        for head, (one, two) in enumerate(zip(found, expected, strict=True)):
            wrong = (one ^ two) - unsure[head]
            assert not wrong, (
                f"{where}, head {head}: the store holds positions {sorted(one)}, and should hold {sorted(two)}"
            )
        return False
    store, layer, row = cache.store, cache.layers.index(twin.layer), twin.request
    order = store.slots(store.rows_of(layer)).order[row].to(torch.int64)[:, : twin.positions.shape[2]]
    free = twin.positions[0] < 0
    state = store.state_of(store.bands[0], store.bands[0].layer(layer))
    for index, (held, mirrored) in enumerate(zip(state, twin.state, strict=True)):
        if held is None or mirrored is None:
            continue
        pairs = [
            *(
                (t[row].gather(-1, order).masked_fill(free, 0), u[0].masked_fill(free, 0))
                for t, u in zip(held.slots, mirrored.slots, strict=True)
            ),
            *((t[row], u[0]) for t, u in zip(held.rows, mirrored.rows, strict=True)),
        ]
        for found_state, known in pairs:
            same = torch.allclose(found_state.double(), known.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
            assert same, (
                f"{where}: what stage {index} remembers did not follow its tokens: {found_state.tolist()}, "
                f"and in position order it should be {known.tolist()}"
            )
    return True
