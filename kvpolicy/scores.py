"""Scores, protection tiers, and the total order by which every choice is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.view import View

__all__ = ["Keep", "Scores", "Tier", "order_key", "top"]

_INT64_MAX = torch.iinfo(torch.int64).max


class Tier:
    """Name the levels of protection; a higher tier is kept before any lower one."""

    FREE = 0  #: the slot holds no token
    CANDIDATE = 1  #: may be evicted
    VALUE = 2  #: guarded for the size of its value, or of its score
    PROMPT = 3  #: guarded as part of the prompt
    SINK = 4  #: guarded as one of the first tokens
    RECENT = 7  #: one of the last tokens, which are never candidates


@dataclass(frozen=True, eq=False)
class Scores:
    """Hold one number and one protection tier a slot.

    Attributes:
        values: ``[B, H, S]`` float32; higher is kept.
        tier: ``[B, H, S]`` int64, see :class:`Tier`.
        weights: whether ``values`` are weights (non-negative, a distribution up to scale) or
            logits. A sampler takes the logarithm of weights and uses logits as they are.
    """

    values: Tensor
    tier: Tensor
    weights: bool

    @staticmethod
    def of(view: View, values: Tensor, *, weights: bool) -> Scores:
        """Make scores of ``values``, with the tiers that the view alone decides.

        Args:
            view: whose slots they are.
            values: ``[B, H, S]``, as ``view.positions``.
            weights: whether they are weights or logits, see above.

        Raises:
            ParameterError: they are no tensor of that shape. It would be stretched, and one request could have
                the scores of another.
        """
        _insist_on_slots("Scores.of(view, values): a score", values, view.positions)
        recent = torch.where(view.candidates, Tier.CANDIDATE, Tier.RECENT)
        tier = torch.where(view.valid, recent, Tier.FREE)
        return Scores(values.to(torch.float32), tier, weights)

    def replace(self, values: Tensor, *, weights: bool) -> Scores:
        """Return scores with other numbers and the same tiers.

        Raises:
            ParameterError: they are no tensor of the same shape.
        """
        _insist_on_slots("replace(values): a score", values, self.tier)
        return Scores(values.to(torch.float32), self.tier, weights)

    def guard(self, mask: Tensor, tier: int) -> Scores:
        """Return scores in which the slots of ``mask`` are protected at least by ``tier``.

        Free slots are never protected. Guards compose: the highest tier counts.

        Raises:
            ParameterError: the tier is not one of a guard, 2 to 6, or the mask is no tensor of the scores' shape.
        """
        _insist_on_slots("guard(mask, tier): a bool", mask, self.tier)
        if not Tier.CANDIDATE < tier < Tier.RECENT:
            raise ParameterError(f"guard(mask, {tier}): a guard's tier is 2 to 6, such as Tier.VALUE or Tier.SINK")
        raised = torch.where(mask & (self.tier > Tier.FREE), tier, Tier.FREE)
        return dataclasses.replace(self, tier=torch.maximum(self.tier, raised))


def _insist_on_slots(what: str, found: object, like: Tensor) -> None:
    """Refuse what has not one number a slot: torch would stretch it, over rows and heads that it is not of."""
    if isinstance(found, Tensor) and found.shape == like.shape:
        return
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise ParameterError(f"{what} a slot is {list(like.shape)}, found {shape}; expand it to view.positions.shape")


@dataclass(frozen=True, eq=False)
class Keep:
    """Say which slots survive an eviction.

    Attributes:
        mask: ``[B, H, S]`` bool, true where the slot is kept; false where it is free.
        victims: ``[B, H, E]`` int64, the slots evicted, -1 padded, or None where survivors are
            fewer than victims and nobody should ask for them.
        broken: ``[B]`` int64, guarded tokens that had to go because guards exceeded the budget.
    """

    mask: Tensor
    victims: Tensor | None
    broken: Tensor


def order_key(values: Tensor, positions: Tensor, tier: Tensor | int = Tier.CANDIDATE) -> Tensor:
    """Pack (tier, score, position) into one int64, so that every choice is a total order.

    3 bits of tier, 32 of score, 28 of position. Equal scores are decided by position, the more
    recent token winning. ``nan`` counts as minus infinity, and -0.0 as 0.0.

    Args:
        values: float32.
        positions: integers from -1 to ``2**28 - 2``.
        tier: 0 to 7.

    >>> import torch
    >>> a, b = torch.tensor([0.5, 0.5]), torch.tensor([7, 3])
    >>> key = order_key(a, b)
    >>> bool(key[0] > key[1])
    True
    """
    values = torch.nan_to_num(values.to(torch.float32), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    bits = (values + 0.0).view(torch.int32).to(torch.int64)
    # Negative floats order backwards as integers: flip all but their sign.
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2**31
    return (bits << 28) + (positions.to(torch.int64) + 1) + (tier << 60)


def top(key: Tensor, n: Tensor | int, limit: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
    """Return the slots with the ``n`` largest (or smallest) keys of each row.

    Args:
        key: ``[..., S]`` int64, all different where it matters.
        n: ``[...]`` int64, or one int: how many of each row.
        limit: the largest ``n``, known on the host.
        largest: take the largest rather than the smallest.

    Returns:
        ``[..., limit]`` slots and ``[..., limit]`` bool, true for the first ``n``.
    """
    limit = min(limit, key.shape[-1])
    slots = key.topk(limit, dim=-1, largest=largest).indices
    rank = torch.arange(limit, device=key.device)
    count = n[..., None] if isinstance(n, Tensor) else n
    return slots, (rank < count).expand(slots.shape)


def mask_of(slots: Tensor, chosen: Tensor, size: int) -> Tensor:
    """Return the ``[..., size]`` bool mask of the chosen slots; no slot may be named twice."""
    mask = torch.zeros(*slots.shape[:-1], size, dtype=torch.bool, device=slots.device)
    return mask.scatter(-1, slots, chosen)


def part(budget: Tensor, share: float) -> Tensor:
    """Return ``floor(share * budget)``; computed in float64, where 0.29 * 100 is told from 29."""
    return torch.floor(budget.to(torch.float64) * share + 1e-9).to(torch.int64)


def select_top(scores: Scores, view: View, budget: Tensor) -> Keep:
    """Keep the ``budget`` slots of each head that are highest in (tier, score, position).

    Whichever are fewer, victims or survivors, are searched for; nothing is sorted.

    Args:
        scores: of the view.
        view: where positions are read.
        budget: ``[B, H]`` int64, not above ``view.max_budget``.
    """
    size = view.shape[2]
    key = order_key(scores.values, view.positions, scores.tier)
    losing = (view.lengths - budget).clamp(min=0)
    guarded = (scores.tier > Tier.CANDIDATE).to(torch.int64)
    if view.max_victims <= view.max_budget:
        key = torch.where(view.valid, key, _INT64_MAX)
        slots, chosen = top(key, losing, view.max_victims, largest=False)
        mask = view.valid & ~mask_of(slots, chosen, size)
        victims = torch.where(chosen, slots, -1)
        broken = (guarded.gather(-1, slots) * chosen).sum((1, 2))
        return Keep(mask, victims, broken)
    slots, chosen = top(key, torch.minimum(budget, view.lengths), view.max_budget)
    mask = mask_of(slots, chosen, size)
    return Keep(mask, None, (guarded * (view.valid & ~mask)).sum((1, 2)))
