"""Keys and values where their owner put them: dense caches, pages, and the lines that both consist of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from kvpolicy.compaction import move_lines_
from kvpolicy.scattered import Scattered

__all__ = ["Dense", "Memory", "Paged", "lines_of"]


class Memory(Protocol):
    """Be the keys and values of all layers, while an eviction reads and moves them."""

    @property
    def joined(self) -> bool:
        """Return whether one view can show rows of several layers."""
        ...

    def slots(self, at: slice, size: int) -> tuple[Tensor, Tensor]:
        """Return the first slots of some of the ``layers * requests`` rows, ``[rows, H, size, D]``."""
        ...

    def move_(self, at: slice, source: Tensor, target: Tensor) -> None:
        """Copy slots ``[rows, H, N]`` of some rows to others, in place."""
        ...


class Dense:
    """Be caches ``[layers, B, S, H, D]``, or one a layer, of any strides whose last is 1.

    Args:
        keys: one piece ``[L, B, S, H, D]``, or several that follow each other.
        values: as many.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self._pieces = [(_rows_first(k), _rows_first(v)) for k, v in zip(keys, values, strict=True)]

    @property
    def joined(self) -> bool:
        """Return whether all layers are one piece."""
        return len(self._pieces) == 1

    def _piece(self, at: slice) -> tuple[Tensor, Tensor]:
        size = len(self._pieces[0][0])
        number, start = at.start // size, at.start % size
        keys, values = self._pieces[number]
        here = slice(start, start + at.stop - at.start)
        return keys[here], values[here]

    def slots(self, at: slice, size: int) -> tuple[Tensor, Tensor]:
        """Return views."""
        keys, values = self._piece(at)
        return keys[:, :, :size], values[:, :, :size]

    def move_(self, at: slice, source: Tensor, target: Tensor) -> None:
        """Copy slots within each head."""
        rows, heads = (torch.arange(n, device=source.device) for n in source.shape[:2])
        for held in self._piece(at):
            lines, (row, head, slot) = lines_of(held)
            first = (rows * row)[:, None, None] + (heads * head)[:, None]
            move_lines_(lines, (first + source * slot).flatten(), (first + target * slot).flatten())


class Paged:
    """Be pages ``[blocks, page, H, D]`` of each layer, which a table gives to rows.

    Args:
        keys: ``[L, blocks, page, H, D]``, or one ``[1, blocks, page, H, D]`` a layer.
        values: as many.
        table: ``[B, max_blocks]``, the pages of each row; what lies behind those in use may be anything.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], table: Tensor) -> None:
        self._keys, self._values = keys, values
        self._requests, self._page = table.shape[0], keys[0].shape[2]
        self._pages = table.to(torch.int64).clamp(0, keys[0].shape[1] - 1)

    @property
    def joined(self) -> bool:
        """Return whether all layers are one piece."""
        return len(self._keys) == 1

    def _table(self, tensor: Tensor, at: slice, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lines of a piece, and which of them slots ``[rows, H, N]`` are."""
        lines, (layer, page, offset, head) = lines_of(tensor)
        first = at.start % (len(tensor) * self._requests)
        row = torch.arange(first, first + at.stop - at.start, device=slots.device)
        request, heads = row % self._requests, torch.arange(tensor.shape[3], device=slots.device)
        places = slots // self._page
        # Heads share the pages of a row, but not the slots that are asked for.
        pages = self._pages[request[:, None, None], places]
        start = (row // self._requests * layer)[:, None, None] + (heads * head)[:, None]
        return lines, start + pages * page + slots % self._page * offset

    def _piece(self, at: slice) -> tuple[Tensor, Tensor]:
        number = at.start // (len(self._keys[0]) * self._requests)
        return self._keys[number], self._values[number]

    def slots(self, at: slice, size: int) -> tuple[Tensor, Tensor]:
        """Return keys and values that are gathered when they are read, and as far as they are read."""
        slots = torch.arange(size, device=self._pages.device).expand(at.stop - at.start, 1, -1)
        keys, values = (Scattered(*self._table(tensor, at, slots)) for tensor in self._piece(at))
        return cast(Tensor, keys), cast(Tensor, values)

    def move_(self, at: slice, source: Tensor, target: Tensor) -> None:
        """Copy slots within the pages of each row."""
        for tensor in self._piece(at):
            lines, reading = self._table(tensor, at, source)
            _, writing = self._table(tensor, at, target)
            move_lines_(lines, reading.flatten(), writing.flatten())


def _rows_first(cache: Tensor) -> Tensor:
    """Return ``[layers, B, S, H, D]`` as a view ``[layers * B, H, S, D]``."""
    return cache.transpose(2, 3).flatten(0, 1)


def lines_of(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """Return the memory of ``[..., D]`` as lines ``[N, D]``, and how many lines a step along each axis is.

    Lines may overlap where strides are no multiples of ``D``; those of the tensor do not.

    >>> import torch
    >>> lines, steps = lines_of(torch.arange(24).view(2, 3, 4).transpose(0, 1))
    >>> lines[1 * steps[0] + 1 * steps[1]]
    tensor([16, 17, 18, 19])
    """
    *sizes, dim = tensor.shape
    strides = [stride if size > 1 else 0 for size, stride in zip(sizes, tensor.stride(), strict=False)]
    step = math.gcd(*strides) or dim
    steps = [stride // step for stride in strides]
    count = 1 + sum((size - 1) * stride for size, stride in zip(sizes, steps, strict=True))
    return tensor.as_strided((count, dim), (step, 1), tensor.storage_offset()), steps
