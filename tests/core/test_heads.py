"""Heads on several ranks: sums and decisions equal those of one device, to the last bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor

from kvpolicy import LastQuery, LayerSpec, Normalize, Policy, Stochastic, TopK, ValueNorm, View, maximum
from tests.core.views import view_of

B, H, S, D, W = 2, 4, 40, 8, 4


def several(shares: list[int], run: Callable[[int, int, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
    """Run one thread a rank; each is told its first head, its share, and what sums over all ranks."""
    meeting = Barrier(len(shares), timeout=20)
    brought: dict[int, Tensor] = {}

    def rank(index: int) -> Tensor:
        def all_reduce(t: Tensor) -> Tensor:
            brought[index] = t
            meeting.wait()
            total = sum(brought[r] for r in range(len(shares)))
            meeting.wait()
            assert isinstance(total, Tensor)
            return total

        return run(sum(shares[:index]), shares[index], all_reduce)

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(rank, range(len(shares))))


def shuffled() -> View:
    """Return a view whose heads hold other tokens, each in an order of its own."""
    torch.manual_seed(0)
    keys, values, queries = (torch.randn(B, h, n, D, dtype=torch.float64) for h, n in ((H, S), (H, S), (2 * H, W)))
    view = view_of(keys, values, budget=12, recent=4, queries=queries)
    held = torch.stack([torch.randperm(2 * S - 4)[:S] for _ in range(B * H)]).view(B, H, S)
    order = held.argsort(-1)
    held = held.scatter(-1, order[..., -4:], torch.arange(2 * S - 4, 2 * S).expand(B, H, 4))
    return dataclasses.replace(
        view,
        positions=held.int(),
        order=order.int(),
        seen=torch.full((B,), 2 * S),
        query_positions=torch.arange(2 * S - W, 2 * S).int().expand(B, -1),
    )


def part(view: View, first: int, share: int, all_reduce: Callable[[Tensor], Tensor]) -> View:
    heads = slice(first, first + share)
    names = ("keys", "values", "positions", "order", "fresh", "budget", "lengths")
    some = {name: getattr(view, name)[:, heads] for name in names}
    assert view.queries is not None
    some["queries"] = view.queries[:, 2 * first : 2 * (first + share)]
    return dataclasses.replace(view, **some, head_offset=first, all_reduce=all_reduce)


def spec(heads: int) -> LayerSpec:
    return LayerSpec(heads, 2 * heads, D, D, S, torch.float64, torch.device("cpu"))


def test_gathered_heads_are_those_of_the_model() -> None:
    view = shuffled()
    for shares in ([2, 2], [1, 3], [1, 1, 1, 1]):
        found = several(shares, lambda *mine: part(view, *mine).gather_heads(part(view, *mine).order))
        assert all(torch.equal(one, view.order) for one in found)


def test_ranks_decide_as_one_device_does() -> None:
    view = shuffled()
    scorer = maximum(LastQuery() >> Normalize("z"), ValueNorm() >> Normalize("z"))
    policy = Policy(scorer >> Stochastic() >> TopK(12), recent=4)
    state = policy.init(spec(H), B)
    expected = policy.select(view, state)[0].mask
    scores = LastQuery().score(view, None).values
    assert not torch.equal(scores[:, 0], scores[:, 1])

    for shares in ([2, 2], [1, 3], [1, 1, 1, 1]):
        found = several(shares, lambda *mine: LastQuery().score(part(view, *mine), None).values)
        assert torch.equal(torch.cat(found, 1), scores)
        found = several(shares, lambda *mine: policy.select(part(view, *mine), policy.init(spec(mine[1]), B))[0].mask)
        assert torch.equal(torch.cat(found, 1), expected)
