"""Whether strided tensors share memory, found from their addresses, shapes and strides alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

__all__ = ["crossing", "overlaps"]

_Extent = tuple[int, tuple[int, ...], tuple[int, ...]]  # address in bytes, shape and strides in elements


def overlaps(tensor: Tensor) -> bool:
    """Return whether two elements may share memory: no axis may begin anew before the smaller ones have ended.

    >>> import torch
    >>> overlaps(torch.zeros(4, 3).T), overlaps(torch.zeros(3).expand(4, 3))
    (False, True)
    """
    end = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= end:
                return True
            end += stride * (size - 1)
    return False


def crossing(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Return two tensors that may share memory, or None.

    Those that lie between each other, as keys and values of ``[B, S, 2, H, D]`` do, are known to be apart
    where their strides are equal; others that begin before another one ends are taken to share memory.

    Args:
        tensors: of one dtype, none of which overlaps with itself.

    >>> import torch
    >>> both = torch.zeros(3, 10, 2, 4)
    >>> crossing([both[:, :, 0], both[:, :, 1]]), crossing([both[:, :6], both[:, 4:]])
    (None, (0, 1))
    """
    extents = tuple((t.data_ptr(), tuple(t.shape), t.stride()) for t in tensors)
    return _crossing(extents, tensors[0].element_size())


@lru_cache(maxsize=64)  # the same caches are asked about in every forward pass
def _crossing(extents: tuple[_Extent, ...], bytes_each: int) -> tuple[int, int] | None:
    order = sorted(range(len(extents)), key=lambda i: extents[i][0])
    for place, i in enumerate(order):
        start, shape, strides = extents[i]
        end = start + bytes_each * (1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)))
        for j in order[place + 1 :]:
            if extents[j][0] >= end:
                break
            distance, rest = divmod(extents[j][0] - start, bytes_each)
            if rest or not _apart(extents[i], extents[j], distance):
                return min(i, j), max(i, j)
    return None


def _apart(low: _Extent, high: _Extent, distance: int) -> bool:
    """Return whether one tensor fits into the gaps of another one that begins ``distance`` elements before it."""
    axes: list[tuple[float, int, int]] = [(math.inf, 1, 1)]
    for m, n, mine, other in zip(low[1], high[1], low[2], high[2], strict=True):
        if max(m, n) > 1:
            if mine != other:
                return False
            axes.append((mine, m, n))
    low_end = high_end = 0.0  # the last elements of the blocks that the axes so far make
    end = None  # and of both together, once they lie behind each other
    for stride, m, n in sorted(axes):
        if end is None and stride > distance:
            if low_end >= distance:
                return False
            end = distance + high_end
        if stride == math.inf:
            break
        if end is None:
            low_end, high_end = low_end + stride * (m - 1), high_end + stride * (n - 1)
        elif stride <= end:
            return False
        else:
            end += stride * (max(m, n) - 1)
    return True
