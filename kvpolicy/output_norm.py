"""The transform of CriticalKV and DefensiveKV: what a token's value does to the output of its layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpolicy import _check
from kvpolicy.errors import CompositionError
from kvpolicy.scorers.attention import sum_over_heads
from kvpolicy.scores import Scores
from kvpolicy.stage import Transform
from kvpolicy.token_number import TokenNumber
from kvpolicy.view import StageState, View

__all__ = ["OutputNorm"]

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, repr=False)
class OutputNorm(TokenNumber, Transform):
    """Multiply the score of a token by how large its value is once it is projected to the output.

    How large: the sum of the absolute numbers of ``W_o v``, the mean over the query heads of the group. A
    score that is attention becomes a bound of what losing the token changes. Logits have the logarithm of it added.

    Args:
        epsilon: added to the score first, so that a token without attention counts, too; 0 behind logits.
        relative: divide by the sum of it over the KV heads of the layer that hold the token.

    Raises:
        CompositionError: when first applied, an epsilon would be added to logits.

    Source: CriticalKV, https://arxiv.org/abs/2502.03805, section 4; ``relative`` is that of DefensiveKV's code,
    https://github.com/FFY0/DefensiveKV.

    >>> from kvpolicy import Attention, Policy, TopK
    >>> Policy(Attention() >> OutputNorm(1e-4) >> TopK(1024))
    Policy(OutputNorm(epsilon=0.0001) >> TopK(1024))
    """

    epsilon: float = 0.0
    relative: bool = False

    def __post_init__(self) -> None:
        _check.number(self, "epsilon", self.epsilon, 0)
        _check.flag(self, "relative", self.relative)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Return the weights of the output projection, and every head of a layer where norms are relative."""
        return frozenset({"output_projection", "cross_heads"} if self.relative else {"output_projection"})

    def numbers_in(self, view: View, keys: Tensor, values: Tensor) -> Tensor:
        """Return the norm of each projected value."""
        assert view.output is not None
        return view.output.norms(values, view.compute_dtype, view.workspace)

    def apply(self, scores: Scores, view: View, state: StageState | None) -> Scores:
        """Return the products; weights stay weights."""
        norms = self.numbers(state)
        if self.relative:
            every, positions, order = (view.gather_heads(t) for t in (norms, view.positions, view.order))
            norms = norms / sum_over_heads(every, positions, order, view.positions).clamp(min=_TINY)
        if not scores.weights:
            if self.epsilon:
                raise CompositionError(
                    f"{self!r} stands behind a scorer of logits, and an epsilon can be added to weights alone, such as "
                    f"attention; write {replace(self, epsilon=0.0)!r}, or a scorer of weights"
                )
            return scores.replace(scores.values + torch.log(norms), weights=False)
        return scores.replace((scores.values + self.epsilon) * norms, weights=True)
