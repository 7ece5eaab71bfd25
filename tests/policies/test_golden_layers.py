"""Published methods against slow, obvious programs, written from their formulas in float64.

Nothing here uses what the library computes with: loops over rows, heads and tokens, one number at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvpolicy import (
    BudgetError,
    ExpectedAttention,
    LagRelative,
    ModelSpec,
    ParameterError,
    Policy,
    TopK,
    View,
    policies,
)
from kvpolicy.testing import make_view
from kvpolicy.testing.views import RowSpec, with_state


def some_view(policy: Policy, *, tokens: int, prompt: bool = True, **changes: object) -> View:
    """A float64 view of two rows as an engine shows it: slots in any order, one row with evicted tokens."""
    plan = policy.plan(ModelSpec(num_layers=2, max_new_tokens=8)).layers[0]
    second = RowSpec(tokens - 3, 0 if prompt else 5, 6, plan.budget, evictions=0 if prompt else 1, layer=1, prompt=4)
    rows = (RowSpec(tokens, 0, tokens, plan.budget), second if not prompt else RowSpec(tokens, 0, tokens, plan.budget))
    options = {"window": plan.window, "recent": plan.recent, "dtype": torch.float64, **changes}
    return make_view(rows=rows, heads=2, group=2, head_dim=6, value_dim=4, generator=5, **options)


def held(view: View, row: int, head: int) -> list[int]:
    """The slots in use, in position order, found by looking at positions alone."""
    positions = view.positions[row, head].tolist()
    return sorted((s for s, p in enumerate(positions) if p >= 0), key=lambda s: positions[s])


def kept(policy: Policy, view: View) -> list[list[set[int]]]:
    """The positions that a policy keeps, of each row and head."""
    mask = policy.select(view, with_state(policy, view))[0].mask
    rows, heads, _ = view.shape
    return [[set(view.positions[r, h][mask[r, h]].tolist()) for h in range(heads)] for r in range(rows)]


def best(numbers: dict[int, float], count: int, forced: set[int]) -> set[int]:
    """The positions of the highest numbers, the newest of equal ones, once those forced have their places."""
    free = sorted((p for p in numbers if p not in forced), key=lambda p: (numbers[p], p), reverse=True)
    return forced | set(free[: count - len(forced)])


def expected_sets(view: View, numbers: list[list[dict[int, float]]], budget: int, sinks: int) -> list[list[set[int]]]:
    """What stays by these numbers, the first tokens and the recent ones."""
    found = []
    for row, of_heads in enumerate(numbers):
        seen = int(view.seen[row])
        found.append(
            [
                best(of_head, min(budget, len(of_head)), {p for p in of_head if p < sinks or p >= seen - view.recent})
                for of_head in of_heads
            ]
        )
    return found


def attention(view: View, row: int, head: int, window: int) -> list[list[list[float]]]:
    """Probabilities of each query head of a group, each of its newest queries, each slot in position order."""
    assert view.queries is not None
    assert view.query_positions is not None
    group = view.queries.shape[1] // view.shape[1]
    slots, found = held(view, row, head), []
    for member in range(group):
        rows = []
        for w in range(view.queries.shape[2] - window, view.queries.shape[2]):
            at = int(view.query_positions[row, w])
            query = view.queries[row, head * group + member, w].tolist()
            logits = [
                sum(a * b for a, b in zip(query, view.keys[row, head, s].tolist(), strict=True)) * view.scaling
                if int(view.positions[row, head, s]) <= at
                else -math.inf
                for s in slots
            ]
            powers = [math.exp(x - max(logits)) for x in logits]
            rows.append([x / sum(powers) for x in powers])
        found.append(rows)
    return found


def pooled(numbers: Sequence[float], width: int, *, largest: bool = False) -> list[float]:
    """The mean, or the largest, of each number and its neighbours; nothing stands beyond the ends."""
    half, found = width // 2, []
    for i in range(len(numbers)):
        near = [numbers[j] for j in range(i - half, i + half + 1) if 0 <= j < len(numbers)]
        found.append(max(near) if largest else sum(near) / width)
    return found


@pytest.mark.parametrize("prompt", [True, False])
def test_curdkv(prompt: bool) -> None:
    policy = policies.curdkv(12, local=4, recent=3, interval=4)
    view = some_view(policy, tokens=19, prompt=prompt)
    numbers: list[list[dict[int, float]]] = []
    for row in range(2):
        numbers.append([])
        for head in range(2):
            slots = held(view, row, head)
            squares = [[sum(x * x for x in t[row, head, s].tolist()) for s in slots] for t in (view.keys, view.values)]
            local = [[of[i] / sum(of[i // 4 * 4 : i // 4 * 4 + 4]) for i in range(len(slots))] for of in squares]
            product = [a * b for a, b in zip(*local, strict=True)]
            numbers[-1].append({int(view.positions[row, head, s]): p for s, p in zip(slots, product, strict=True)})
    assert kept(policy, view) == expected_sets(view, numbers, 12, 4)


def lag_scores(states: list[list[float]], lag: int) -> list[list[float]]:
    """The softmaxed deviations of each partition but the last."""
    parts = [states[i : i + lag] for i in range(0, len(states) // lag * lag, lag)]
    found = []
    for part, following in itertools.pairwise(parts):
        low = [min(token[d] for token in following) for d in range(len(following[0]))]
        high = [max(token[d] for token in following) for d in range(len(following[0]))]
        deviations = []
        for token in part:
            scaled = [(x - a) / (b - a) for x, a, b in zip(token, low, high, strict=True)]
            mean = sum(scaled) / len(scaled)
            deviations.append(math.sqrt(sum((x - mean) ** 2 for x in scaled) / (len(scaled) - 1)))
        total = sum(math.exp(x) for x in deviations)
        found.append([math.exp(x) / total for x in deviations])
    return found


@pytest.mark.parametrize("prompt", [True, False])
def test_lagkv(prompt: bool) -> None:
    policy = policies.lagkv(14, lag=4, sinks=2, recent=3)
    view = some_view(policy, tokens=25, prompt=prompt)
    numbers: list[list[dict[int, float]]] = []
    for row in range(2):
        numbers.append([])
        for head in range(2):
            slots = held(view, row, head)
            positions = [int(view.positions[row, head, s]) for s in slots]
            first = sum(p < 2 for p in positions)
            of = [lag_scores([t[row, head, s].tolist() for s in slots[first:]], 4) for t in (view.keys, view.values)]
            of_head = dict.fromkeys(positions, 1.0)  # the first ones, the last partition and what is behind it
            for number, (by_key, by_value) in enumerate(zip(*of, strict=True)):
                both = [a + b for a, b in zip(by_key, by_value, strict=True)]
                for i, one in enumerate(both):
                    of_head[positions[first + 4 * number + i]] = sum(other < one for other in both) / 4
            numbers[-1].append(of_head)
    assert sum(n < 1 for n in numbers[0][0].values()) == 16  # four partitions of five are compared
    assert kept(policy, view) == expected_sets(view, numbers, 14, 2)


def test_lagkv_by_information_compares_partitions() -> None:
    view = make_view(rows=(RowSpec(10, fresh=10),), heads=1, head_dim=6, dtype=torch.float64, shuffle=False, spare=0)
    found = LagRelative(lag=4, sinks=0, ranked=False).score(view, None).values[0, 0].tolist()
    by_key, by_value = (lag_scores(t[0, 0].tolist(), 4)[0] for t in (view.keys, view.values))
    expected = [(a + b) / 2 for a, b in zip(by_key, by_value, strict=True)] + [1.0] * 6
    assert found == pytest.approx(expected, rel=1e-6)


def order(numbers: dict[tuple[int, int], float], keys: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs of head and position, the highest first, the newest of equal ones."""
    return sorted(keys, key=lambda key: (numbers[key], key[1]), reverse=True)


def test_adakv() -> None:
    policy = policies.adakv(8, window=3, pool=3, floor=0.5)
    view = some_view(policy, tokens=20, sinks=False)
    view_of_turn = share(view)
    for row in range(2):
        numbers: dict[tuple[int, int], float] = {}
        for head in range(2):
            slots = held(view, row, head)
            probabilities = attention(view, row, head, 3)
            mean = [sum(p[i] for member in probabilities for p in member) / 6 for i in range(len(slots))]
            for slot, one in zip(slots, pooled(mean, 3, largest=True), strict=True):
                numbers[head, int(view.positions[row, head, slot])] = one
        forced = {(head, p) for head, p in numbers if p >= 17}
        for head in range(2):  # each head keeps floor((8 - 3) / 2) of its own best beside the recent tokens
            forced |= set(order(numbers, (key for key in numbers if key[0] == head and key[1] < 17))[:2])
        rest = order(numbers, numbers.keys() - forced)
        whole = forced | set(rest[: 16 - len(forced)])
        found = kept(policy, view_of_turn)[row]
        assert found == [{p for head, p in whole if head == h} for h in range(2)]
        assert len(found[0]) != len(found[1])  # else a uniform budget would do


def share(view: View) -> View:
    """The view as it is shown where heads share their layer's slots."""
    most = int(view.lengths.max())
    rows = view.shape[0]
    return dataclasses.replace(view, sharing=torch.ones(rows, dtype=torch.bool), max_budget=most, max_victims=most)


def test_duo_attention() -> None:
    split = ((True, False), (False, False))
    policy = policies.duo_attention(15, split, sinks=2, recent=3)
    layers = policy.plan(ModelSpec(num_layers=2, num_heads=2)).layers
    assert [layer.heads for layer in layers] == [(15, 5), (5, 5)]
    view = some_view(policy, tokens=20)
    budget = torch.tensor([layer.heads for layer in layers])
    found = kept(policy, dataclasses.replace(view, budget=budget, max_budget=15, max_victims=15))
    streaming = {0, 1, 17, 18, 19}
    assert found[0][1] == found[1][0] == found[1][1] == streaming
    assert streaming < found[0][0]
    assert len(found[0][0]) == 15


def means(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each column."""
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("prompt", [True, False])
def test_cake(prompt: bool) -> None:
    policy = policies.cake(9, window=4, pool=3)
    view = some_view(policy, tokens=18, prompt=prompt, sinks=True)
    numbers: list[list[dict[int, float]]] = []
    for row in range(2):
        numbers.append([])
        for head in range(2):
            positions = [int(view.positions[row, head, s]) for s in held(view, row, head)]
            older = len([p for p in positions if p < int(view.seen[row]) - 4])
            of_group = []
            for member in attention(view, row, head, 4):
                mean = means(member)
                deviations = [[(x - m) ** 2 for x, m in zip(query, mean, strict=True)] for query in member]
                variance = [sum(column) / 3 for column in zip(*deviations, strict=True)]
                of_group.append(pooled([m + 200 * v for m, v in zip(mean, variance, strict=True)][:older], 3))
            found = means(of_group) + [0.0] * (len(positions) - older)
            numbers[-1].append(dict(zip(positions, found, strict=True)))
    assert kept(policy, view) == expected_sets(view, numbers, 9, 0)


def test_cake_shares_slots_over_layers_by_their_preferences() -> None:
    layers = policies.cake(100, preferences=(3, 1.0, 2), window=10).plan(ModelSpec(3, max_new_tokens=8)).layers
    assert [layer.budget for layer in layers] == [10 + 135, 10 + 45, 10 + 90]
    with pytest.raises(BudgetError, match="names 3 layers, and the model has 2"):
        policies.cake(100, preferences=(3, 1.0, 2)).plan(ModelSpec(2, max_new_tokens=8))
    with pytest.raises(BudgetError, match="leaves layer 1 nothing beside the last 32 tokens"):
        policies.cake(100, preferences=(3, 1e-9)).plan(ModelSpec(2, max_new_tokens=8))
    with pytest.raises(ParameterError, match=r"preferences\[1\] must be above 0"):
        policies.cake(100, preferences=(3, 0))


def projected(view: View, row: int, head: int, slot: int) -> float:
    """The sum of the absolute numbers that a value becomes, the mean over the group."""
    weight = view.output.weights[view.output.rows[row]].tolist()  # [hidden][Hq][Dv]
    value, group = view.values[row, head, slot].tolist(), view.queries.shape[1] // view.shape[1]
    total = 0.0
    for member in range(head * group, head * group + group):
        total += sum(abs(sum(a * b for a, b in zip(line[member], value, strict=True))) for line in weight)
    return total / group


@pytest.mark.parametrize("prompt", [True, False])
def test_criticalkv(prompt: bool) -> None:
    policy = policies.criticalkv(10, window=3, pool=3, epsilon=0.01)
    view = some_view(policy, tokens=20, prompt=prompt)
    expected: list[list[set[int]]] = []
    single: list[list[list[set[int]]]] = []
    for row in range(2):
        expected.append([])
        single.append([])
        seen = int(view.seen[row])
        for head in range(2):
            slots = held(view, row, head)
            positions = [int(view.positions[row, head, s]) for s in slots]
            received = pooled(means([query for member in attention(view, row, head, 3) for query in member]), 3)
            recent = {p for p in positions if p >= seen - 3}
            first = best(dict(zip(positions, received, strict=True)), 3 + 3, recent)  # floor((10 - 3) / 2) beside them
            weighed = {
                p: (one + 0.01) * projected(view, row, head, s)
                for p, s, one in zip(positions, slots, received, strict=True)
            }
            expected[-1].append(best(weighed, 10, first))
            single[-1].append(
                [best(weighed, 10, recent), best(dict(zip(positions, received, strict=True)), 10, recent)]
            )
    assert kept(policy, view) == expected
    for row in range(2):  # neither of the two stages alone would do, in either row
        for stage in range(2):
            assert [one[stage] for one in single[row]] != expected[row]


def test_defensivekv() -> None:
    policy = policies.defensivekv(8, window=3, pool=3, share=0.4)
    view = some_view(policy, tokens=20)
    for row in range(2):
        numbers: dict[tuple[int, int], float] = {}
        forced: set[tuple[int, int]] = set()
        norms = {
            (head, int(view.positions[row, head, s])): projected(view, row, head, s)
            for head in range(2)
            for s in held(view, row, head)
        }
        for head in range(2):
            older = [[query[:17] for query in member] for member in attention(view, row, head, 3)]
            worst = [0.0] * 17
            for query in itertools.chain(*older):
                smoothed = pooled(query, 3)
                again = [x / sum(smoothed) * sum(query) for x in smoothed]
                worst = [max(pair) for pair in zip(worst, again, strict=True)]
            worst = [max(x, sum(worst) / 17) for x in worst]
            for p, one in enumerate(worst):
                numbers[head, p] = one * norms[head, p] / (norms[0, p] + norms[1, p])
            mean = means(list(itertools.chain(*older)))
            reached = 0.0
            for p in sorted(range(17), key=lambda p: mean[p], reverse=True)[:5]:
                reached += mean[p] / sum(mean)
                if reached >= 0.4:
                    break
                forced.add((head, p))
        assert forced
        recent = {(head, p) for head in range(2) for p in (17, 18, 19)}
        left = 16 - len(recent | forced)
        whole = recent | forced | set(order(numbers, numbers.keys() - forced)[:left])
        assert kept(policy, share(view))[row] == [{p for head, p in whole if head == h} for h in range(2)]


def rotated(vector: Sequence[float], frequencies: Sequence[float], position: float) -> list[float]:
    """A vector turned to a position: elements i and D/2 + i are a pair."""
    half, out = len(vector) // 2, list(vector)
    for i, frequency in enumerate(frequencies):
        c, s = math.cos(position * frequency), math.sin(position * frequency)
        out[i], out[half + i] = vector[i] * c - vector[half + i] * s, vector[half + i] * c + vector[i] * s
    return out


def mean_rotation(frequencies: Sequence[float], positions: Sequence[int]) -> list[list[float]]:
    """The mean of the matrices that turn a vector to each of some positions."""
    dim = 2 * len(frequencies)
    total = [[0.0] * dim for _ in range(dim)]
    for position in positions:
        for column in range(dim):
            unit = [float(i == column) for i in range(dim)]
            for line, x in enumerate(rotated(unit, frequencies, position)):
                total[line][column] += x / len(positions)
    return total


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def expected_attention_of(view: View, row: int, head: int, *, window: int, future: int, sinks: int) -> dict[int, float]:
    """Scores by position, from mean and covariance matrices written out."""
    assert view.rotary is not None
    assert view.queries is not None
    assert view.query_positions is not None
    frequencies, seen = view.rotary[row].tolist(), int(view.seen[row])
    turn = mean_rotation(frequencies, range(seen, seen + future))
    slots = [s for s in held(view, row, head) if int(view.positions[row, head, s]) >= sinks]
    group = view.queries.shape[1] // view.shape[1]
    shares = [0.0] * len(slots)
    for member in range(head * group, head * group + group):
        plain = []
        for w in range(view.queries.shape[2] - window, view.queries.shape[2]):
            position = int(view.query_positions[row, w])
            if position >= sinks:
                plain.append(rotated(view.queries[row, member, w].tolist(), frequencies, -position))
        mean = means(plain)
        dim = range(len(mean))
        covariance = [[sum((q[i] - mean[i]) * (q[j] - mean[j]) for q in plain) / len(plain) for j in dim] for i in dim]
        half = [[dot(turn[i], [covariance[k][j] for k in dim]) for j in dim] for i in dim]
        covariance = [[dot(half[i], turn[j]) for j in dim] for i in dim]
        mean = [dot(line, mean) for line in turn]
        logits = []
        for s in slots:
            key = view.keys[row, head, s].tolist()
            quadratic = dot(key, [dot(line, key) for line in covariance])
            logits.append(dot(mean, key) * view.scaling + quadratic * view.scaling**2 / 2)
        powers = [math.exp(x - max(logits)) for x in logits]
        shares = [a + x / sum(powers) / group for a, x in zip(shares, powers, strict=True)]
    norms = [math.sqrt(dot(v, v)) for v in (view.values[row, head, s].tolist() for s in slots)]
    found = {int(view.positions[row, head, s]): a * n for s, a, n in zip(slots, shares, norms, strict=True)}
    return {**dict.fromkeys(range(sinks), max(found.values())), **found}


@pytest.mark.parametrize("prompt", [True, False])
def test_expected_attention(prompt: bool) -> None:
    policy = policies.expected_attention(11, window=6, future=5, sinks=2, recent=3)
    view = some_view(policy, tokens=17, prompt=prompt)
    numbers = [
        [expected_attention_of(view, row, head, window=6, future=5, sinks=2) for head in range(2)] for row in range(2)
    ]
    here = [[{int(p) for p in view.positions[r, h] if p >= 0} for h in range(2)] for r in range(2)]
    numbers = [
        [{p: n[p] for p in n if p in at} for n, at in zip(*two, strict=True)] for two in zip(numbers, here, strict=True)
    ]
    if prompt:  # the numbers themselves, where the state is that of the whole view
        state = policy.chain.scorer.update(view, with_state(policy, view)[0])
        found = policy.chain.scorer.score(view, state).values
        for s in held(view, 0, 1):  # the first tokens among them
            assert float(found[0, 1, s]) == pytest.approx(numbers[0][1][int(view.positions[0, 1, s])], rel=1e-5)
    assert kept(policy, view) == expected_sets(view, numbers, 11, 2)
    assert policy.chain.scorer is not None
    bare = Policy(policy.chain.scorer >> TopK(11), recent=3)  # no guard makes up for a wrong score
    assert kept(bare, view) == expected_sets(view, numbers, 11, 0)


@pytest.mark.parametrize("split", [(), (True, False), ((1, 0),), "ab", 3])
def test_duo_attention_refuses_what_is_no_split(split: object) -> None:
    with pytest.raises(ParameterError, match="a row of booleans for each layer"):
        policies.duo_attention(1024, split)


def test_expected_attention_keeps_the_first_tokens_that_it_leaves_out() -> None:
    """Without any guard they are not the first to go."""
    policy = Policy(ExpectedAttention(6, 5, sinks=2) >> TopK(7), recent=3)
    assert all({0, 1} <= head for row in kept(policy, some_view(policy, tokens=17)) for head in row)


class Largest(TorchDispatchMode):
    """Note the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and not func.is_view:
                self.size = max(self.size, one.numel() * one.element_size())
        return out


def test_expected_attention_keeps_to_the_workspace() -> None:
    """Queries are turned some heads at a time: nobody holds all of them in float64."""
    policy = policies.expected_attention(11, window=32, future=300, sinks=2, recent=3)
    rows = (RowSpec(40, 0, 40, 11),) * 6
    options = {"window": 32, "recent": 3, "heads": 4, "group": 2, "head_dim": 16, "value_dim": 4, "generator": 5}
    view = dataclasses.replace(make_view(rows=rows, dtype=torch.float32, **options), workspace=2**16)
    scorer = policy.chain.scorer
    state = scorer.update(view, with_state(policy, view)[0])
    with Largest() as watch:
        found = scorer.score(view, state)
    assert watch.size <= 2**16 // 4
    whole = scorer.score(dataclasses.replace(view, workspace=2**28), state)
    torch.testing.assert_close(found.values, whole.values)
