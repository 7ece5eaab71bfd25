"""Move survivors out of the tail into the holes: in place, and only what must move.

A head that keeps ``n`` of its slots has as many holes below ``n`` as survivors at or above it.
Each survivor moves into one hole; everything else stays where it is. Shapes are fixed, and nothing
is sorted but the moves.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["compress", "move_", "move_lines_", "moves", "reorder_"]


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
    out = torch.full((*values.shape[:-1], size + 1), fill, dtype=values.dtype, device=values.device)
    return out.scatter_(-1, _rank(chosen), values)[..., 1:]


def _rank(chosen: Tensor) -> Tensor:
    """Return 1, 2, ... for what is chosen, in order, and 0 for all else: a place that is cut off."""
    return chosen.cumsum(-1, dtype=torch.int32).mul_(chosen).to(torch.int64)


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
    size = mask.shape[-1]
    tail = kept[..., None] + torch.arange(limit, device=mask.device)
    alive = (tail < lengths[..., None]) & mask.gather(-1, tail.clamp(max=size - 1))
    source = _ascending(tail, alive, size)
    if victims is None or victims.shape[-1] != limit:
        slots = torch.arange(size, device=mask.device).expand(mask.shape)
        target = compress(slots, ~mask & (slots < kept[..., None]), limit, size)
    else:
        target = _ascending(victims, (victims >= 0) & (victims < kept[..., None]), size)
    idle = source == size
    source, target = (torch.where(idle, slots[..., :1], slots) for slots in (source, target))
    return source % size, target % size  # `size`, where a head needs no move, becomes slot 0


def _ascending(slots: Tensor, chosen: Tensor, size: int) -> Tensor:
    """Return the chosen slots of each row in the order of memory, and ``size`` behind them."""
    return torch.where(chosen, slots, size).sort(-1).values


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
        move_lines_(tensor.flatten(0, 2), flat_source, flat_target)


def move_lines_(lines: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy lines of a tensor ``[N, ...]`` to other places in it.

    Args:
        lines: modified.
        source: ``[M]``, the lines to read.
        target: ``[M]``, the lines to write; none is read, unless it is copied onto itself.
    """
    words = _words(lines)
    words.index_copy_(0, target, words.index_select(0, source))


def _words(lines: Tensor) -> Tensor:
    """Return the same memory as the widest words: a CPU copies chosen rows word by word."""
    if lines.device.type != "cpu" or lines.dim() < 2:
        return lines
    sizes = (lines.shape[-1], lines.stride(0), lines.storage_offset())
    return lines if any(size * lines.element_size() % 16 for size in sizes) else lines.view(torch.complex128)


def reorder_(order: Tensor, mask: Tensor, kept: Tensor, first: int, source: Tensor, target: Tensor) -> None:
    """Let the slots be in position order again after survivors have moved; modifies ``order``.

    Args:
        order: ``[B, H, S]``, the slots in position order before; behind them there may be further free
            slots, which are left as they are.
        mask: ``[B, H, S]`` bool, the survivors before they moved.
        kept: ``[B, H]`` survivors.
        first: not more than any ``kept``, known on the host. From there on, free slots stand in
            their own order.
        source: what :func:`moves` returned.
        target: what :func:`moves` returned.
    """
    size = order.shape[-1]
    slots = torch.arange(size, device=order.device, dtype=order.dtype)
    place = torch.where(mask, slots, -1).scatter_(-1, source, target.to(order.dtype))
    starts = torch.arange(0, place.numel(), size, device=order.device, dtype=order.dtype)
    moved = place.flatten().index_select(0, (order + starts.view(*order.shape[:-1], 1)).flatten()).view(order.shape)
    # What has gone, or is free, is written behind the survivors, where the tail is written once more.
    gone = moved < 0
    rank = gone.logical_not().cumsum(-1).sub_(1).masked_fill_(gone, size - 1)
    order.scatter_(-1, rank, moved)
    tail = order[..., first:]
    tail.copy_(torch.where(slots[first:] >= kept[..., None], slots[first:], tail))
