"""The scorer of CurDKV and VaSE-DKV."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy import _check, noise
from kvpolicy.probabilities import blocks
from kvpolicy.scores import Scores
from kvpolicy.stage import Scorer
from kvpolicy.view import StageState, View

__all__ = ["Leverage"]


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

    Source: VaSE-DKV (arXiv 2606.03928) and CurDKV (arXiv 2509.15038).

    >>> from kvpolicy import Policy, Sinks, TopK
    >>> Policy(Leverage() >> Sinks(4) >> TopK(1024))  # VaSE-DKV
    Policy(Leverage() >> Sinks(4) >> TopK(1024))
    """

    rank: int | None = 20
    resample: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None:
            _check.integer(self, "rank", self.rank, 1)
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
        product = self._squared_norms(view, view.keys) * self._squared_norms(view, view.values)
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
