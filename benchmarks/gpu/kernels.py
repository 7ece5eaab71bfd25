"""Every backend that is here against attention in float64, in every layout of a cache."""

from __future__ import annotations

import itertools
from collections.abc import Set
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.deadline import Deadline
from benchmarks.report import Cell, Section, Target
from kvpolicy.adapters.flash_attn import Backend, select_backend
from kvpolicy.adapters.flash_attn.backends import BACKENDS, TABLE
from kvpolicy.errors import UnsupportedError

__all__ = ["LAYOUTS", "Problem", "attention", "run"]

EMPTY = "–"
PAGE = 256
LAYOUTS = ("dense", "strided", "paged", "ragged")
TWICE = 2.0  #: the bound of FlashAttention's own tests: at most twice the error of plain bfloat16
LSE = 1e-3


@dataclass(frozen=True)
class Problem:
    """Hold queries, and keys and values as they are after the new tokens have been written.

    Attributes:
        q: ``[B, T, Hq, D]``.
        keys: ``[B, S, H, D]``.
        values: ``[B, S, H, D]``.
        lengths: ``[B, H]`` int32, the new tokens among them.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor

    @staticmethod
    def random(
        heads: int, group: int, dim: int, slots: int, width: int, needs: Set[str], device: torch.device
    ) -> Problem:
        """Return a problem in bfloat16 of three rows, whose lengths are their own where a backend takes them."""
        size = (3, slots, heads, dim)
        keys, values = (torch.randn(size, device=device).bfloat16() for _ in range(2))
        q = torch.randn(3, width, heads * group, dim, device=device).bfloat16()
        full = slots - heads - 5
        totals = [full, full // 3 + width, width] if needs & {"row_lengths", "head_lengths"} else [full] * 3
        lengths = torch.tensor(totals, dtype=torch.int32, device=device)[:, None].repeat(1, heads)
        if "head_lengths" in needs:
            lengths += torch.arange(heads, dtype=torch.int32, device=device)
        return Problem(q, keys, values, lengths)


def attention(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what is attended and its log-sum-exp, with every operation in one dtype.

    Returns:
        ``[B, T, Hq, D]`` and ``[B, Hq, T]``.
    """
    q, k, v = (x.to(dtype) for x in (problem.q, problem.keys, problem.values))
    width, slots, heads = q.shape[1], k.shape[1], k.shape[2]
    q = q.view(*q.shape[:2], heads, -1, q.shape[-1])
    logits = torch.einsum("bthgd,bshd->bhgts", q, k) * q.shape[-1] ** -0.5
    last = problem.lengths[..., None] - width + torch.arange(width, device=q.device)  # [B, H, T]
    visible = torch.arange(slots, device=q.device) <= last[..., None]
    logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
    out = torch.einsum("bhgts,bshd->bthgd", logits.softmax(-1), v)
    return out.flatten(2, 3), logits.logsumexp(-1).flatten(1, 2)


def run(heads: int, group: int, dims: list[int], slots: int, deadline: Deadline) -> Section:
    """Compare every backend, layout and number of new tokens.

    Args:
        heads: KV heads.
        group: query heads for each of them.
        dims: sizes of a head.
        slots: of a cache, a multiple of a page.
        deadline: cases beyond it are skipped.
    """
    section = Section(
        "kernels",
        f"largest errors of attention in bfloat16 against float64, {heads} KV heads and {heads * group} query heads, "
        f"{slots} slots, three rows; of plain torch with every operation in bfloat16 beside",
        ["backend", "layout", "head size", "new tokens", "error", "bfloat16's own", "error to own", "error of lse"],
    )
    for name in BACKENDS:
        try:
            select_backend(name, device=deadline.device, dtype=torch.bfloat16, head_dim=dims[0], needs=frozenset())
        except UnsupportedError as unsupported:
            section.notes.append(f"{name} is left out: {_why(unsupported)}")
            continue
        for dim, layout, width in itertools.product(dims, LAYOUTS, (1, 9)):
            torch.manual_seed(width)
            needs = {"lse", "row_lengths"} & set(TABLE[name].has)
            needs |= {"head_lengths", "varlen"} if layout == "ragged" else {layout}
            problem = Problem.random(heads, group, dim, slots, width, needs, deadline.device)
            found = deadline.attempt(partial(_errors, name, layout, problem, needs))
            lead: list[Cell] = [name, layout, dim, width]
            if isinstance(found, str):
                section.rows.append([*lead, found, *[EMPTY] * 3])
                continue
            error, own, lse = found
            section.rows.append([*lead, _short(error), _short(own), error / own, _short(lse)])
            what = f"{name}, {layout}, head size {dim}, {width} new"
            section.targets.append(Target(f"{what}: error to own", error / own, TWICE))
            if lse is not None:
                section.targets.append(Target(f"{what}: error of lse", lse, LSE))
    return section


def _why(error: UnsupportedError) -> str:
    """Return what a backend lacks, without the request and the way out."""
    return str(error).partition(": ")[2].partition(";")[0]


def _short(error: float | None) -> str:
    return EMPTY if error is None else f"{error:.1e}"


def _errors(name: str, layout: str, problem: Problem, needs: Set[str]) -> tuple[float, float, float | None] | str:
    """Return the error of a backend, that of bfloat16, and that of the log-sum-exp; or why there is none."""
    q, page = problem.q, PAGE if layout == "paged" else None
    try:
        backend = select_backend(name, device=q.device, dtype=q.dtype, head_dim=q.shape[-1], needs=needs, page=page)
    except UnsupportedError as error:
        return f"no: {_why(error)}"
    attend = _ragged if layout == "ragged" else partial(_cached, layout)
    out, lse = attend(backend, problem, needs)
    exact, exact_lse = attention(problem, torch.float64)
    plain, _ = attention(problem, torch.bfloat16)
    return _far(out, exact), _far(plain, exact), None if lse is None else _far(lse, exact_lse)


def _far(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).abs().max())


def _cached(layout: str, backend: Backend, problem: Problem, needs: Set[str]) -> tuple[Tensor, Tensor | None]:
    """Let a backend write the new tokens into a cache that lacks them, and attend."""
    width, before = problem.q.shape[1], problem.lengths[:, 0] - problem.q.shape[1]
    at = before[:, None].long() + torch.arange(width, device=before.device)
    rows = torch.arange(len(before), device=before.device)[:, None]
    new, caches = [], []
    for full in (problem.keys, problem.values):
        new.append(full[rows, at])
        cache = full.clone()
        cache[rows, at] = 0
        caches.append(_laid_out(cache, layout))
    table = _block_table(problem.keys) if layout == "paged" else None
    lengths = before.contiguous() if "row_lengths" in needs else int(before[0])
    with_lse = "lse" in needs
    given = backend.with_kvcache(
        problem.q, *caches, *new, cache_seqlens=lengths, block_table=table, return_lse=with_lse
    )
    return given if with_lse else (given, None)


def _laid_out(cache: Tensor, layout: str) -> Tensor:
    if layout == "strided":  # as transformers holds it
        return cache.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "paged":
        pages = cache.reshape(-1, PAGE, *cache.shape[2:])
        shuffled = torch.empty_like(pages)
        shuffled[_block_table(cache).flatten().long()] = pages
        return shuffled
    return cache


def _block_table(cache: Tensor) -> Tensor:
    """Return ``[B, S / page]`` int32 for a cache ``[B, S, H, D]``: the pages of the last row come first."""
    rows, pages = len(cache), cache.shape[0] * cache.shape[1] // PAGE
    return torch.arange(pages - 1, -1, -1, dtype=torch.int32, device=cache.device).view(rows, -1)


def _ragged(backend: Backend, problem: Problem, needs: Set[str]) -> tuple[Tensor, Tensor | None]:
    """Let every head of every row be a sequence of its own length."""
    (rows, width, query_heads, dim), (_, slots, heads, _) = problem.q.shape, problem.keys.shape
    count, group, with_lse = rows * heads, query_heads // heads, "lse" in needs
    ends = torch.arange(count + 1, dtype=torch.int32, device=problem.q.device)
    q = problem.q.view(rows, width, heads, group, dim).transpose(1, 2).reshape(count * width, group, dim)
    k, v = (x.transpose(1, 2).reshape(count * slots, 1, dim) for x in (problem.keys, problem.values))
    given = backend.varlen(
        q,
        k,
        v,
        cu_seqlens_q=ends * width,
        cu_seqlens_k=ends * slots,
        seqused_k=problem.lengths.flatten(),
        max_seqlen_q=width,
        max_seqlen_k=slots,
        causal=True,
        return_lse=with_lse,
    )
    out, lse = given if with_lse else (given, None)
    out = out.reshape(rows, heads, width, group, dim).transpose(1, 2).flatten(2, 3)
    if lse is not None:  # [G, rows * H * T]
        lse = lse.view(group, rows, heads, width).permute(1, 2, 0, 3).flatten(1, 2)
    return out, lse
