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
        there = positions >= self.sinks
        ahead = torch.where(there[:, None, :, None], _turned(queries, self._turn(view, positions)), 0).to(dtype)
        count = there.sum(-1)[:, None, None].clamp(min=1)
        mean = ahead.sum(2) / count
        apart = torch.where(there[:, None, :, None], ahead - mean[:, :, None], 0) / count[..., None].sqrt()
        mean, apart = (x.reshape(b * h, -1, *x.shape[2:]) for x in (mean, apart))
        inside = (view.valid & (view.positions >= self.sinks)).flatten(0, 1)
        keys, shares = view.keys.flatten(0, 1), torch.zeros(b * h, s, dtype=dtype, device=positions.device)
        for at in blocks(view, s * (keys.shape[-1] + self.window) * torch.finfo(dtype).bits // 8):
            held = keys[at].to(dtype).mT
            for member in range(mean.shape[1]):
                logits = torch.bmm(mean[at, member, None], held)[:, 0] * view.scaling
                if self.covariance:
                    logits = logits + torch.bmm(apart[at, member], held).square().sum(1) * (view.scaling**2 / 2)
                shares[at] += torch.softmax(torch.where(inside[at], logits, -1e30), -1)
        expected = torch.where(inside, shares / mean.shape[1], 0).view(b, h, s)
        inside = inside.view(b, h, s)
        found = torch.where(inside, (expected + self.epsilon) * self.numbers(state), 0)
        return Scores.of(view, torch.where(inside, found, found.amax(-1, keepdim=True)), weights=True)

    def _turn(self, view: View, positions: Tensor) -> Tensor:
        """Return what turns each query from its position to those to come, ``[B, W, D / 2]`` complex, on average."""
        assert view.rotary is not None
        steps = view.seen[:, None] + torch.arange(self.future, device=positions.device)
        angles = steps[..., None].to(torch.float64) * view.rotary[:, None]
        back = -positions[..., None].to(torch.float64) * view.rotary[:, None]
        to_come = torch.complex(angles.cos().mean(1), angles.sin().mean(1))
        return to_come[:, None] * torch.complex(back.cos(), back.sin())


def _turned(queries: Tensor, turn: Tensor) -> Tensor:
    """Return ``[B, Hq, W, D]`` queries whose pairs of elements, ``i`` and ``D / 2 + i``, are turned, in float64."""
    first, second = queries.to(torch.float64).chunk(2, -1)
    pairs = torch.complex(first, second) * turn[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)
