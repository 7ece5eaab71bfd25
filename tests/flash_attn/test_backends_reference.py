"""The reference backend is attention, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from kvpolicy.adapters.flash_attn.backends.reference import Reference
from tests.flash_attn.backend_cases import LAYOUTS, by_hand, case, ragged

CLOSE = {"rtol": 0, "atol": 1e-12}
REFERENCE = Reference()


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)])
def test_rows_of_different_lengths(layout: str, width: int, heads: tuple[int, int]) -> None:
    lengths = [0, 9, 27]
    c = case(layout, lengths, width, heads=heads)
    out, lse = REFERENCE.with_kvcache(
        c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths, block_table=c.block_table, return_lse=True
    )
    for row, (keys, values) in enumerate(c.rows):
        wanted, wanted_lse = by_hand(c.q[row], keys, values, causal=True)
        assert_close(out[row], wanted)
        assert_close(lse[row], wanted_lse)
        assert torch.equal(c.read(c.k_cache, row, len(keys)), keys)
        assert torch.equal(c.read(c.v_cache, row, len(keys)), values)
    assert c.lengths.tolist() == lengths  # read, and not incremented
    assert int(c.k_cache.isnan().logical_not().sum()) == sum(len(keys) for keys, _ in c.rows) * heads[1] * 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_numbers_and_no_mask(layout: str) -> None:
    c = case(layout, [3, 11], 4, value_dim=16)
    numbers = {"causal": False, "scale": 0.7, "softcap": 1.5}
    out, lse = REFERENCE.with_kvcache(
        c.q,
        c.k_cache,
        c.v_cache,
        c.k,
        c.v,
        cache_seqlens=c.lengths,
        block_table=c.block_table,
        return_lse=True,
        **numbers,
    )
    assert out.shape == (2, 4, 4, 16)
    for row, (keys, values) in enumerate(c.rows):
        wanted, wanted_lse = by_hand(c.q[row], keys, values, **numbers)
        assert_close(out[row], wanted)
        assert_close(lse[row], wanted_lse)


def test_nothing_new_and_one_length_for_all_rows() -> None:
    c = case("dense", [9, 9], 2)
    before = c.k_cache.clone()
    by_tensor = REFERENCE.with_kvcache(c.q, c.k_cache, c.v_cache, cache_seqlens=c.lengths)
    by_number = REFERENCE.with_kvcache(c.q, c.k_cache, c.v_cache, cache_seqlens=9)
    assert torch.equal(by_tensor, by_number)
    assert_close(by_tensor[0], by_hand(c.q[0], c.rows[0][0][:9], c.rows[0][1][:9], causal=True)[0])
    assert torch.equal(c.k_cache.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("causal", [True, False])
def test_a_query_without_keys_has_zeros_and_gives_no_probability(causal: bool) -> None:
    c = case("dense", [0, 1], 3)
    out, lse = REFERENCE.with_kvcache(
        c.q, c.k_cache, c.v_cache, cache_seqlens=c.lengths, causal=causal, return_lse=True
    )
    alone = torch.tensor([[True] * 3, [causal, causal, False]])
    assert torch.equal(out.abs().sum((2, 3)) == 0, alone)
    assert torch.equal((lse == torch.inf).all(1), alone)
    assert not out.isnan().any()


def test_addresses_stay() -> None:
    c = case("transposed", [4, 2], 1)
    before = (c.k_cache.data_ptr(), c.v_cache.data_ptr(), c.lengths.data_ptr())
    for step in range(3):
        REFERENCE.with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths)
        c.lengths += 1
        assert torch.equal(c.k_cache[0, 4 + step], c.k[0, 0])
    assert (c.k_cache.data_ptr(), c.v_cache.data_ptr(), c.lengths.data_ptr()) == before


# Against torch


@pytest.mark.parametrize("width", [1, 6])
def test_against_sdpa(width: int) -> None:
    c = case("transposed", [14, 14], width, dtype=torch.float32)
    out = REFERENCE.with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths)
    total = 14 + width
    wanted = F.scaled_dot_product_attention(
        c.q.transpose(1, 2),
        c.k_cache[:, :total].transpose(1, 2),
        c.v_cache[:, :total].transpose(1, 2),
        attn_mask=causal_lower_right(width, total),
        enable_gqa=True,
    )
    torch.testing.assert_close(out.transpose(1, 2), wanted, rtol=0, atol=1e-6)


def test_lse_against_the_kernel_of_the_cpu() -> None:
    c = case("transposed", [12, 12], 1, heads=(2, 2), dtype=torch.float32)
    out, lse = REFERENCE.with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths, return_lse=True)
    keys, values = (cache[:, :13].transpose(1, 2) for cache in (c.k_cache, c.v_cache))
    wanted, wanted_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(c.q.transpose(1, 2), keys, values)
    torch.testing.assert_close(out.transpose(1, 2), wanted, rtol=0, atol=1e-6)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, wanted_lse.view_as(lse), rtol=0, atol=1e-6)
    logits = c.q.transpose(1, 2) @ keys.transpose(2, 3) * 8**-0.5
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    c = case("dense", [25], 2, dtype=dtype)
    out, lse = REFERENCE.with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths, return_lse=True)
    wanted, wanted_lse = by_hand(c.q[0], *c.rows[0], causal=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out[0].double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)  # one rounding
    torch.testing.assert_close(lse[0].double(), wanted_lse, rtol=0, atol=1e-5)


# Sequences behind each other


@pytest.mark.parametrize("causal", [True, False])
def test_varlen_with_gaps(causal: bool) -> None:
    tensors, numbers, sequences = ragged([7, 0, 20, 3], [2, 1, 5, 3])
    out, lse = REFERENCE.varlen(**tensors, **numbers, causal=causal, softcap=2.0, return_lse=True)
    assert (out.shape, lse.shape) == ((11, 4, 8), (4, 11))
    for i, (q, k, v) in enumerate(sequences):
        at = slice(*tensors["cu_seqlens_q"][i : i + 2].tolist())
        wanted, wanted_lse = by_hand(q, k, v, causal=causal, softcap=2.0)
        assert_close(out[at], wanted)
        assert_close(lse[:, at], wanted_lse)


def test_varlen_without_gaps() -> None:
    tensors, numbers, sequences = ragged([7, 4], [2, 2], gap=0)
    del tensors["seqused_k"]
    out = REFERENCE.varlen(**tensors, **numbers, causal=True)
    for i, (q, k, v) in enumerate(sequences):
        assert_close(out[2 * i : 2 * i + 2], by_hand(q, k, v, causal=True)[0])


@pytest.mark.parametrize("given", ["seqused_k", "cu_seqlens_k"])
def test_varlen_over_pages(given: str) -> None:
    c = case("paged", [6, 17], 2)
    wanted = REFERENCE.with_kvcache(
        c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths, block_table=c.block_table
    )
    used = {"seqused_k": c.lengths + 2} if given == "seqused_k" else {}
    found = REFERENCE.varlen(
        c.q.flatten(0, 1),
        c.k_cache,
        c.v_cache,
        cu_seqlens_q=torch.tensor([0, 2, 4], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 0, 0] if used else [0, 8, 27], dtype=torch.int32),
        max_seqlen_q=2,
        max_seqlen_k=32,
        block_table=c.block_table,
        causal=True,
        **used,
    )
    assert_close(found, wanted.flatten(0, 1))


def test_every_head_with_its_own_length() -> None:
    """A ragged layer: each KV head of each row is a sequence of one KV head, its group the query heads."""
    lengths, group = [[5, 9], [1, 12]], 3
    flat = [length for row in lengths for length in row]
    tensors, numbers, sequences = ragged(flat, [1] * 4, heads=(group, 1))
    out = REFERENCE.varlen(**tensors, **numbers, causal=True).view(2, 1, 2 * group, 8)
    for row in range(2):
        for head in range(2):
            wanted, _ = by_hand(*sequences[2 * row + head], causal=True)
            assert_close(out[row, :, head * group : (head + 1) * group], wanted)


# Without waiting


def test_no_number_is_read_from_the_device() -> None:
    """Tensors without memory have no numbers that anybody could wait for."""
    for layout in LAYOUTS:
        c = case(layout, [3, 7], 2)
        q, k, v, keys, values, lengths = (x.to("meta") for x in (c.q, c.k, c.v, c.k_cache, c.v_cache, c.lengths))
        table = None if c.block_table is None else c.block_table.to("meta")
        out = REFERENCE.with_kvcache(q, keys, values, k, v, cache_seqlens=lengths, block_table=table)
        assert out.shape == q.shape
    tensors, numbers, _ = ragged([7, 2], [2, 1])
    out = REFERENCE.varlen(**{name: x.to("meta") for name, x in tensors.items()}, **numbers, causal=True)
    assert out.shape == (3, 4, 8)
