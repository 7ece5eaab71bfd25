"""What does not fit is refused with its own words, and nothing is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvpolicy.adapters.flash_attn.backends.engines import installed
from kvpolicy.adapters.flash_attn.backends.features import TABLE
from kvpolicy.adapters.flash_attn.backends.reference import Reference
from kvpolicy.adapters.flash_attn.backends.torch_varlen import TorchVarlen
from kvpolicy.errors import UnsupportedError, UsageError
from tests.flash_attn.backend_cases import Case, case, ragged

REFERENCE = Reference()
INT = torch.int32


def call(c: Case, **changed: Any) -> Any:
    given = {
        "q": c.q,
        "k_cache": c.k_cache,
        "v_cache": c.v_cache,
        "k": c.k,
        "v": c.v,
        "cache_seqlens": c.lengths,
        "block_table": c.block_table,
    }
    return REFERENCE.with_kvcache(**{**given, **changed})


DENSE: dict[str, tuple[dict[str, Any], str]] = {
    "rank of q": ({"q": torch.zeros(2, 4, 8)}, r"q has shape \(2, 4, 8\); it is \[B, T, Hq, D\]"),
    "rank of a cache": ({"v_cache": torch.zeros(2, 4, 8)}, r"v_cache has shape .*\[B, S, Hkv, D\]"),
    "rank of k": ({"k": torch.zeros(2, 2, 8)}, r"k has shape .*\[B, T, Hkv, D\]"),
    "nothing": ({"q": torch.zeros(2, 0, 4, 8)}, "nothing in it"),
    "no tensor": ({"q": [1.0]}, "q is a list"),
    "integers": ({"q": torch.zeros(2, 2, 4, 8, dtype=INT)}, "floating-point"),
    "dtype": ({"k_cache": torch.zeros(2, 32, 2, 8)}, r"k_cache is torch.float32 and q torch.float64"),
    "dtype of v": ({"v": torch.zeros(2, 2, 2, 8)}, r"v is torch.float32 and q"),
    "device": ({"v": torch.zeros(2, 2, 2, 8, device="meta", dtype=torch.float64)}, "v is on meta and q on cpu"),
    "heads": ({"q": torch.zeros(2, 2, 3, 8).double()}, "q has 3 heads, no multiple of the 2 heads"),
    "head_dim": ({"q": torch.zeros(2, 2, 4, 16).double()}, "k_cache has head_dim 8 and q 16"),
    "caches differ": ({"v_cache": torch.zeros(2, 31, 2, 8).double()}, "only the last may differ"),
    "rows": ({"q": torch.zeros(3, 2, 4, 8).double()}, "k_cache has 2 rows and q 3"),
    "k alone": ({"v": None}, "k is given without v"),
    "v alone": ({"k": None}, "v is given without k"),
    "other width": ({"k": torch.zeros(2, 1, 2, 8).double()}, r"k has shape \(2, 1, 2, 8\), and q with k_cache make it"),
    "strides": ({"q": torch.zeros(2, 2, 8, 4).double().transpose(2, 3)}, "its last must be 1"),
    "strides of a cache": ({"k_cache": torch.zeros(2, 32, 8, 2).double().transpose(2, 3)}, "k_cache has strides"),
    "shared slots": (
        {"k_cache": torch.zeros(1, 32, 2, 8).double().expand(2, -1, -1, -1)},
        "several slots share memory",
    ),
    "gradient": ({"q": torch.zeros(2, 2, 4, 8, dtype=torch.float64, requires_grad=True)}, "torch.no_grad"),
    "length dtype": ({"cache_seqlens": torch.zeros(2, dtype=torch.int64)}, r"cache_seqlens is torch.int64.*\.to\("),
    "length shape": ({"cache_seqlens": torch.zeros(2, 1, dtype=INT)}, r"cache_seqlens has shape \(2, 1\)"),
    "length device": ({"cache_seqlens": torch.zeros(2, dtype=INT, device="meta")}, "cache_seqlens is on meta"),
    "length strides": ({"cache_seqlens": torch.zeros(4, dtype=INT)[::2]}, "without gaps"),
    "length kind": ({"cache_seqlens": [1, 2]}, r"write a tensor \[B\] of int32"),
    "length bool": ({"cache_seqlens": True}, "cache_seqlens=True"),
    "too long": ({"cache_seqlens": torch.tensor([3, 31], dtype=INT)}, "with 2 new tokens.* 0 to the 32 slots"),
    "negative": ({"cache_seqlens": torch.tensor([-1, 3], dtype=INT)}, "0 to the 32 slots"),
    "number too long": ({"cache_seqlens": 31}, "cache_seqlens=31"),
    "number negative": ({"cache_seqlens": -1}, "cache_seqlens=-1"),
    "scale": ({"scale": float("nan")}, "scale=nan"),
    "softcap": ({"softcap": 0.0}, "softcap=0.0.*None"),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str) -> None:
    changed, text = DENSE[name]
    c = case("dense", [3, 5], 2)
    before = [x.clone() for x in (c.k_cache, c.v_cache)]
    with pytest.raises(UsageError, match=text), torch.enable_grad():
        call(c, **changed)
    for cache, was in zip((c.k_cache, c.v_cache), before, strict=True):
        assert torch.equal(cache.nan_to_num(7), was.nan_to_num(7))


PAGED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"block_table": torch.zeros(2, dtype=INT)}, r"block_table is \[B, max_blocks\]"),
    "rows": ({"block_table": torch.zeros(3, 4, dtype=INT)}, r"block_table has shape \(3, 4\)"),
    "dtype": ({"block_table": torch.zeros(2, 4, dtype=torch.int64)}, "block_table is torch.int64"),
    "device": ({"block_table": torch.zeros(2, 4, dtype=INT, device="meta")}, "block_table is on meta"),
    "no page": ({"block_table": torch.tensor([[0, -1], [1, 2]], dtype=INT)}, "a page that is none of the 11"),
    "page beyond": ({"block_table": torch.tensor([[0, 11], [1, 2]], dtype=INT)}, "a page that is none of the 11"),
    "too long": ({"block_table": torch.tensor([[0], [1]], dtype=INT)}, "0 to the 8 slots"),
    "rank of cache": ({"k_cache": torch.zeros(2, 4, 8)}, r"\[blocks, page, Hkv, D\]"),
}


@pytest.mark.parametrize("name", PAGED)
def test_paged(name: str) -> None:
    changed, text = PAGED[name]
    with pytest.raises(UsageError, match=text):
        call(case("paged", [7, 3], 2), **changed)


VARLEN: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"q": torch.zeros(1, 3, 4, 8).double()}, r"q has shape .*\[total_q, Hq, D\]"),
    "values": ({"v": torch.zeros(5, 2, 8).double()}, "only the last may differ"),
    "offsets": ({"cu_seqlens_q": torch.zeros(1, dtype=INT)}, r"cu_seqlens_q is \[N \+ 1\]"),
    "offsets of k": ({"cu_seqlens_k": torch.zeros(2, dtype=INT)}, "cu_seqlens_k has shape"),
    "offset dtype": ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int64)}, "cu_seqlens_k is torch.int64"),
    "used shape": ({"seqused_k": torch.zeros(3, dtype=INT)}, "seqused_k has shape"),
    "maximum": ({"max_seqlen_q": 0}, "max_seqlen_q=0"),
    "maximum of k": ({"max_seqlen_k": torch.tensor(7)}, "would have to be waited for"),
    "end": ({"cu_seqlens_q": torch.tensor([0, 2, 4], dtype=INT)}, "ascend from 0 to the 3 queries"),
    "descending": ({"cu_seqlens_q": torch.tensor([0, 4, 3], dtype=INT)}, "does not ascend"),
    "more queries": ({"max_seqlen_q": 1}, "max_seqlen_q=1"),
    "more keys": ({"max_seqlen_k": 6}, "max_seqlen_k=6"),
    "fewer than none": ({"seqused_k": torch.tensor([-1, 1], dtype=INT)}, "fewer than 0 keys"),
    "leaves k": ({"cu_seqlens_k": torch.tensor([0, 14, 16], dtype=INT)}, "leaves the 15 rows of k"),
}


@pytest.mark.parametrize("name", VARLEN)
def test_varlen(name: str) -> None:
    changed, text = VARLEN[name]
    tensors, numbers, _ = ragged([7, 2], [2, 1])
    with pytest.raises(UsageError, match=text):
        REFERENCE.varlen(**{**tensors, **numbers, **changed}, causal=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rotary_cos", "evictions move slots.*rotate q and k"),
        ("rotary_sin", "rotate q and k"),
        ("window_size", "a window counts slots"),
        ("alibi_slopes", "no right way"),
        ("cache_leftpad", "pads never enter"),
        ("cache_batch_idx", "index the cache"),
        ("softmax_scale", "write scale="),
        ("return_softmax_lse", "write return_lse="),
    ],
)
def test_arguments_that_are_wrong_on_a_compacted_cache(name: str, text: str) -> None:
    tensors, numbers, _ = ragged([7, 2], [2, 1])
    with pytest.raises(UnsupportedError, match=f"{name}= is not taken: .*{text}"):
        call(case("dense", [3], 1), **{name: torch.zeros(3)})
    with pytest.raises(UnsupportedError, match=f"{name}= is not taken"):
        REFERENCE.varlen(**tensors, **numbers, causal=True, **{name: None})
    with pytest.raises(TypeError, match="'colour'"):
        call(case("dense", [3], 1), colour=1)


def test_the_device_is_told_what_to_insist_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU, nobody waits: the device stops by itself, with the text."""
    said: list[str] = []
    monkeypatch.setattr(torch, "_assert_async", lambda right, text: said.append(text))
    c = case("paged", [3, 5], 2)
    meta = {name: getattr(c, name).to("meta") for name in ("q", "k", "v", "k_cache", "v_cache", "block_table")}
    call(c, **meta, cache_seqlens=c.lengths.to("meta"))
    assert [text.split(",")[0] for text in said] == [
        "the lengths in cache_seqlens",
        "block_table names a page that is none of the 11",
    ]
    tensors, numbers, _ = ragged([7, 2], [2, 1])
    REFERENCE.varlen(**{name: x.to("meta") for name, x in tensors.items()}, **numbers, causal=True)
    assert len(said) == 5


def test_lengths_are_not_checked_where_that_is_switched_off() -> None:
    unchecked = replace(REFERENCE, check_lengths=False)
    c = case("dense", [3, 5], 2)
    with pytest.raises(IndexError):  # torch's own, on the CPU
        unchecked.with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=torch.tensor([3, 40], dtype=INT))


# What kernels cannot do, by the table


@pytest.fixture
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "torch", replace(TABLE["torch"], devices=None))


@pytest.mark.usefixtures("kernels_on_the_cpu")
@pytest.mark.parametrize(
    ("changed", "numbers", "text"),
    [
        ({"dtype": torch.float32}, {}, "it takes float16 and bfloat16 only"),
        ({"dim": 12}, {}, "its head_dim is a multiple of 8 up to 256"),
        ({"dim": 264}, {}, "its head_dim is a multiple of 8 up to 256"),
        ({"value_dim": 16}, {}, "it has no value_dim"),
        ({}, {"softcap": 3.0}, "it has no softcap"),
        ({"layout": "paged"}, {}, "multiple of 256 tokens"),
    ],
)
def test_kernels_say_what_they_lack(changed: dict[str, Any], numbers: dict[str, Any], text: str) -> None:
    c = case(**{"layout": "dense", "lengths": [3], "width": 1, "dtype": torch.bfloat16, **changed})
    with pytest.raises(UnsupportedError, match=f"backend 'torch' cannot serve .*{text}.*select_backend"):
        TorchVarlen().with_kvcache(
            c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths, block_table=c.block_table, **numbers
        )
    assert c.k_cache.isnan().sum() == c.k_cache.numel() - 3 * 2 * c.q.shape[-1]  # the new token was not written


def test_kernels_need_their_device() -> None:
    assert installed("torch").version is not None
    c = case("dense", [3], 1, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="it runs on cuda only"):
        TorchVarlen().with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths)


@pytest.mark.usefixtures("kernels_on_the_cpu")
def test_kernels_read_several_elements_at_once() -> None:
    c = case("dense", [3], 1, dtype=torch.bfloat16)
    odd = torch.zeros(1, 32, 2, 9, dtype=torch.bfloat16)[..., 1:]
    with pytest.raises(UsageError, match=r"k_cache begins at element 1 .*multiples of 8"):
        TorchVarlen().with_kvcache(c.q, odd, c.v_cache, c.k, c.v, cache_seqlens=c.lengths)
