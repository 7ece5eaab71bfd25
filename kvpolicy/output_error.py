"""A transform that asks how far attention's output moves without a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpolicy import _check
from kvpolicy.probabilities import blocks
from kvpolicy.scores import Scores
from kvpolicy.stage import Transform
from kvpolicy.view import StageState, View

__all__ = ["OutputError"]


@dataclass(frozen=True, repr=False)
class OutputError(Transform):
    """Turn weights into the change of attention's output if this token alone were evicted.

    With weights ``a`` that sum to 1 over all slots of a head, and the output ``o``, the sum of the
    values under these weights, the change is ``a / (1 - a) * |o - v|``: the others share what the
    token had. Logits become weights by a softmax. A token that has all of the weight is kept
    before the others.

    Args:
        fast: take the plain mean of the values in place of the output.

    Source: CAOTE (arXiv 2504.14051, theorem 3.2), and its FastCAOTE.

    >>> from kvpolicy import LastQuery, Policy, TopK
    >>> Policy(LastQuery() >> OutputError() >> TopK(1024), recent=1)
    Policy(LastQuery() >> OutputError() >> TopK(1024), recent=1)
    """

    fast: bool = False

    def __post_init__(self) -> None:
        _check.flag(self, "fast", self.fast)

    def apply(self, scores: Scores, view: View, state: StageState | None) -> Scores:
        """Return the changes, as weights."""
        (b, h, s), dtype, valid = view.shape, view.compute_dtype, view.valid
        weights = scores.values.to(dtype)
        if not scores.weights:
            weights = torch.softmax(weights.masked_fill(~valid, -1e30), -1)
        weights = torch.where(valid, weights, 0)
        share = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        # One token may have nearly all: what the others have is then their sum, and no difference of two
        # numbers near 1; and values are measured from its own.
        largest = share.argmax(-1, keepdim=True)
        others = torch.where(torch.arange(s, device=share.device) == largest, 0, share).sum(-1, keepdim=True)
        # Of several with the largest share, slots would say which one it is: all of them have the same rest.
        rest = torch.where(share == share.gather(-1, largest), others, 1 - share)
        distance = torch.empty(b * h, s, dtype=dtype, device=share.device)
        values, held, at_largest = view.values.flatten(0, 1), valid.flatten(0, 1), largest.flatten(0, 1)
        # Divided in the dtype of the view: a bool over an integer would be float32.
        equal = held.to(dtype) / held.sum(-1, keepdim=True).clamp(min=1)
        mixture = equal if self.fast else share.flatten(0, 1)
        for at in blocks(view, s * values.shape[-1] * torch.finfo(dtype).bits // 8):
            block = torch.where(held[at, :, None], values[at].to(dtype), 0)
            origin = block.gather(1, at_largest[at, :, None].expand(-1, -1, block.shape[-1]))
            block = torch.where(held[at, :, None], block - origin, 0)
            output = torch.bmm(mixture[at, None], block)
            distance[at] = torch.linalg.vector_norm(output - block, dim=-1)
        change = share / rest.clamp(min=torch.finfo(dtype).tiny) * distance.view(b, h, s)
        return scores.replace(torch.where((share > 0) & (rest <= 0), torch.inf, change), weights=True)
