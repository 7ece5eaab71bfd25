"""The scorer of Expected Attention: what queries to come will attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import _check
from kvpolicy.probabilities import blocks
from kvpolicy.scorers.attention import newest
from kvpolicy.scores import Scores
from kvpolicy.stage import Scorer
from kvpolicy.token_number import TokenNumber
from kvpolicy.view import StageState, View

__all__ = ["ExpectedAttention"]


@dataclass(frozen=True, repr=False)
class ExpectedAttention(TokenNumber, Scorer):
    """Score a token by the attention that the next queries are expected to pay it, times the norm of its value.

    Queries to come are taken as normally distributed before their rotation, with mean and covariance of the
    newest ones, and rotated by the mean rotation of the next ``future`` positions. The expected logit is
    ``mean·k + k·covariance·k / 2``, scaled as the model does; its softmax runs over every slot but the
    first ``sinks``, and the mean over the query heads of the group is multiplied by the Euclidean norm of the value.
    The first ``sinks`` tokens take no part, nor do their queries: they score as high as any other token of the head.
    A cap on logits, or a sink logit, is left out.

    Args:
        window: how many of the newest queries are asked for mean and covariance.
        future: positions to come.
        sinks: first tokens, which take no part.
        covariance: use the covariance, or the mean alone.
        epsilon: added to the probability before it is multiplied.

    Source: https://arxiv.org/abs/2510.00636, section 3, and ExpectedAttentionPress in
    https://github.com/NVIDIA/kvpress.

    >>> from kvpolicy import Policy, Sinks, TopK
    >>> Policy(ExpectedAttention() >> Sinks(4) >> TopK(1024))
    Policy(ExpectedAttention() >> Sinks(4) >> TopK(1024))
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries", "rotary"})

    window: int = 128
    future: int = 512
    sinks: int = 4
    covariance: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        for name, low in (("window", 1), ("future", 1), ("sinks", 0)):
            _check.integer(self, name, getattr(self, name), low)
        _check.flag(self, "covariance", self.covariance)
        _check.number(self, "epsilon", self.epsilon, 0)

    def queries_read(self, interval: int | None) -> int:
        """Return the window."""
        return self.window

    def number(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the norm of each value."""
        return torch.linalg.vector_norm(values, dim=-1, dtype=dtype)

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return expected attention times norms, as weights."""
        (b, h, s), dtype = view.shape, view.compute_dtype
        queries, positions = newest(view, self.window)
        window, dim = queries.shape[2:]
        assert view.rotary is not None
        queries = queries.reshape(b * h, -1, window, dim)
        turn = _Turn(self.future, *(t.repeat_interleave(h, 0) for t in (view.seen, positions, view.rotary)))
        inside = (view.valid & (view.positions >= self.sinks)).flatten(0, 1)
        keys, shares = view.keys.flatten(0, 1), torch.zeros(b * h, s, dtype=dtype, device=positions.device)
        for at in blocks(view, s * (dim + window) * torch.finfo(dtype).bits // 8 + 2 * window * dim * 8):
            held, there = keys[at].to(dtype).mT, (turn.positions[at] >= self.sinks)[..., None]
            count = there.sum(1).clamp(min=1)
            for member in range(queries.shape[1]):
                ahead = torch.where(there, turn.turned(queries[at, member], at), 0).to(dtype)
                mean = ahead.sum(1) / count
                logits = torch.bmm(mean[:, None], held)[:, 0] * view.scaling
                if self.covariance:
                    apart = torch.where(there, ahead - mean[:, None], 0) / count[..., None].sqrt()
                    logits = logits + torch.bmm(apart, held).square().sum(1) * (view.scaling**2 / 2)
                shares[at] += torch.softmax(torch.where(inside[at], logits, -1e30), -1)
        inside = inside.view(b, h, s)
        expected = (shares / queries.shape[1]).view(b, h, s)
        found = torch.where(inside, (expected + self.epsilon) * self.numbers(state), 0)
        return Scores.of(view, torch.where(inside, found, found.amax(-1, keepdim=True)), weights=True)


@dataclass(frozen=True)
class _Turn:
    """Turn queries from their positions to the next ``future`` ones, on average.

    The mean of rotations by ``f * j``, with ``j`` from 0 to ``n - 1``, is the rotation by ``f * (n - 1) / 2``, shrunk
    by ``sin(n * f / 2) / (n * sin(f / 2))``.

    Attributes:
        future: how many positions.
        seen: ``[N]``, the first of them.
        positions: ``[N, W]``.
        frequencies: ``[N, D / 2]``, angles of a pair of elements, ``i`` and ``D / 2 + i``, a position.
    """

    future: int
    seen: Tensor
    positions: Tensor
    frequencies: Tensor

    def turned(self, queries: Tensor, at: slice) -> Tensor:
        """Return ``[n, W, D]`` queries of some rows, turned, in float64."""
        by = self.frequencies[at, None].to(torch.float64)
        steps = self.seen[at, None, None] + (self.future - 1) / 2 - self.positions[at, :, None].to(torch.float64)
        angles, half = steps * by, torch.sin(by / 2)
        shrunk = torch.where(half == 0, 1, torch.sin(self.future * by / 2) / (self.future * half))
        cos, sin = shrunk * torch.cos(angles), shrunk * torch.sin(angles)
        first, second = queries.to(torch.float64).chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
