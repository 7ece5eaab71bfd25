"""Decoding and evicting never wait for the device."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from kvpolicy.adapters.flash_attn import FlashCache, evict_
from kvpolicy.host import on_device
from kvpolicy.policies import knorm
from tests.flash_attn.no_wait import Waited, no_wait
from tests.flash_attn.own import Own
from tests.hf.test_heads import POLICIES as HEADS
from tests.hf.zoo import zoo

ZOO = zoo(24)


def given(pages: torch.Tensor, count: int) -> torch.Tensor:
    return pages[:count]


def new(width: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (torch.randn(rows, width, heads, 8) for heads in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize("counts", [[40, 40], [40, 31]], ids=["even", "uneven"])
@pytest.mark.parametrize("name", ZOO)
def test_a_flash_cache(name: str, counts: list[int]) -> None:
    sizes = {"num_layers": 2, "num_heads": 2, "num_query_heads": 4, "head_dim": 8, "batch_size": 2}
    cache = FlashCache(ZOO[name], dtype=torch.float32, **sizes)
    with no_wait():
        for width in [40] + [1] * 17 + [5] + [1] * 9:
            for layer in range(2):
                cache.attend(layer, *new(width), counts if width == 40 else None)
            cache.step()
    assert min(cache.receipt().evictions) >= 4


@pytest.mark.parametrize("name", ["vase, split", "h2o, split", "vase, adaptive"])
def test_heads_of_different_budgets(name: str) -> None:
    """Only the eviction that shares a layer over its heads reads how it was shared."""
    sizes = {"num_layers": 2, "num_heads": 2, "num_query_heads": 4, "head_dim": 8, "batch_size": 2}
    with no_wait():  # counts of heads are tensors of the host: let it see them made
        cache = FlashCache(HEADS[name], dtype=torch.float32, **sizes)
    shared = nullcontext() if "adaptive" in name else no_wait()
    for widths, waiting in (([40], shared), ([1] * 17 + [5] + [1] * 9, no_wait())):
        with waiting:
            for width in widths:
                for layer in range(2):
                    cache.attend(layer, *new(width), [40, 31] if width == 40 else None)
                cache.step()
    assert min(cache.receipt().evictions) >= 4


@pytest.mark.parametrize("layout", ["dense", "one tensor", "paged 7", "paged in one"])
@pytest.mark.parametrize("name", ["vase", "h2o", "knorm", "mixture"])
def test_caches_of_the_caller(name: str, layout: str) -> None:
    own = Own(layout, ZOO[name], (2, 2, 60, 4, 2, 8), torch.float32)
    refs = None
    if own.table is not None:  # somebody holds the first page of row 0, too
        refs = torch.ones_like(own.table).tolist()
        refs[0][0] = 2
    evictions = 0
    for counts in [[40, 31]] + [[1, 1]] * 17:
        own.begin(counts)
        for layer in range(2):
            q, k, v = new(max(counts))
            observed, own.state.observe = own.state.observe, lambda *_, **__: None  # type: ignore[method-assign]
            own.attend(layer, q, k, v)
            own.state.observe = observed  # type: ignore[method-assign]
            if own.state.asks_queries:
                with no_wait():
                    own.state.observe(layer, q, counts)
        own.seqlens += torch.tensor(counts, dtype=torch.int32)
        spare = torch.tensor(own.free[-1:])
        with no_wait():
            done = evict_(*own.given, own.seqlens, own.policy, own.state, tokens=counts, block_table=own.table,
                          page_refs=refs, allocate=partial(given, spare))  # fmt: skip
        if refs is not None and done:
            own.free.pop()
        evictions += any(done.rows)
        if done.freed is not None:
            own.free += done.freed.tolist()
    assert evictions >= 3


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: bool(x),
        lambda x: int(x),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: torch.nonzero(x),
        lambda x: torch.ones(1)[x[None] > 0],
        lambda x: torch.equal(x, x),
        lambda x: on_device([1], x.device).item(),
        lambda x: torch.tensor([1], device=x.device),
    ],
)
def test_whatever_waits_is_noticed(wait: Any) -> None:
    with no_wait(), pytest.raises(Waited):
        wait(torch.ones(()))


def test_counts_of_the_host_may_be_read() -> None:
    with no_wait():
        assert int((torch.tensor([3, 4]) - torch.tensor([1, 1])).max()) == 3


def test_a_policy_that_waits_is_noticed() -> None:
    policy = knorm(8, interval=4, recent=2)

    class Waits:
        needs, plan, init = policy.needs, policy.plan, policy.init

        def select(self, view: Any, state: Any) -> Any:
            view.lengths.max().item()
            return policy.select(view, state)

    cache = FlashCache(Waits(), num_layers=1, num_heads=2, num_query_heads=4, head_dim=8, dtype=torch.float32)
    with no_wait(), pytest.raises(Waited, match="item"):
        cache.attend(0, *new(12, 1))
