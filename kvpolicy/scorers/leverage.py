"""The scorer of CurDKV and VaSE-DKV."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpolicy import _check, noise
from kvpolicy.probabilities import blocks
from kvpolicy.scores import Scores
from kvpolicy.stage import Scorer
from kvpolicy.view import StageState, View

__all__ = ["Leverage"]

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, repr=False)
class Leverage(Scorer):
    """Score a token by the product of the squared norms of its projected key and value.

    Key and value are projected by one Gaussian matrix of ``rank`` columns and variance
    ``1 / rank``, shared by all KV heads of a row; the products are divided by their sum over the
    candidates.

    Args:
        rank: columns of the projection; None projects nothing.
        resample: draw a new matrix at every eviction, as VaSE-DKV; otherwise it stays, as CurDKV.
        seed: of the draws.
        local: divide each squared norm by the sum of those of its block of so many tokens, counted
            among the tokens held, in position order; None divides by nothing.

    Source: VaSE-DKV (arXiv 2606.03928) and CurDKV (arXiv 2509.15038); ``local`` is that of CURPress
    in https://github.com/NVIDIA/kvpress.

    >>> from kvpolicy import Policy, Sinks, TopK
    >>> Policy(Leverage() >> Sinks(4) >> TopK(1024))  # VaSE-DKV
    Policy(Leverage() >> Sinks(4) >> TopK(1024))
    """

    rank: int | None = 20
    resample: bool = True
    seed: int = 0
    local: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "local"):
            if getattr(self, name) is not None:
                _check.integer(self, name, getattr(self, name), 1)
        _check.flag(self, "resample", self.resample)
        _check.integer(self, "seed", self.seed, 0, 2**63 - 1)

    def projection(self, view: View, dim: int) -> Tensor:
        """Return the matrix of each row, ``[B, dim, rank]`` float64; smaller ``dim`` takes its first rows."""
        assert self.rank is not None
        key = noise.stream(view, self.seed, per_head=False, redraw=self.resample)
        counter = torch.arange(dim * self.rank, device=view.keys.device)
        return noise.normal(key, counter)[:, 0].view(-1, dim, self.rank) / math.sqrt(self.rank)

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the products, as weights that sum to 1 over the candidates."""
        norms = [self._squared_norms(view, states) for states in (view.keys, view.values)]
        if self.local is not None:
            norms = [one / local_sums(view, one, self.local).clamp(min=_TINY) for one in norms]
        product = norms[0] * norms[1]
        total = torch.where(view.candidates, product, 0).sum(-1, keepdim=True)
        return Scores.of(view, product / total.clamp(min=torch.finfo(product.dtype).tiny), weights=True)

    def _squared_norms(self, view: View, states: Tensor) -> Tensor:
        dtype, (b, h, s), dim = view.compute_dtype, view.shape, states.shape[-1]
        if self.rank is None:
            return torch.linalg.vector_norm(states, dim=-1, dtype=dtype).square()
        matrix = self.projection(view, dim).to(dtype)[:, None].expand(b, h, dim, self.rank).flatten(0, 1)
        flat = states.flatten(0, 1)
        out = torch.empty(b * h, s, dtype=dtype, device=states.device)
        for at in blocks(view, s * dim * torch.finfo(dtype).bits // 8):
            out[at] = torch.bmm(flat[at].to(dtype), matrix[at]).square().sum(-1)
        return out.view(b, h, s)


def local_sums(view: View, amount: Tensor, width: int) -> Tensor:
    """Return the sum of ``amount`` over each token's block of ``width`` tokens, in position order.

    Args:
        view: whose tokens are counted from the oldest one held.
        amount: ``[B, H, S]``, anything where a slot is free.
        width: tokens of a block; the last one may have fewer.
    """
    slots = view.order.to(torch.int64)
    inside = torch.arange(amount.shape[-1], device=amount.device) < view.lengths[..., None]
    ordered = torch.where(inside, amount.gather(-1, slots), 0)
    padded = F.pad(ordered, (0, -ordered.shape[-1] % width))
    blocks = padded.view(*padded.shape[:-1], -1, width).sum(-1)
    return torch.zeros_like(amount).scatter(-1, slots, blocks.repeat_interleave(width, -1)[..., : amount.shape[-1]])
