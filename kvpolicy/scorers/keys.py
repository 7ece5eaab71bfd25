"""Scorers that compare keys with each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.probabilities import blocks
from kvpolicy.scores import Scores
from kvpolicy.stage import Scorer
from kvpolicy.view import StageState, View

__all__ = ["KeyDifference", "Redundancy"]

_TINY = 1e-12  #: a zero key has no direction


@dataclass(frozen=True, repr=False)
class KeyDifference(Scorer):
    """Score a token by how far its key points away from the mean direction of all keys.

    The score is minus the cosine of the key with the mean of the normalised keys of the head.

    Source: KeyDiff (arXiv 2504.15364, section 3).

    >>> from kvpolicy import Policy, TopK
    >>> Policy(KeyDifference() >> TopK(1024))
    Policy(KeyDifference() >> TopK(1024))
    """

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return minus the cosines, as logits."""
        cosines = _with_directions(view, view.valid, _cosine_with_mean)
        return Scores.of(view, -cosines, weights=False)


@dataclass(frozen=True, repr=False)
class Redundancy(Scorer):
    """Score a token by minus how much its key resembles the keys of the other candidates.

    The resemblance is the sum of the cosines with the other candidates over the number of
    candidates, softmaxed over them, so that it mixes with attention:
    ``0.5 * Attention() + 0.5 * Redundancy()``. It needs no matrix of all pairs.

    Source: R-KV (arXiv 2505.24133, section 3), in the form that VaSE's authors ran: without the
    threshold that spares the newest duplicate.

    >>> from kvpolicy import Attention, Policy, TopK
    >>> Policy(0.5 * Attention() + 0.5 * Redundancy() >> TopK(1024))
    Policy((0.5 * Attention() + 0.5 * Redundancy()) >> TopK(1024))
    """

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return minus the softmaxed resemblance, as logits."""
        candidates = view.candidates
        mean = _with_directions(view, candidates, _mean_cosine_with_others)
        mean = mean.masked_fill(~candidates, -1e30)
        resemblance = torch.where(candidates, torch.softmax(mean, -1), 0)
        return Scores.of(view, -resemblance, weights=False)


def _with_directions(view: View, chosen: Tensor, function: object) -> Tensor:
    """Apply a function to the unit keys ``[N, S, D]`` of each block of heads; 0 where not chosen."""
    b, h, s = view.shape
    dtype = view.compute_dtype
    keys, inside = view.keys.flatten(0, 1), chosen.flatten(0, 1)
    out = torch.empty(b * h, s, dtype=dtype, device=keys.device)
    for at in blocks(view, s * view.keys.shape[-1] * torch.finfo(dtype).bits // 8):
        block = keys[at].to(dtype)
        length = torch.linalg.vector_norm(block, dim=-1, keepdim=True).clamp(min=_TINY)
        directions = torch.where(inside[at][..., None], block / length, 0)
        out[at] = function(directions, inside[at].sum(-1, keepdim=True))  # type: ignore[operator]
    return out.view(b, h, s)


def _cosine_with_mean(directions: Tensor, count: Tensor) -> Tensor:
    mean = directions.sum(1)
    mean = mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp(min=_TINY)
    return torch.bmm(directions, mean[..., None])[..., 0]


def _mean_cosine_with_others(directions: Tensor, count: Tensor) -> Tensor:
    total = torch.bmm(directions, directions.sum(1)[..., None])[..., 0]
    return (total - directions.square().sum(-1)) / count.clamp(min=1)
