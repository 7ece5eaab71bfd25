"""Scorers whose number depends on the token alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kvpolicy import _check
from kvpolicy.scores import Scores
from kvpolicy.stage import Scorer
from kvpolicy.token_number import TokenNumber
from kvpolicy.view import StageState, View

__all__ = ["Constant", "KeyNorm", "Norm", "Recency", "ValueNorm", "magnitude"]

#: How large a value state is: max - min, Euclidean, largest, variance or absolute sum of its elements.
Norm = Literal["range", "l2", "absmax", "var", "l1"]


def magnitude(values: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """Return how large each vector is: ``[..., Dv]`` to ``[...]`` in ``dtype``.

    ``"range"`` is the largest element minus the smallest, VaSE's measure; its authors found the
    kinds equal within noise (arXiv 2606.03928, ablation of the norm).

    >>> import torch
    >>> magnitude(torch.tensor([3.0, -1.0, 0.0]), "range", torch.float32)
    tensor(4.)
    """
    if norm == "range":  # extremes are exact in any dtype: only their difference needs the wide one
        low, high = values.aminmax(dim=-1)
        return high.to(dtype) - low.to(dtype)
    if norm == "absmax":
        return torch.linalg.vector_norm(values, ord=torch.inf, dim=-1, dtype=dtype)
    if norm == "l1":
        return torch.linalg.vector_norm(values, ord=1, dim=-1, dtype=dtype)
    if norm == "var":
        return values.to(dtype).var(dim=-1)
    return torch.linalg.vector_norm(values, dim=-1, dtype=dtype)


@dataclass(frozen=True, repr=False)
class KeyNorm(TokenNumber, Scorer):
    """Score a token by minus the Euclidean norm of its key.

    Source: Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression
    (arXiv 2406.11430).

    >>> from kvpolicy import Policy, TopK
    >>> Policy(KeyNorm() >> TopK(1024))
    Policy(KeyNorm() >> TopK(1024))
    """

    def number(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return minus the norm of each key."""
        return -torch.linalg.vector_norm(keys, dim=-1, dtype=dtype)

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the remembered numbers, as logits."""
        return Scores.of(view, self.numbers(state), weights=False)


@dataclass(frozen=True, repr=False)
class ValueNorm(TokenNumber, Scorer):
    """Score a token by how large its value is: larger values are kept.

    Args:
        norm: ``"range"`` (max - min, as VaSE), ``"l2"``, ``"absmax"``, ``"var"`` or ``"l1"``.

    Source: the value-state magnitude of VaSE (arXiv 2606.03928). To evict the largest values,
    the experiment that breaks a model, write ``-1.0 * ValueNorm()``.

    >>> -1.0 * ValueNorm("l2")
    -1.0 * ValueNorm(norm='l2')
    """

    norm: Norm = "range"

    def __post_init__(self) -> None:
        _check.choice(self, "norm", self.norm, get_args(Norm))

    def number(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the magnitude of each value."""
        return magnitude(values, self.norm, dtype)

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the remembered numbers, as weights."""
        return Scores.of(view, self.numbers(state), weights=True)


@dataclass(frozen=True, repr=False)
class Recency(Scorer):
    """Score a token by its position: the latest are kept.

    >>> from kvpolicy import Policy, Sinks, TopK
    >>> Policy(Recency() >> Sinks(4) >> TopK(1024))  # StreamingLLM
    Policy(Recency() >> Sinks(4) >> TopK(1024))
    """

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the positions, as logits."""
        return Scores.of(view, view.positions, weights=False)


@dataclass(frozen=True, repr=False)
class Constant(Scorer):
    """Score every token alike, so that guards, chance and age decide.

    >>> from kvpolicy import Policy, Stochastic, TopK
    >>> Policy(Constant() >> Stochastic() >> TopK(1024))  # a uniform sample
    Policy(Constant() >> Stochastic() >> TopK(1024))
    """

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return ones, as weights."""
        return Scores.of(view, torch.ones_like(view.positions, dtype=torch.float32), weights=True)
