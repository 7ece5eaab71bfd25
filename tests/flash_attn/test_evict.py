"""Evicting from tensors that a caller owns gives what a full cache gives in which the evicted tokens are hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy import Policy
from kvpolicy.policies import knorm
from tests.flash_attn.llama import forward
from tests.flash_attn.own import LAYOUTS, Own
from tests.flash_attn.test_flash_cache import padded
from tests.hf.zoo import zoo
from tests.models import tiny
from tests.oracle import Oracle

ZOO = zoo(24)


def owned(layout: str, model: Any, policy: Policy, batch: int, slots: int = 60, **options: Any) -> Own:
    c = model.config
    shape = (c.num_hidden_layers, batch, slots, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    return Own(layout, policy, shape, model.dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["vase", "snapkv", "h2o", "streaming_llm", "knorm"])
def test_it_agrees_with_the_oracle(name: str, layout: str, dtype: torch.dtype) -> None:
    model, lengths = tiny("llama", dtype), [40, 33, 9]
    (tokens, mask), counts = padded(lengths), lengths
    lse = layout in ("dense", "paged 7")  # queries come with what the kernel says of them
    oracle, own = Oracle(model, ZOO[name]), owned(layout, model, ZOO[name], 3, lse=lse)
    held = [own.k.data_ptr(), own.v.data_ptr(), own.seqlens.data_ptr()]
    tensors = [t.data_ptr() for t in own.state.store.tensors()]
    worst = scale = 0.0
    for step in range(70):
        expected = oracle.forward(tokens, mask)
        if name == "h2o" and tokens.shape[1] > 1 and step:
            own.look()
        own.begin(counts)
        found = forward(model, tokens, own.state.next_positions(tokens.shape[1], counts), own.attend)
        own.end()
        worst = max(worst, (found - expected).abs().max().item())
        scale = max(scale, expected.abs().max().item())
        tokens = expected.argmax(-1, keepdim=True)
        if step == 40:  # a later turn
            tokens = tokens.repeat(1, 7)
        counts = [tokens.shape[1]] * 3
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        assert own.seqlens.tolist() == own.state.lengths
        receipt = own.state.receipt()
        for layer in receipt.layers:
            assert torch.equal(receipt.positions(layer), oracle.kept(layer)), f"layer {layer}"
    own.state.check_integrity()
    assert min(own.state.receipt().evictions) >= 5
    assert held == [own.k.data_ptr(), own.v.data_ptr(), own.seqlens.data_ptr()]
    assert tensors == [t.data_ptr() for t in own.state.store.tensors()]
    assert worst <= (1e-12 if dtype == torch.float64 else 1e-6) * max(1.0, scale)
    if own.table is not None:  # no page was lost, and none was given twice
        used = [own.table[r, at].item() for r in range(3) for at in range(-(-own.state.lengths[r] // own.page))]
        assert sorted([*used, *own.free]) == list(range(own.k.shape[1]))


def test_freed_pages_are_those_behind_what_stays() -> None:
    own = Own("paged 4", knorm(8, interval=4, recent=2), (1, 2, 32, 2, 1, 8), torch.float32)
    assert own.table is not None
    own.begin([23, 9])
    own.seqlens += torch.tensor([23, 9], dtype=torch.int32)
    own.k.normal_()
    own.seqlens.zero_()
    before = own.table.clone()
    done = own.end()
    assert done.rows == (True, True)
    assert done.freed is not None
    assert done.freed.tolist() == [*before[0, 2:6].tolist(), before[1, 2].item()]
    assert own.table.equal(before)


def test_pages_that_others_hold_are_copied_first() -> None:
    own = Own("paged 4", knorm(8, interval=4, recent=2), (2, 2, 16, 2, 1, 8), torch.float32)
    assert own.table is not None
    own.k.normal_()
    own.v.normal_()
    own.begin([14, 14])
    own.free += [int(own.table[1, 0])]
    own.table[1, 0] = own.table[0, 0]  # a common beginning
    shared = int(own.table[0, 0])
    third = int(own.table[0, 3])  # held by somebody else, too, and not written: it lies behind what stays
    refs = torch.ones_like(own.table)
    refs[:, 0], refs[0, 3] = 2, 2
    before = own.k.clone(), own.v.clone(), own.table.clone()
    asked = []

    def allocate(count: int) -> list[int]:
        asked.append(count)
        return [own.free.pop() for _ in range(count)]

    alone = Own("dense", own.policy, (2, 2, 16, 2, 1, 8), torch.float32)
    for mine, pages in ((alone.k, own.k), (alone.v, own.v)):
        mine.copy_(pages[:, own.table.long()].flatten(2, 3))
    alone.begin([14, 14])
    alone.end()
    own.counts = [14, 14]
    done = own.end(page_refs=refs, allocate=allocate)
    assert asked == [2]
    for now, then in zip((own.k, own.v), before, strict=False):
        assert now[:, shared].equal(then[:, shared])
        assert now[:, third].equal(then[:, third])
    for mine, pages in ((alone.k, own.k), (alone.v, own.v)):
        assert mine[:, :, :8].equal(pages[:, own.table.long()].flatten(2, 3)[:, :, :8])
    assert done.freed is not None
    assert sorted(done.freed.tolist()) == sorted([shared, shared, *before[2][:, 2:].flatten().tolist()])


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    layout=st.sampled_from(LAYOUTS),
    layers=st.integers(1, 2),
    steps=st.lists(st.integers(1, 6), max_size=12),
)
def test_a_row_never_holds_more_than_its_budget_and_an_interval(
    lengths: list[int], layout: str, layers: int, steps: list[int]
) -> None:
    with torch.no_grad():
        own = Own(layout, knorm(8, interval=4, recent=2), (layers, len(lengths), 60, 2, 1, 4), torch.float32)
        generator = torch.Generator().manual_seed(0)
        full: list[list[Any]] = [[[] for _ in lengths] for _ in range(layers)]
        for counts in [lengths, *([n] * len(lengths) for n in steps)]:
            own.begin(counts)
            for layer in range(layers):
                q, k, v = (torch.randn(len(lengths), max(counts), h, 4, generator=generator) for h in (2, 1, 1))
                own.attend(layer, q, k, v)
                for r, count in enumerate(counts):
                    full[layer][r] += list(zip(k[r, -count:, 0], v[r, -count:, 0], strict=True))
            decoded = set(counts) == {1} and min(own.state.seen) > 0
            own.end()
            assert max(own.state.lengths) <= (12 if decoded else 60)
            if not decoded:
                assert max(own.state.lengths) <= 8 or max(own.state.seen) <= 8
            positions = own.state.store.positions
            own.state.store.settle()
            for layer in range(layers):
                for r, length in enumerate(own.state.lengths):
                    for slot in range(length):
                        a, b = own.where(r, slot)
                        k, v = full[layer][r][int(positions[layer, r, 0, slot])]
                        assert own.k[layer, a, b, 0].equal(k)
                        assert own.v[layer, a, b, 0].equal(v)
        own.state.check_integrity()
