"""Move survivors out of the tail into the holes: in place, and only what must move.

A head that keeps ``n`` of its slots has as many holes below ``n`` as survivors at or above it.
Each survivor moves into one hole; everything else stays where it is. Shapes are fixed, and nothing
is sorted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["compress", "move_", "moves", "reorder_after"]


def compress(values: Tensor, chosen: Tensor, size: int, fill: int) -> Tensor:
    """Return the chosen values of each row, packed to the front.

    Args:
        values: ``[..., N]`` integers.
        chosen: ``[..., N]`` bool, at most ``size`` of each row.
        size: length of the result.
        fill: what stands behind the last chosen value.

    >>> import torch
    >>> compress(torch.tensor([[7, 8, 9]]), torch.tensor([[True, False, True]]), 3, -1)
    tensor([[ 7,  9, -1]])
    """
    rank = torch.where(chosen, chosen.cumsum(-1) - 1, size)  # what is not chosen goes to a place that is cut off
    out = torch.full((*values.shape[:-1], size + 1), fill, dtype=values.dtype, device=values.device)
    return out.scatter(-1, rank, values)[..., :size]


def moves(mask: Tensor, victims: Tensor | None, lengths: Tensor, kept: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return which slot must move where, so that the survivors of each head fill its first slots.

    Args:
        mask: ``[B, H, S]`` bool, the survivors.
        victims: ``[B, H, E]`` slots to drop, -1 padded, if they are known.
        lengths: ``[B, H]`` slots in use, from slot 0 on.
        kept: ``[B, H]`` survivors.
        limit: the largest ``lengths - kept``, known on the host.

    Returns:
        Sources and destinations, ``[B, H, limit]``. Where a head needs fewer moves, the last ones
        repeat its first, or move slot 0 onto itself.
    """
    tail = kept[..., None] + torch.arange(limit, device=mask.device)
    in_use = tail < lengths[..., None]
    alive = in_use & mask.gather(-1, tail.clamp(max=mask.shape[-1] - 1))
    source = compress(tail, alive, limit, -1)
    if victims is None:
        slots = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
        victims, holes = slots, ~mask & (slots < kept[..., None])
    else:
        holes = (victims >= 0) & (victims < kept[..., None])
    target = compress(victims, holes, limit, -1)
    idle = source < 0
    return (
        torch.where(idle, source[..., :1], source).clamp(min=0),
        torch.where(idle, target[..., :1], target).clamp(min=0),
    )


def flat(slots: Tensor, size: int) -> Tensor:
    """Return ``[B, H, N]`` slots as indices into a tensor whose first three axes are flattened."""
    b, h, _ = slots.shape
    start = torch.arange(b * h, device=slots.device).view(b, h, 1) * size
    return (slots + start).flatten()


def move_(tensors: Iterable[Tensor], source: Tensor, target: Tensor) -> None:
    """Copy slots within each tensor, in place.

    Args:
        tensors: contiguous ``[B, H, S, ...]``.
        source: ``[B, H, N]`` slots to read.
        target: ``[B, H, N]`` slots to write; no slot of ``source`` is among them, unless it moves
            onto itself.
    """
    flat_source = flat_target = None
    for tensor in tensors:
        size = tensor.shape[2]
        if flat_source is None or flat_target is None:
            flat_source, flat_target = flat(source, size), flat(target, size)
        lines = tensor.view(-1, *tensor.shape[3:])
        lines.index_copy_(0, flat_target, lines.index_select(0, flat_source))


def reorder_after(order: Tensor, mask: Tensor, source: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """Return the slots in position order, after survivors have moved.

    Args:
        order: ``[B, H, S]``, the slots in position order before.
        mask: ``[B, H, S]`` bool, the survivors before they moved.
        source: what :func:`moves` returned.
        target: what :func:`moves` returned.
        kept: ``[B, H]`` survivors.

    Returns:
        ``[B, H, S]``, in the dtype of ``order``; free slots stand last, in their own order.
    """
    slots = torch.arange(order.shape[-1], device=order.device, dtype=order.dtype)
    place = slots.expand(order.shape).scatter(-1, source, target.to(order.dtype))
    at = order.to(torch.int64)
    packed = compress(place.gather(-1, at), mask.gather(-1, at), order.shape[-1], 0)
    return torch.where(slots < kept[..., None], packed, slots)
