"""The scorer of LagKV: how a token stands out against those that follow it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy import _check
from kvpolicy.probabilities import blocks
from kvpolicy.scores import Scores
from kvpolicy.stage import Scorer
from kvpolicy.view import StageState, View

__all__ = ["LagRelative"]


@dataclass(frozen=True, repr=False)
class LagRelative(Scorer):
    """Score a token by how unevenly its key and value fill the range of the tokens that follow.

    The tokens held, behind the first ``sinks``, are cut into partitions of ``lag`` in position order.
    Each element of a key is scaled so that the least and the largest of it in the next partition are 0
    and 1; the score is the standard deviation over the elements, softmaxed over the partition. That of
    the values is added. The last partition and what remains behind it have none to be measured by: they
    score 1, above all others. The first ``sinks`` tokens take no part: they score as high as any other token of
    the head. An element that is the same throughout the
    next partition counts as 0.

    Args:
        lag: tokens of a partition.
        sinks: first tokens, which belong to no partition.
        ranked: score a token by its rank within its partition over ``lag``, so that each partition
            keeps as many; otherwise by half of the sum itself, which compares partitions.

    Source: LagKV, https://arxiv.org/abs/2504.04704, section 2, and its code,
    https://github.com/AI-Lab-China-Merchants-Bank/LagKV, which keeps as many tokens of each partition.

    >>> from kvpolicy import Policy, Sinks, TopK
    >>> Policy(LagRelative() >> Sinks(4) >> TopK(1024))
    Policy(LagRelative() >> Sinks(4) >> TopK(1024))
    """

    lag: int = 128
    sinks: int = 4
    ranked: bool = True

    def __post_init__(self) -> None:
        _check.integer(self, "lag", self.lag, 2)
        _check.integer(self, "sinks", self.sinks, 0)
        _check.flag(self, "ranked", self.ranked)

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return ranks or means of two softmaxes, from 0 to 1, as weights."""
        (b, h, s), lag = view.shape, self.lag
        count = s // lag  # partitions at most
        order = view.order.to(torch.int64).flatten(0, 1)
        first = (view.valid & (view.positions < self.sinks)).sum(-1).flatten()
        whole = (view.lengths.flatten() - first) // lag  # partitions that are there
        score = torch.ones(b * h, s, dtype=view.compute_dtype, device=order.device)
        if count < 2:
            return Scores.of(view, score.view(b, h, s), weights=True)
        place = torch.arange(count * lag, device=order.device)
        ranks = (first[:, None] + place).clamp(max=s - 1)
        slots = order.gather(-1, ranks)  # of the tokens behind the first, in position order
        size = torch.finfo(score.dtype).bits // 8
        keys, values = view.keys.flatten(0, 1), view.values.flatten(0, 1)
        parts = torch.empty(b * h, count - 1, lag, dtype=score.dtype, device=order.device)
        for at in blocks(view, count * lag * max(keys.shape[-1], values.shape[-1]) * size):
            pair = [_relative(_ordered(x[at], slots[at]).to(score.dtype), lag) for x in (keys, values)]
            parts[at] = (pair[0] + pair[1]) / 2
        if self.ranked:
            parts = parts.argsort(dim=-1, stable=True).argsort(dim=-1).to(score.dtype) / lag
        known = place < (whole[:, None] - 1) * lag
        found = parts.flatten(1)
        # A slot may stand in `slots` again behind the last partition: what is not known is written nowhere.
        padded = torch.cat([score, score.new_empty(b * h, 1)], 1)
        target = torch.where(known, slots, s)[:, : (count - 1) * lag]
        score = padded.scatter(1, target, found)[:, :s]
        return Scores.of(view, score.view(b, h, s), weights=True)


def _ordered(states: Tensor, slots: Tensor) -> Tensor:
    """Return ``[N, S, D]`` in the order of ``slots``, ``[N, L]``."""
    return states[torch.arange(slots.shape[0], device=slots.device)[:, None], slots]


def _relative(states: Tensor, lag: int) -> Tensor:
    """Return the softmax over each partition but the last, ``[N, P - 1, lag]``, given ``[N, P * lag, D]``."""
    parts = states.view(states.shape[0], -1, lag, states.shape[-1])
    low, high = parts[:, 1:].aminmax(dim=2, keepdim=True)
    span = high - low
    scaled = torch.where(span > 0, (parts[:, :-1] - low) / span, 0)
    return torch.softmax(scaled.std(-1), -1)
