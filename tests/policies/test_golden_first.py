"""The first methods of the zoo against their formulas written out in loops, over a prompt and three more evictions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from kvpolicy import LayerSpec, ModelSpec, Policy, policies
from tests.core.views import view_of
from tests.policies.slow import Head, Method, Query, conversations, dot
from tests.policies.slow import Scores as Numbers

BUDGET, RECENT, INTERVAL = 10, 3, 4


def positions(head: Head) -> list[int]:
    return [token.position for token in head.tokens]


def old(head: Head) -> Head:
    """The head without its last tokens, as a method sees it that softmaxes over the candidates alone."""
    return Head(head.index, [t for t in head.tokens if t.position < head.seen - RECENT], head.queries, head.seen)


def pooled(numbers: Numbers, width: int) -> Numbers:
    """The average over neighbours in position; beyond either end there are zeros."""
    ordered = sorted(numbers)
    half = width // 2
    return {p: sum(numbers[q] for q in ordered[max(0, i - half) : i + half + 1]) / width for i, p in enumerate(ordered)}


def first(count: int, head: Head) -> set[int]:
    return {p for p in positions(head) if p < count}


def snapkv() -> Method:
    return Method(BUDGET, RECENT, lambda head: pooled(head.mean_attention(RECENT), 5))


def accumulate(head: Head, query: Query) -> None:
    paid = head.attention(query)
    for token in head.tokens:
        token.memory["sum"] = token.memory.get("sum", 0.0) + paid.get(token.position, 0.0)


def h2o() -> Method:
    return Method(BUDGET, 5, lambda head: {t.position: t.memory["sum"] for t in head.tokens}, accumulate)


def streaming_llm() -> Method:
    return Method(
        BUDGET,
        RECENT,
        lambda head: {p: float(p) for p in positions(head)},
        guarded=lambda head, scores: first(4, head),
    )


def knorm() -> Method:
    return Method(BUDGET, RECENT, lambda head: {t.position: -math.hypot(*t.key) for t in head.tokens})


def keydiff() -> Method:
    def score(head: Head) -> Numbers:
        unit = [[x / math.hypot(*t.key) for x in t.key] for t in head.tokens]
        mean = [sum(column) / len(unit) for column in zip(*unit, strict=True)]
        return {t.position: -dot(one, mean) / math.hypot(*mean) for t, one in zip(head.tokens, unit, strict=True)}

    return Method(BUDGET, RECENT, score)


def rkv(importance: float) -> Method:
    def score(head: Head) -> Numbers:
        candidates = old(head)
        paid = pooled(candidates.mean_attention(RECENT), 5)
        alike = {}
        for one in candidates.tokens:
            cosines = [
                dot(one.key, two.key) / math.hypot(*one.key) / math.hypot(*two.key)
                for two in candidates.tokens
                if two is not one
            ]
            alike[one.position] = math.exp(sum(cosines) / len(candidates.tokens))
        scores = dict.fromkeys(positions(head), 0.0)
        for p, number in paid.items():
            scores[p] = importance * number - (1 - importance) * alike[p] / sum(alike.values())
        return scores

    return Method(BUDGET, RECENT, score)


def recommended() -> Method:
    def score(head: Head) -> Numbers:
        candidates = old(head)
        ever = {t.position: t.memory["sum"] for t in candidates.tokens}
        now = pooled(candidates.mean_attention(RECENT), 5)
        scores = dict.fromkeys(positions(head), 0.0)
        for p in ever:
            scores[p] = ever[p] / sum(ever.values()) + now[p] / sum(now.values())
        return scores

    def guarded(head: Head, scores: Numbers) -> set[int]:
        """Both ends of the prompt, then the sinks, then the largest values; in that order of tiers they all fit."""
        room = BUDGET // 4
        ends = {p for p in positions(head) if p < room - room // 2 or head.prompt - room // 2 <= p < head.prompt}
        size = {t.position: max(t.value) - min(t.value) for t in old(head).tokens}
        sinks = [p for p in sorted(size) if p < 4]
        large = sorted((p for p in size if p not in sinks), key=lambda p: size[p], reverse=True)
        return ends | set([*sinks, *large][: BUDGET // 2])

    return Method(BUDGET, RECENT, score, accumulate, guarded)


CASES: dict[str, tuple[Policy, Method]] = {
    "snapkv": (policies.snapkv(BUDGET, window=RECENT, interval=INTERVAL), snapkv()),
    "h2o": (policies.h2o(BUDGET, interval=INTERVAL), h2o()),
    "streaming_llm": (policies.streaming_llm(BUDGET, recent=RECENT, interval=INTERVAL), streaming_llm()),
    "knorm": (policies.knorm(BUDGET, recent=RECENT, interval=INTERVAL), knorm()),
    "keydiff": (policies.keydiff(BUDGET, recent=RECENT, interval=INTERVAL), keydiff()),
    "rkv": (policies.rkv(BUDGET, importance=0.4, window=RECENT, recent=RECENT, interval=INTERVAL), rkv(0.4)),
    "recommended": (policies.recommended(BUDGET, recent=RECENT, interval=INTERVAL), recommended()),
}


@pytest.mark.parametrize("name", CASES)
def test_every_eviction_keeps_what_the_formula_keeps(name: str) -> None:
    policy, method = CASES[name]
    evictions = list(conversations(policy, method))
    assert len(evictions) == 4
    for number, (found, expected) in enumerate(evictions):
        assert found == expected, f"eviction {number}"


def test_tova_keeps_one_set_for_all_heads() -> None:
    """What the newest query attends to, the mean over every head; written out over a view of two heads."""
    random = torch.Generator().manual_seed(5)
    keys = torch.randn(1, 2, 16, 4, generator=random, dtype=torch.float64)
    queries = 3 * torch.randn(1, 4, 1, 4, generator=random, dtype=torch.float64)
    view = view_of(keys, budget=6, recent=1, queries=queries)
    total = dict.fromkeys(range(16), 0.0)
    for head in range(4):
        logits = [view.scaling * dot(queries[0, head, 0].tolist(), keys[0, head // 2, p].tolist()) for p in range(16)]
        weights = [math.exp(logit) for logit in logits]
        for p in total:
            total[p] += weights[p] / sum(weights) / 4
    kept = {15, *sorted(range(15), key=lambda p: total[p], reverse=True)[:5]}
    policy = policies.tova(6)
    spec = LayerSpec(2, 4, 4, 4, 16, torch.float64, torch.device("cpu"))
    mask = policy.select(view, policy.init(spec, 1))[0].mask[0]
    assert [set(head.nonzero()[:, 0].tolist()) for head in mask] == [kept, kept]


def test_pyramidkv_gives_layers_a_straight_line_of_slots() -> None:
    """The official code: the last layer has (b - w) / beta, the first twice the mean less that; w more each."""
    layers, budget, window, beta = 5, 200, 20, 6
    least = (budget - window) / beta
    line = [
        (2 * (budget - window) - least) - at * (2 * (budget - window) - 2 * least) / (layers - 1) for at in range(5)
    ]
    plan = policies.pyramidkv(budget, beta=beta, window=window, interval=8).plan(ModelSpec(layers))
    found = [layer.budget - window for layer in plan.layers if layer is not None]
    assert sum(found) == layers * (budget - window)
    assert all(abs(one - two) <= 1 for one, two in zip(found, line, strict=True))
    chain = policies.pyramidkv(budget, beta=beta, window=window).chain
    assert chain.scorer == policies.snapkv(budget, window=window).chain.scorer


def test_random_eviction_draws_uniformly_beside_the_prompt() -> None:
    """In 600 rows each token that is neither prompt nor recent stays as often as any other (5 sigma)."""
    rows = 600
    keys = torch.randn(1, 1, 20, 4, generator=torch.Generator().manual_seed(0)).expand(rows, -1, -1, -1)
    view = view_of(keys, budget=10, recent=3)
    view = dataclasses.replace(view, seed=torch.arange(rows), prompt_length=torch.full((rows,), 4))
    policy = policies.random_eviction(10, recent=3)
    mask = policy.select(view, policy.init(LayerSpec(1, 1, 4, 4, 20, torch.float32, keys.device), rows))[0].mask[:, 0]
    assert mask[:, :4].all()
    assert mask[:, 17:].all()
    assert (mask.sum(-1) == 10).all()
    chance = 3 / 13
    drawn = mask[:, 4:17].sum(0) - rows * chance
    assert drawn.abs().max() < 5 * math.sqrt(rows * chance * (1 - chance))
