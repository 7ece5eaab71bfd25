"""What kernels are given: functions with their signatures stand in for them, and attend as the reference does.

Real kernels are compared in ``test_backends_gpu.py``.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from kvpolicy.adapters.flash_attn.backends import TABLE, Backend, engines, select_backend
from kvpolicy.adapters.flash_attn.backends.engines import Engine, installed
from kvpolicy.adapters.flash_attn.backends.package import FlashAttn
from kvpolicy.adapters.flash_attn.backends.reference import Reference
from kvpolicy.adapters.flash_attn.backends.sdpa import Sdpa
from kvpolicy.adapters.flash_attn.backends.torch_varlen import TorchVarlen, as_rows
from kvpolicy.errors import UnsupportedError
from tests.flash_attn.backend_cases import LAYOUTS, case, ragged

REFERENCE = Reference()
has_splits = "num_splits" in inspect.signature(varlen.varlen_attn).parameters
needs_torch = pytest.mark.skipif(not has_splits, reason="needs torch 2.12, whose varlen_attn takes seqused_k")


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the table say that kernels run here, in any dtype and with small pages; nothing else of it changes."""
    for name in ("torch", "sdpa", "flash-attn"):
        here = replace(TABLE[name], devices=None, dtypes=None, page=1)
        monkeypatch.setitem(TABLE, name, here)


def agrees(backend: Backend, layout: str, width: int, *, new: bool = True, **numbers: Any) -> None:
    """Compare a backend with the reference, and what both leave in the cache."""
    mine, theirs = (case(layout, [0, 9, 26] if new else [5, 9, 26], width) for _ in range(2))
    found: list[Any] = []
    for call, c in ((backend, mine), (REFERENCE, theirs)):
        fresh = (c.k, c.v) if new else ()
        found.append(
            call.with_kvcache(
                c.q, c.k_cache, c.v_cache, *fresh, cache_seqlens=c.lengths, block_table=c.block_table, **numbers
            )
        )
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    assert torch.equal(mine.k_cache.nan_to_num(7), theirs.k_cache.nan_to_num(7))
    assert torch.equal(mine.v_cache.nan_to_num(7), theirs.v_cache.nan_to_num(7))
    assert torch.equal(mine.lengths, theirs.lengths)


# torch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for torch's kernel; return what it is called with."""
    signature = inspect.signature(varlen.varlen_attn)
    seen: list[dict[str, Any]] = []

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        a = given.arguments
        seen.append(a)
        assert a["enable_gqa"] or a["query"].shape[1] == a["key"].shape[-2]
        assert a["block_table"] is None or a["seqused_k"] is not None
        out, lse = REFERENCE.varlen(
            a["query"],
            a["key"],
            a["value"],
            cu_seqlens_q=a["cu_seq_q"],
            cu_seqlens_k=a["cu_seq_k"],
            seqused_k=a["seqused_k"],
            max_seqlen_q=a["max_q"],
            max_seqlen_k=a["max_k"],
            block_table=a["block_table"],
            scale=a["scale"],
            causal={(-1, 0): True, (-1, -1): False}[a["window_size"]],
            return_lse=True,
        )
        return (out, lse) if a["return_aux"] is not None and a["return_aux"].lse else out

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    return seen


@needs_torch
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_torch_with_kvcache(calls: list[dict[str, Any]], layout: str, width: int, new: bool, causal: bool) -> None:
    agrees(TorchVarlen(), layout, width, new=new, causal=causal, scale=0.3, return_lse=True)
    assert len(calls) == 1
    assert calls[0]["num_splits"] == 1
    assert calls[0]["cu_seq_k"].dtype == calls[0]["seqused_k"].dtype == torch.int32


@needs_torch
def test_torch_reads_the_cache_where_it_lies(calls: list[dict[str, Any]]) -> None:
    for layout in LAYOUTS:
        c = case(layout, [3, 5], 1)
        TorchVarlen().with_kvcache(
            c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths, block_table=c.block_table
        )
        assert calls[-1]["key"].data_ptr() == c.k_cache.data_ptr()
        assert calls[-1]["value"].data_ptr() == c.v_cache.data_ptr()


@needs_torch
@pytest.mark.parametrize("gap", [0, 3])
def test_torch_varlen(calls: list[dict[str, Any]], gap: int) -> None:
    tensors, numbers, _ = ragged([7, 1, 20], [2, 1, 5], gap=gap)
    if not gap:
        del tensors["seqused_k"]
    found, wanted = (
        backend.varlen(**tensors, **numbers, causal=True, return_lse=True) for backend in (TorchVarlen(), REFERENCE)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert (calls[0]["seqused_k"] is None) == (gap == 0)


@needs_torch
def test_torch_varlen_over_pages_gets_lengths(calls: list[dict[str, Any]]) -> None:
    c = case("paged", [6, 17], 1)
    TorchVarlen().varlen(
        c.q.flatten(0, 1),
        c.k_cache,
        c.v_cache,
        cu_seqlens_q=torch.tensor([0, 1, 2], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 6, 23], dtype=torch.int32),
        max_seqlen_q=1,
        max_seqlen_k=32,
        block_table=c.block_table,
        causal=True,
    )
    assert calls[0]["seqused_k"].tolist() == [6, 17]


@needs_torch
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 4])
def test_torch_takes_what_it_is_given(layout: str, width: int) -> None:
    """Tensors without memory go through the real operator, which has no numbers to wait for."""
    c = case(layout, [3, 7], width, dtype=torch.bfloat16)
    table = None if c.block_table is None else c.block_table.to("meta")
    q, k, v, keys, values, lengths = (x.to("meta") for x in (c.q, c.k, c.v, c.k_cache, c.v_cache, c.lengths))
    out, lse = TorchVarlen().with_kvcache(
        q, keys, values, k, v, cache_seqlens=lengths, block_table=table, return_lse=True
    )
    assert (out.shape, lse.shape) == (q.shape, (2, 4, width))
    tensors, numbers, _ = ragged([7, 2], [width, 1], dtype=torch.bfloat16)
    out, lse = TorchVarlen().varlen(
        **{name: x.to("meta") for name, x in tensors.items()}, **numbers, causal=True, return_lse=True
    )
    assert (out.shape, lse.shape) == ((width + 1, 4, 8), (4, width + 1))


@needs_torch
def test_torch_2_12_lets_nobody_choose_splits(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "installed", lambda name: Engine("2.12.1"))
    c = case("dense", [3], 1)
    TorchVarlen().with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths)
    assert calls[0]["num_splits"] is None


@needs_torch
def test_splits_with_pages_are_refused(calls: list[dict[str, Any]]) -> None:
    c = case("paged", [3], 1)
    with pytest.raises(UnsupportedError, match="num_splits=None with pages gives wrong results"):
        TorchVarlen(num_splits=None).with_kvcache(
            c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths, block_table=c.block_table
        )
    assert not calls
    assert c.k_cache.isnan().sum() == c.k_cache.numel() - 3 * 2 * 8  # nothing was written


def test_rows_of_caches_that_cannot_be_found() -> None:
    odd = torch.zeros(2 * (32 * 16 + 8)).as_strided((2, 32, 2, 8), (32 * 16 + 8, 16, 8, 1))
    with pytest.raises(UnsupportedError, match=r"no multiple of the step of a slot.*'flash-attn'"):
        as_rows(odd)
    with pytest.raises(UnsupportedError, match="no multiple"):
        as_rows(torch.zeros(2, 1, 2, 8).expand(-1, 32, -1, -1))
    c = case("dense", [3, 5], 1)
    other = case("transposed", [3, 5], 1)
    with pytest.raises(UnsupportedError, match="allocate them alike"):
        TorchVarlen().with_kvcache(c.q, c.k_cache, other.v_cache, c.k, c.v, cache_seqlens=c.lengths)


# SDPA: the CPU has a kernel of this kind, too


@pytest.mark.parametrize("layout", ["dense", "transposed", "spare"])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("length", [0, 9])
@pytest.mark.parametrize("causal", [True, False])
def test_sdpa(layout: str, width: int, length: int, causal: bool) -> None:
    mine, theirs = (case(layout, [length] * 2, width, dtype=torch.float32) for _ in range(2))
    found, wanted = (
        backend.with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=length, causal=causal, scale=0.3)
        for backend, c in ((Sdpa(), mine), (REFERENCE, theirs))
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert torch.equal(mine.k_cache.nan_to_num(7), theirs.k_cache.nan_to_num(7))


def test_sdpa_refuses_what_it_cannot_do() -> None:
    c = case("dense", [2, 3], 4, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="it has no lse"):
        Sdpa().with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=2, return_lse=True)
    before = c.k_cache.nan_to_num(7)
    with pytest.raises(UnsupportedError, match="it has no row_lengths"):
        Sdpa().with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths)
    with pytest.raises(UnsupportedError, match="4 queries and 2 keys"):
        Sdpa().with_kvcache(c.q, c.k_cache, c.v_cache, cache_seqlens=2)
    tensors, numbers, _ = ragged([7], [2], gap=0)
    with pytest.raises(UnsupportedError, match=r"it has no .*varlen"):
        Sdpa().varlen(**tensors, **numbers, causal=True)
    assert torch.equal(c.k_cache.nan_to_num(7), before)


# flash-attn


def with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: None = None,
    cache_leftpad: None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Stand in for ``flash_attn_with_kvcache`` of flash-attn 2.8.3."""
    assert isinstance(cache_seqlens, Tensor)
    return REFERENCE.with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, block_table=block_table,
        scale=softmax_scale, causal=causal, softcap=softcap or None, return_lse=return_softmax_lse,
    )  # fmt: skip


def varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Stand in for ``flash_attn_varlen_func``."""
    out, lse = REFERENCE.varlen(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, block_table=block_table, scale=softmax_scale, causal=causal,
        softcap=softcap or None, return_lse=True,
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stand in for ``_flash_attn_varlen_forward``."""
    out, lse = REFERENCE.varlen(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, block_table=block_table, scale=softmax_scale,
        causal=causal, softcap=softcap or None, return_lse=True,
    )  # fmt: skip
    return out, lse.contiguous(), torch.empty(0), torch.empty(0)


def before_seqused(q: Tensor, window_size: tuple[int, int] = (-1, -1)) -> None:
    """Stand in for a version whose function is another."""


# Later versions register it as an operator, which hides its signature.
OPERATOR = torch.library.custom_op("kvpolicy_tests::varlen_forward", varlen_forward, mutates_args=(), schema=None)


@pytest.fixture(params=["function", "operator"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Install a package that is called flash_attn."""
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    vars(interface)["_flash_attn_varlen_forward"] = varlen_forward if request.param == "function" else OPERATOR
    top = types.ModuleType("flash_attn")
    vars(top).update(
        __version__="2.8.3.post2+cu130",
        flash_attn_with_kvcache=with_kvcache,
        flash_attn_varlen_func=varlen_func,
        flash_attn_interface=interface,
    )
    monkeypatch.setitem(sys.modules, "flash_attn", top)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    installed.cache_clear()
    yield interface
    installed.cache_clear()


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_package_with_kvcache(layout: str, width: int, softcap: float | None) -> None:
    agrees(FlashAttn(), layout, width, softcap=softcap, scale=0.3, return_lse=True)
    agrees(FlashAttn(), layout, width, new=False, causal=False)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("lse", [True, False])
def test_package_varlen(gap: int, lse: bool) -> None:
    tensors, numbers, _ = ragged([7, 1, 20], [2, 1, 5], gap=gap)
    if not gap:
        del tensors["seqused_k"]
    found, wanted = (
        backend.varlen(**tensors, **numbers, causal=True, softcap=3.0, return_lse=lse)
        for backend in (FlashAttn(), REFERENCE)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.usefixtures("package")
def test_package_with_one_length_and_pages() -> None:
    """The package would count the pages as rows."""
    c = case("paged", [9, 9], 1)
    out = FlashAttn().with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=9, block_table=c.block_table)
    assert out.shape == c.q.shape


def test_package_is_found(package: types.ModuleType) -> None:
    found = select_backend("auto", device="cpu", dtype=torch.bfloat16, head_dim=64, needs={"head_lengths", "softcap"})
    assert found == FlashAttn()
    assert found.text == "flash-attn 2.8.3.post2"


@pytest.mark.parametrize("other", [before_seqused, None])
def test_package_without_seqused_k(package: types.ModuleType, other: Any) -> None:
    vars(package)["_flash_attn_varlen_forward"] = other
    installed.cache_clear()
    tensors, numbers, _ = ragged([7, 2], [2, 1])
    with pytest.raises(UnsupportedError, match=r"flash-attn 2\.8\.3\.post2 has no head_lengths: its varlen kernel"):
        FlashAttn().varlen(**tensors, **numbers, causal=True)
    del tensors["seqused_k"]
    tensors["k"], tensors["v"] = (tensors[name].nan_to_num() for name in "kv")
    assert FlashAttn().varlen(**tensors, max_seqlen_q=2, max_seqlen_k=10, causal=True).shape == (3, 4, 8)


def test_package_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    installed.cache_clear()
    with pytest.raises(UnsupportedError, match=r"flash-attn is not here \(ModuleNotFoundError.*pip install"):
        select_backend("flash-attn", device="cpu", dtype=torch.bfloat16, head_dim=64)
    installed.cache_clear()
