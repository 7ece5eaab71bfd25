"""Checks of a policy inside a cache: over many evictions, and beside another cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from kvpolicy.policy import EvictionPolicy
from kvpolicy.testing.keeping import first_plan
from kvpolicy.testing.kept import Case, Kept, unsure_positions
from kvpolicy.testing.oracle import MaskedCache
from kvpolicy.testing.replay import Script, StoreCache, Tokens
from kvpolicy.testing.running import check, for_all

__all__ = ["check_caches_apart", "check_oracle", "check_store", "same_as_masked", "scripts"]

_SHARE = 0.3  #: of the examples: each is a whole conversation
_FEW = 0.2  #: where each step of it is looked at, too


@check
def check_store(policy: EvictionPolicy) -> None:
    """Check that a store keeps the same tokens as a full cache in which evicted ones are masked.

    Over several turns and evictions: positions, and what the policy remembers of each token.
    """
    if first_plan(policy) is None:
        return

    def test(script: Script) -> None:
        same_as_masked(policy, script)

    for_all(scripts(policy), test, name="check_store", share=_SHARE)


@check
def check_oracle(policy: EvictionPolicy) -> None:
    """Check that attention over a store is attention over all tokens with the evicted ones masked.

    After each step of a conversation, in float64, within ``1e-9``: what the newest query of each row finds.
    """
    if first_plan(policy) is None:
        return

    def test(script: Script) -> None:
        for step in _steps(policy, script):
            for twin, case in step.asked():
                if not _same_kept(policy, step, twin, case):
                    return  # rounding decided between two tokens: from here on both answers are right
            for twin in step.twins:
                query = step.tokens.queries[twin.layer, step.request_of(twin)][:, -1:]
                found = step.cache.attend(twin.layer, step.request_of(twin), query[:, 0])
                wrong = (found - twin.attend(query)[:, 0]).abs().amax()
                assert wrong <= 1e-9, (
                    f"{step.where(twin)}: attention over the store is {float(wrong):.1e} away from attention over "
                    "all tokens with the evicted ones masked"
                )

    for_all(scripts(policy), test, name="check_oracle", share=_FEW)


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
        lengths = st.one_of(st.just(long), st.integers(1, long), st.just(plan.budget))  # the simplest one evicts
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


@dataclass(frozen=True, eq=False)
class _Step:
    """Hold what one step of a conversation made of a store, and of a full cache for each of its rows."""

    number: int
    cache: StoreCache
    twins: tuple[MaskedCache, ...]
    cases: tuple[Case | None, ...]
    tokens: Tokens

    def asked(self) -> Iterator[tuple[MaskedCache, Case]]:
        """Yield the rows about which the policy was asked, and its answers."""
        return ((twin, case) for twin, case in zip(self.twins, self.cases, strict=True) if case is not None)

    def request_of(self, twin: MaskedCache) -> int:
        """Return which request a full cache is of."""
        return self.twins.index(twin) % self.cache.script.requests

    def where(self, twin: MaskedCache) -> str:
        """Return how a message says where this is."""
        return f"step {self.number}, layer {twin.layer}, request {self.request_of(twin)}"


def _steps(policy: EvictionPolicy, script: Script) -> Iterator[_Step]:
    """Tell a conversation to a store, and row by row to full caches; yield what each step made of them."""
    cache, random = StoreCache(policy, script), torch.Generator().manual_seed(script.generator)
    rows = [(layer, request) for layer in cache.layers for request in range(script.requests)]
    twins = tuple(
        MaskedCache(
            policy,
            cache.plan,
            cache.store.spec,
            cache.logits_of(layer),
            layer=layer,
            seed=cache.store.rows[request].seed,
        )
        for layer, request in rows
    )
    for number, (counts, decoding) in enumerate(script.steps()):
        tokens = Tokens.of(script, max(counts), random)
        event = cache.step(tokens, counts, decoding)
        cases = []
        for twin, (layer, request) in zip(twins, rows, strict=True):
            new, before = slice(-counts[request], None), twin.evictions
            mine = (x[layer, request][:, new] for x in (tokens.keys, tokens.values, tokens.queries))
            cases.append(twin.step(*mine, decoding=decoding, shown=event.asked))
            assert (twin.evictions > before) == event.due[request], (
                f"step {number}, layer {layer}, request {request}: due={event.due[request]} in the store"
            )
        yield _Step(number, cache, twins, tuple(cases), tokens)


def same_as_masked(policy: EvictionPolicy, script: Script) -> None:
    """Assert that a store holds what a full cache holds behind its mask, after each eviction."""
    for step in _steps(policy, script):
        every = [_same_row(policy, step, twin, case) for twin, case in step.asked()]
        if not all(every):
            return  # rounding decided between two tokens: from here on both answers are right


def _same_kept(policy: EvictionPolicy, step: _Step, twin: MaskedCache, case: Case) -> bool:
    """Assert that a row of a store holds what its twin holds; return whether rounding had no say."""
    found, expected = step.cache.kept(twin.layer, step.request_of(twin)), twin.kept
    if found == expected:
        return True
    unsure = unsure_positions(policy, case, same_state=True)[0]
    for head, (one, two) in enumerate(zip(found, expected, strict=True)):
        wrong = (one ^ two) - unsure[head]
        assert not wrong, (
            f"{step.where(twin)}, head {head}: the store holds positions {sorted(one)}, and should hold {sorted(two)}"
        )
    return False


def _same_row(policy: EvictionPolicy, step: _Step, twin: MaskedCache, case: Case) -> bool:
    """Assert that a row of a store holds and remembers what its twin does; return whether rounding had no say."""
    if not _same_kept(policy, step, twin, case):
        return False
    cache, row = step.cache, step.request_of(twin)
    store, layer = cache.store, cache.layers.index(twin.layer)
    most = int(twin.alive.sum(-1).max())
    mine = torch.where(twin.alive, torch.arange(twin.seen), twin.seen).argsort(dim=-1, stable=True)[:, :most]
    free = ~twin.alive.gather(-1, mine)
    order = store.slots(store.rows_of(layer)).order[row].to(torch.int64)[:, :most]
    state = store.state_of(store.bands[0], store.bands[0].layer(layer))
    for index, (held, known) in enumerate(zip(state, twin.state, strict=True)):
        if held is None or known is None:
            continue
        pairs = [
            *(
                (t[row].gather(-1, order).masked_fill(free, 0), u[0].gather(-1, mine).masked_fill(free, 0))
                for t, u in zip(held.slots, known.slots, strict=True)
            ),
            *((t[row], u[0]) for t, u in zip(held.rows, known.rows, strict=True)),
        ]
        for found, expected in pairs:
            same = torch.allclose(found.double(), expected.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
            assert same, (
                f"{step.where(twin)}: what stage {index} remembers did not follow its tokens: {found.tolist()}, "
                f"and in position order it should be {expected.tolist()}"
            )
    return True
