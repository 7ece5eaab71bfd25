"""Real kernels against the reference, in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpolicy.adapters.flash_attn.backends import Backend, select_backend
from kvpolicy.adapters.flash_attn.backends.reference import Reference
from kvpolicy.errors import UnsupportedError
from tests.flash_attn.backend_cases import LAYOUTS, case, ragged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: real kernels need a CUDA GPU"),
]

REFERENCE = Reference()
KERNELS = ("torch", "flash-attn")
SIZES: dict[str, Any] = {"heads": (8, 2), "dim": 64, "dtype": torch.bfloat16, "device": "cuda"}
# Kernels round probabilities to the dtype, and so may be off by a few units in the last place of a mean of values.
CLOSE = {"rtol": 2**-7, "atol": 2**-7}
LSE = {"rtol": 0.0, "atol": 1e-3}


def kernels(name: str, *needs: str, page: int | None = None) -> Backend:
    """Return a backend, or skip where it is not installed or lacks something."""
    try:
        wanted = {"row_lengths", *needs}
        return select_backend(name, device="cuda", dtype=SIZES["dtype"], head_dim=SIZES["dim"], needs=wanted, page=page)
    except UnsupportedError as error:
        pytest.skip(str(error))


def assert_like_the_reference(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found[0], wanted[0], **CLOSE)
    torch.testing.assert_close(found[1], wanted[1], **LSE)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_with_kvcache(name: str, layout: str, width: int, causal: bool) -> None:
    page = 256 if layout == "paged" else None
    backend = kernels(name, "lse", page=page)
    found: list[Any] = []
    caches: list[torch.Tensor] = []
    for call in (backend, REFERENCE):
        c = case(layout, [0, 300, 1000, 1017], width, slots=1024, page=256, **SIZES)
        found.append(
            call.with_kvcache(
                c.q, c.k_cache, c.v_cache, c.k, c.v,
                cache_seqlens=c.lengths, block_table=c.block_table, causal=causal, return_lse=True,
            )
        )  # fmt: skip
        caches += [c.k_cache.nan_to_num(7), c.v_cache.nan_to_num(7)]
    assert_like_the_reference(*found)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("heads", [(8, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("width", [1, 5])
def test_varlen_with_gaps(name: str, heads: tuple[int, int], width: int) -> None:
    backend = kernels(name, "varlen", "head_lengths", "lse")
    tensors, numbers, _ = ragged([700, 5, 300, 64], [width] * 4, gap=9, **{**SIZES, "heads": heads})
    found, wanted = (call.varlen(**tensors, **numbers, causal=True, return_lse=True) for call in (backend, REFERENCE))
    assert_like_the_reference(found, wanted)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("width", [1, 5])
def test_varlen_over_pages(name: str, width: int) -> None:
    backend = kernels(name, "varlen", "head_lengths", "lse", page=256)
    c = case("paged", [250, 900], width, slots=1024, page=256, **SIZES)
    REFERENCE.with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths, block_table=c.block_table)
    offsets = torch.arange(3, dtype=torch.int32, device="cuda")
    found, wanted = (
        call.varlen(
            c.q.flatten(0, 1),
            c.k_cache,
            c.v_cache,
            cu_seqlens_q=offsets * width,
            cu_seqlens_k=offsets * 1024,
            seqused_k=c.lengths + width,
            max_seqlen_q=width,
            max_seqlen_k=1024,
            block_table=c.block_table,
            causal=True,
            return_lse=True,
        )
        for call in (backend, REFERENCE)
    )
    assert_like_the_reference(found, wanted)


@pytest.mark.parametrize("name", KERNELS)
def test_a_query_without_keys(name: str) -> None:
    """Zeros, and a log-sum-exp of plus infinity, as the reference has it."""
    backend = kernels(name, "lse")
    c = case("dense", [0, 2], 4, **SIZES)
    found, wanted = (
        call.with_kvcache(c.q, c.k_cache, c.v_cache, cache_seqlens=c.lengths, return_lse=True)
        for call in (backend, REFERENCE)
    )
    assert_like_the_reference(found, wanted)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_waits_for_the_device(name: str, layout: str) -> None:
    backend = kernels(name, page=256 if layout == "paged" else None)
    c = case(layout, [3, 200], 1, slots=512, page=256, **SIZES)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=c.lengths, block_table=c.block_table)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_sdpa() -> None:
    backend = select_backend("sdpa", device="cuda", dtype=torch.bfloat16, head_dim=64, needs=frozenset())
    for width in (1, 7):
        c = case("transposed", [300, 300], width, slots=512, **SIZES)
        found, wanted = (
            call.with_kvcache(c.q, c.k_cache, c.v_cache, c.k, c.v, cache_seqlens=300) for call in (backend, REFERENCE)
        )
        torch.testing.assert_close(found, wanted, **CLOSE)
