"""Caches in every layout, and attention by hand: what backends are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("dense", "transposed", "spare", "paged")


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend ``[T, Hq, D]`` to ``[N, Hkv, D]`` in float64, one query, one head, one key at a time."""
    (t, heads, dim), (n, groups, _) = q.shape, k.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    q, k, v = q.double().cpu(), k.double().cpu(), v.double().cpu()
    out, lse = torch.zeros(t, heads, v.shape[-1], dtype=torch.float64), torch.zeros(heads, t, dtype=torch.float64)
    for i in range(t):
        for head in range(heads):
            group = head * groups // heads
            seen = range(n - (t - 1 - i) if causal else n)
            logits = [scale * float(torch.dot(q[i, head], k[j, group])) for j in seen]
            if softcap is not None:
                logits = [softcap * math.tanh(logit / softcap) for logit in logits]
            total = sum(math.exp(logit) for logit in logits)
            lse[head, i] = math.log(total) if logits else math.inf
            for j, logit in zip(seen, logits, strict=True):
                out[i, head] += math.exp(logit) / total * v[j, group]
    return out, lse


@dataclass
class Case:
    """One call of ``with_kvcache``, and what each row holds, kept apart from the cache."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: Tensor
    block_table: Tensor | None
    rows: list[tuple[Tensor, Tensor]]  # keys and values of each row, those of this call among them

    def read(self, cache: Tensor, row: int, count: int) -> Tensor:
        """Return the first slots of a row, read one by one."""
        if self.block_table is None:
            return cache[row, :count]
        page = cache.shape[1]
        return torch.stack([cache[int(self.block_table[row, i // page]), i % page] for i in range(count)])


def case(
    layout: str,
    lengths: list[int],
    width: int,
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 8,
    value_dim: int | None = None,
    slots: int = 32,
    page: int = 8,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Return a cache whose free slots hold nan, and a call that appends ``width`` tokens a row."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    b, (query_heads, groups) = len(lengths), heads
    table = None
    if layout == "paged":
        count = slots // page
        table = torch.randperm(b * count + 3, generator=generator)[: b * count].view(b, count).to(torch.int32)
    dims = (dim, dim if value_dim is None else value_dim)
    caches = [_empty(layout, b, slots, groups, d, page, dtype, device) for d in dims]
    made = Case(
        random(b, width, query_heads, dims[0]),
        random(b, width, groups, dims[0]),
        random(b, width, groups, dims[1]),
        caches[0],
        caches[1],
        torch.tensor(lengths, dtype=torch.int32, device=device),
        table,
        [],
    )
    for row, length in enumerate(lengths):
        old = [random(length, groups, d) for d in dims]
        for cache, given in zip(caches, old, strict=True):
            for i in range(length):
                if table is None:
                    cache[row, i] = given[i]
                else:
                    cache[int(table[row, i // page]), i % page] = given[i]
        made.rows.append((torch.cat([old[0], made.k[row]]), torch.cat([old[1], made.v[row]])))
    if table is not None:  # pages that are not in use need not exist
        for row, length in enumerate(lengths):
            table[row, -(-(length + width) // page) :] = -1
        made.block_table = table.to(device)
    return made


def _empty(
    layout: str, b: int, slots: int, groups: int, dim: int, page: int, dtype: torch.dtype, device: str
) -> Tensor:
    def nan(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    if layout == "paged":
        return nan(b * (slots // page) + 3, page, groups, dim)
    if layout == "transposed":
        return nan(b, groups, slots, dim).transpose(1, 2)
    if layout == "spare":  # rows and slots that belong to somebody else lie between
        return nan(2 * b, slots + 8, groups, dim)[::2, :slots]
    return nan(b, slots, groups, dim)


def ragged(
    lengths: list[int],
    widths: list[int],
    *,
    gap: int = 3,
    heads: tuple[int, int] = (4, 2),
    dim: int = 8,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, int], list[tuple[Tensor, Tensor, Tensor]]]:
    """Return the tensors and the numbers of a ``varlen`` call with gaps of nan, and each of its sequences."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    sequences = [
        (random(width, heads[0], dim), random(length, heads[1], dim), random(length, heads[1], dim))
        for length, width in zip(lengths, widths, strict=True)
    ]
    hole = torch.full((gap, heads[1], dim), torch.nan, dtype=dtype, device=device)
    integers = {
        "cu_seqlens_q": [sum(widths[:i]) for i in range(len(widths) + 1)],
        "cu_seqlens_k": [sum(lengths[:i]) + i * gap for i in range(len(lengths) + 1)],
        "seqused_k": lengths,
    }
    tensors = {name: torch.tensor(numbers, dtype=torch.int32, device=device) for name, numbers in integers.items()}
    tensors["q"] = torch.cat([q for q, _, _ in sequences])
    for name, at in (("k", 1), ("v", 2)):
        tensors[name] = torch.cat([part for sequence in sequences for part in (sequence[at], hole)])
    return tensors, {"max_seqlen_q": max(widths), "max_seqlen_k": max(lengths)}, sequences
