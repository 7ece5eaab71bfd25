"""Transforms that change the numbers: a sampler and a normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kvpolicy import _check, noise
from kvpolicy.scores import Scores
from kvpolicy.stage import Transform
from kvpolicy.view import StageState, View

__all__ = ["Normalize", "Stochastic"]

_LARGE = torch.finfo(torch.float32).max


@dataclass(frozen=True, repr=False)
class Stochastic(Transform):
    """Perturb the scores, so that taking the top of them is a weighted sample.

    Gumbel noise is added to ``log(weight) / tau``: the top k are then a sample without
    replacement, drawn one after another in proportion to ``weight ** (1 / tau)``. Logits are used
    as they are in place of ``log(weight)``.

    Args:
        tau: temperature of the sample; 0 changes nothing and leaves a plain top-k.
        seed: of the noise, beside the seed of each row.
        redraw: draw afresh at every eviction, as VaSE. Otherwise the noise of a token stays with
            it, and for scores that depend on the token alone repeated evictions keep what one
            weighted sample of the whole history would have kept (a reservoir).

    Source: VaSE (arXiv 2606.03928), which samples with ``multinomial``; the same distribution by
    Kool et al., Stochastic Beams and Where to Find Them (arXiv 1903.06059, section 2).

    >>> from kvpolicy import Policy, TopK, ValueGuard
    >>> Policy(ValueGuard() >> Stochastic(1.0) >> TopK(1024))  # VaSE-AttnV
    Policy(ValueGuard() >> Stochastic() >> TopK(1024))
    """

    tau: float = 1.0
    seed: int = 0
    redraw: bool = True

    def __post_init__(self) -> None:
        _check.number(self, "tau", self.tau, 0)
        _check.integer(self, "seed", self.seed, 0, 2**63 - 1)
        _check.flag(self, "redraw", self.redraw)

    def apply(self, scores: Scores, view: View, state: StageState | None) -> Scores:
        """Return perturbed logits; a weight of 0 stays at minus infinity."""
        if self.tau == 0:
            return scores
        values = scores.values.to(torch.float64)
        logits = torch.log(values.clamp(min=0)) if scores.weights else values
        key = noise.stream(view, self.seed, redraw=self.redraw)
        drawn = noise.gumbel(key, view.positions.clamp(min=0))
        return scores.replace(logits / self.tau + drawn, weights=False)


@dataclass(frozen=True, repr=False)
class Normalize(Transform):
    """Bring the scores of each head to one scale, so that scorers can be mixed.

    Args:
        kind: ``"sum"`` and ``"max"`` divide by the sum or the largest magnitude over the
            candidates; ``"z"`` subtracts their mean and divides by their standard deviation;
            ``"softmax"`` makes weights of whatever the scores are.

    >>> from kvpolicy import Attention, KeyNorm, Policy, TopK
    >>> Policy((Attention() >> Normalize("z")) + (KeyNorm() >> Normalize("z")) >> TopK(1024))
    Policy(((Attention() >> Normalize('z')) + (KeyNorm() >> Normalize('z'))) >> TopK(1024))
    """

    kind: Literal["sum", "max", "z", "softmax"]

    def __post_init__(self) -> None:
        _check.choice(self, "kind", self.kind, ("sum", "max", "z", "softmax"))

    def apply(self, scores: Scores, view: View, state: StageState | None) -> Scores:
        """Return the scores on one scale; weights stay weights under ``"sum"`` and ``"max"``."""
        values, inside = scores.values.to(torch.float64), view.candidates
        if self.kind == "softmax":
            # Where the largest is infinite, a difference from it is nan; the largest finite number is large enough.
            values = torch.nan_to_num(values, nan=-torch.inf, posinf=_LARGE)
            highest = torch.where(inside, values, -torch.inf).amax(-1, keepdim=True).clamp(min=-_LARGE)
            powers = torch.exp(values - highest)
            total = torch.where(inside, powers, 0).sum(-1, keepdim=True)
            return scores.replace(powers / total.clamp(min=torch.finfo(torch.float32).tiny), weights=True)
        counted = torch.where(inside, values, 0)
        tiny = torch.finfo(torch.float32).tiny
        if self.kind == "z":
            count = inside.sum(-1, keepdim=True).clamp(min=1)
            centred = values - counted.sum(-1, keepdim=True) / count
            spread = torch.where(inside, centred, 0).square().sum(-1, keepdim=True).div(count).sqrt()
            return scores.replace(centred / spread.clamp(min=tiny), weights=False)
        magnitude = counted.abs()
        total = magnitude.sum(-1, keepdim=True) if self.kind == "sum" else magnitude.amax(-1, keepdim=True)
        return scores.replace(values / total.clamp(min=tiny), weights=scores.weights)
