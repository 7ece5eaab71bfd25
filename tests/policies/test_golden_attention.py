"""Methods decided from attention, values and chance, against their formulas written out in loops.

Each is run over a prompt and three further evictions of a real store, so that what a method remembers
matters. The formula looks at attention at every step, as published; the policy at each eviction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from kvpolicy import (
    Attention,
    LastAttended,
    LayerSpec,
    ModelSpec,
    Policy,
    Prompt,
    Recurrence,
    Sinks,
    TopK,
    policies,
)
from tests.core.views import view_of
from tests.policies.slow import Head, Method, Query, Token, conversations, dot
from tests.policies.slow import Scores as Numbers

BUDGET, RECENT, INTERVAL = 10, 3, 4


def positions(head: Head) -> list[int]:
    return [token.position for token in head.tokens]


def sinks(count: int) -> Callable[[Head, Numbers], set[int]]:
    return lambda head, scores: {p for p in positions(head) if p < count}


def whole_prompt(head: Head, scores: Numbers) -> set[int]:
    """Both ends of it, where it does not fit beside the last tokens."""
    room = BUDGET - RECENT
    first = head.prompt if head.prompt <= room else room - room // 2
    last = 0 if head.prompt <= room else room // 2
    return {p for p in positions(head) if p < first or head.prompt - last <= p < head.prompt}


def accumulate(head: Head, query: Query) -> None:
    paid = head.attention(query)
    for token in head.tokens:
        token.memory["sum"] = token.memory.get("sum", 0.0) + paid.get(token.position, 0.0)


def vatp() -> Method:
    def score(head: Head) -> Numbers:
        return {t.position: t.memory["sum"] * sum(abs(x) for x in t.value) for t in head.tokens}

    return Method(BUDGET, RECENT, score, accumulate, sinks(2))


def output_errors(head: Head, weights: Numbers, *, fast: bool = False) -> Numbers:
    """The change of the output, by leaving each token out, without the closed form (which fast needs)."""
    total = sum(weights.values())
    a = {p: w / total for p, w in weights.items()}
    value = {t.position: t.value for t in head.tokens}
    dims = range(len(head.tokens[0].value))

    def mixture(of: Numbers) -> list[float]:
        return [sum(of[p] * value[p][d] for p in of) for d in dims]

    changes = {}
    for left_out in a:
        if fast:
            mean = mixture({p: 1 / len(a) for p in a})
            changes[left_out] = a[left_out] / (1 - a[left_out]) * math.dist(mean, value[left_out])
            continue
        others = {p: x / (1 - a[left_out]) for p, x in a.items() if p != left_out}
        changes[left_out] = math.dist(mixture(a), mixture(others))
    return changes


def caote() -> Method:
    return Method(
        BUDGET,
        RECENT,
        lambda head: output_errors(head, {t.position: t.memory["sum"] for t in head.tokens}),
        accumulate,
    )


def fast_caote() -> Method:
    return Method(BUDGET, RECENT, lambda head: output_errors(head, head.mean_attention(5), fast=True))


def scissorhands() -> Method:
    def score(head: Head) -> Numbers:
        low = dict.fromkeys(positions(head), 0.0)
        for query in head.queries[-6:]:
            paid = head.attention(query)
            for p, probability in paid.items():
                low[p] -= probability < 1 / len(paid)
        return low

    return Method(BUDGET, RECENT, score)


def gkv() -> Method:
    window, decay, importance = RECENT, 0.8, 0.5

    def score(head: Head) -> Numbers:
        old = [t for t in head.tokens if t.position < head.seen - window]
        now = head.mean_attention(window)
        largest = max(now[t.position] for t in old)
        resemblance = {}
        for one in old:
            cosines = [
                dot(one.key, two.key) / math.hypot(*one.key) / math.hypot(*two.key) for two in old if two is not one
            ]
            resemblance[one.position] = math.exp(sum(cosines) / len(old))
        most = max(resemblance.values())
        scores = dict.fromkeys(positions(head), 0.0)
        for token in old:
            token.memory["F"] = max(decay * token.memory.get("F", 0.0), now[token.position] / largest)
            scores[token.position] = importance * token.memory["F"]
            scores[token.position] -= (1 - importance) * resemblance[token.position] / most
        return scores

    return Method(BUDGET, RECENT, score)


def raas() -> Method:
    def stamp(head: Head, query: Query) -> None:
        paid = head.attention(query)
        top = sorted(paid, key=lambda p: paid[p], reverse=True)[: max(1, len(paid) // 2)]
        for token in head.tokens:
            if token.position in top:
                token.memory["time"] = query.position

    def score(head: Head) -> Numbers:
        return {t.position: t.memory.get("time", t.position) for t in head.tokens}

    return Method(BUDGET, RECENT, score, stamp, whole_prompt)


def lazy_eviction(threshold: float) -> Method:
    def track(head: Head, query: Query) -> None:
        paid = head.attention(query)
        for token in head.tokens:
            if token.position > query.position:
                continue
            last = token.memory.setdefault("time", query.position - 1)
            if paid[token.position] >= threshold:
                token.memory["pause"] = max(token.memory.get("pause", 0), query.position - last)
                token.memory["time"] = query.position

    def score(head: Head) -> Numbers:
        scores = {}
        for token in head.tokens:
            age = head.seen - 1 - token.memory["time"]
            pause = token.memory.get("pause", 0)
            scores[token.position] = 2 / (1 + math.exp(min(700, 1 + age / (pause + 1e-5))))
            scores[token.position] += 2 / (1 + math.exp(pause - 1)) if pause else 0
        return scores

    return Method(BUDGET, RECENT, score, track)


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def gumbel(words: list[int], counter: int) -> float:
    """The noise of seed 0, in Python's own integers; see tests/core/test_noise.py."""
    a, b = 0, 0x5851F42D
    for word in (0, 0, *words):
        a = mix((a ^ word) % 2**32)
        b = mix((b + a + 0x1E3779B1) % 2**32)
    bits = mix(mix((counter * 0x1E3779B1 + a) % 2**32) ^ b)
    return -math.log(-math.log1p(-(bits + 0.5) / 2**32))


def keyformer(growth: float, highest: float) -> Method:
    def accumulate_perturbed(head: Head, query: Query) -> None:
        step = max(0, query.position - head.prompt + 1)
        temperature = min(1.0 + growth * step, highest)

        def change(query: Query, member: int, token: Token, logit: float) -> float:
            # seed, request (two words each), stage, layer, draw, head, query, query head
            words = [0, 0, 0, 0, 0, 0, 0, head.index + 1, query.position, member]
            return (logit + gumbel(words, token.position)) / temperature

        paid = head.attention(query, change)
        for token in head.tokens:
            token.memory["sum"] = token.memory.get("sum", 0.0) + paid.get(token.position, 0.0)

    return Method(BUDGET, RECENT, lambda head: {t.position: t.memory["sum"] for t in head.tokens}, accumulate_perturbed)


def nexus() -> Method:
    def score(head: Head) -> Numbers:
        old = [t for t in head.tokens if t.position < head.seen - RECENT]
        candidates = Head(head.index, old, head.queries, head.seen)
        weights = candidates.mean_attention(RECENT)
        # u ** (1 / w) in the order of its double logarithm, of a u that belongs to head and position.
        scores = dict.fromkeys(positions(head), 0.0)
        for p, weight in weights.items():
            u = math.exp(-math.exp(-gumbel([0, 0, 0, 0, 1, 0, 0, head.index + 1], p)))
            scores[p] = math.log(u) / weight
        return scores

    return Method(BUDGET, RECENT, score)


CASES: dict[str, tuple[Policy, Method]] = {
    "vatp": (policies.vatp(BUDGET, sinks=2, recent=RECENT, interval=INTERVAL), vatp()),
    "caote": (policies.caote(BUDGET, recent=RECENT, interval=INTERVAL), caote()),
    "fast caote": (
        policies.caote(BUDGET, scorer=Attention(5, pool=1, over="all"), fast=True, recent=RECENT, interval=INTERVAL),
        fast_caote(),
    ),
    "scissorhands": (policies.scissorhands(BUDGET, window=6, recent=RECENT, interval=INTERVAL), scissorhands()),
    "gkv": (policies.gkv(BUDGET, window=RECENT, interval=INTERVAL), gkv()),
    "raas": (policies.raas(BUDGET, recent=RECENT, interval=INTERVAL), raas()),
    "lazy_eviction": (
        policies.lazy_eviction(BUDGET, threshold=0.06, recent=RECENT, interval=INTERVAL),
        lazy_eviction(0.06),
    ),
    "keyformer": (
        policies.keyformer(BUDGET, growth=0.1, highest=1.5, recent=RECENT, interval=INTERVAL),
        keyformer(0.1, 1.5),
    ),
    "nexus": (policies.nexus(BUDGET, window=RECENT, recent=RECENT, interval=INTERVAL), nexus()),
}


@pytest.mark.parametrize("name", CASES)
def test_every_eviction_keeps_what_the_formula_keeps(name: str) -> None:
    policy, method = CASES[name]
    evictions = list(conversations(policy, method))
    assert len(evictions) == 4
    for number, (found, expected) in enumerate(evictions):
        assert found == expected, f"eviction {number}"
    assert any(max(expected[0]) - min(expected[0]) >= BUDGET for _, expected in evictions), "it is not recency"


def test_evicting_at_every_step_stamps_the_same_times() -> None:
    """What each method says of itself: the interval decides when a token leaves, not what it is worth."""
    for name, method in (("raas", raas()), ("lazy_eviction", lazy_eviction(0.06))):
        options = {"threshold": 0.06} if name == "lazy_eviction" else {}
        policy = getattr(policies, name)(BUDGET, recent=RECENT, interval=1, **options)
        evictions = list(conversations(policy, method))
        assert len(evictions) == 14
        assert all(found == expected for found, expected in evictions)


def test_queries_of_a_prompt_that_the_window_does_not_hold_are_not_counted() -> None:
    for scorer, method in (
        (LastAttended(4, share=0.5), dataclasses.replace(raas(), window=4)),
        (Recurrence(4, threshold=0.06), dataclasses.replace(lazy_eviction(0.06), window=4)),
    ):
        guard = Prompt((BUDGET - RECENT) / BUDGET) if isinstance(scorer, LastAttended) else Sinks(0)
        policy = Policy(scorer >> guard >> TopK(BUDGET), recent=RECENT, interval=INTERVAL)
        assert all(found == expected for found, expected in conversations(policy, method))


def test_nacl_keeps_the_top_and_samples_the_rest_by_the_softmax_of_the_scores() -> None:
    """What is guarded is certain; in 600 rows each other token is drawn as often as the softmax says (5 sigma)."""
    rows, generator = 600, torch.Generator().manual_seed(3)
    keys = torch.randn(1, 1, 16, 4, generator=generator, dtype=torch.float64)
    queries = 4 * torch.randn(1, 1, 3, 4, generator=generator, dtype=torch.float64)
    head = Head(0, [Token(p, keys[0, 0, p].tolist(), []) for p in range(16)])
    head.queries = [Query(13 + w, [queries[0, 0, w].tolist()]) for w in range(3)]
    score = head.mean_attention(3)
    middle = sorted(range(1, 14), key=lambda p: score[p], reverse=True)
    certain, others = {0, *middle[:3], 14, 15}, middle[3:]
    view = view_of(keys.expand(rows, -1, -1, -1), budget=7, recent=2, queries=queries.expand(rows, -1, -1, -1))
    policy = policies.nacl(7, share=0.5, window=3, sinks=1, recent=2)
    spec = LayerSpec(1, 1, 4, 4, 16, torch.float64, torch.device("cpu"))
    view = dataclasses.replace(view, seed=torch.arange(rows))
    mask = policy.select(view, policy.init(spec, rows))[0].mask[:, 0]
    assert mask[:, sorted(certain)].all()
    assert (mask.sum(-1) == 7).all()
    total = sum(math.exp(score[p]) for p in others)
    for p in others:
        chance = math.exp(score[p]) / total
        assert abs(int(mask[:, p].sum()) - rows * chance) < 5 * math.sqrt(rows * chance * (1 - chance))


def test_random_attention_protects_the_whole_prompt() -> None:
    """All of it where the budget has room, as published: the default gives it a half."""
    keys = torch.randn(1, 1, 24, 4, generator=torch.Generator().manual_seed(0))
    view = dataclasses.replace(view_of(keys, budget=12, recent=2), prompt_length=torch.tensor([9]))
    for share, kept in ((None, 9), (0.5, 6)):
        policy = policies.random_eviction(12, share=share, recent=2)
        plan = policy.plan(ModelSpec(1)).layers[0]
        assert plan is not None
        mask = policy.select(view, policy.init(LayerSpec(1, 1, 4, 4, 24, torch.float32, keys.device), 1))[0].mask
        guarded = mask[0, 0, :9].sum() if share is None else mask[0, 0, [0, 1, 2, 6, 7, 8]].sum()
        assert guarded == kept
        assert mask.sum() == 12
