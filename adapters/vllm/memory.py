"""Keys and values in vLLM's pages: read and moved where they lie, or unpacked where a kernel packs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.adapters.flash_attn.memory import Dense, Memory, Paged

__all__ = ["Pages"]

_DIGIT = 16  #: numbers below it are exact in every floating-point dtype of a cache


class Pages:
    """Show the keys and values of some rows and layers to an eviction.

    Most backends see a layer's cache as ``[blocks, H, block_size, D + Dv]``, with any strides: slots are moved in
    place. On a CPU, kernels permute what lies in a block; then the rows are unpacked, and what has changed is
    written by the kernel that wrote it first.

    Args:
        layers: the attention modules, bound to their caches.
        head_dim: size of a key.
        value_dim: size of a value.
        packed: kernels permute what lies in a block.
    """

    def __init__(self, layers: Sequence[Any], head_dim: int, value_dim: int, *, packed: bool) -> None:
        self.layers, self._head_dim, self.value_dim, self._packed = layers, head_dim, value_dim, packed
        self._packing: tuple[Tensor, Tensor] | None = None

    def _caches(self, at: slice) -> list[Tensor]:
        return [layer.kv_cache for layer in self.layers[at]]

    def open(
        self, at: slice, table: Tensor, lengths: Sequence[int], kept: Sequence[int]
    ) -> tuple[Memory, Callable[[], None]]:
        """Return the memory of some layers and rows, and what writes back what was changed in it.

        Args:
            at: layers, counted within the group.
            table: ``[rows, blocks]``, the blocks of each row.
            lengths: slots in use of each row, on the host.
            kept: slots that stay in use.
        """
        caches = self._caches(at)
        if not self._packed:
            pieces = [_views(cache, self._head_dim) for cache in _joined(caches)]
            return Paged([keys for keys, _ in pieces], [values for _, values in pieces], table), lambda: None
        if self._packing is None:
            self._packing = _packing(self.layers[0])
        size = caches[0].shape[2]
        table = table[:, : -(-max(lengths) // size)].to(torch.int64)
        keys, values = _unpacked(caches, self._packing, table)

        moved = torch.tensor([[stay if stay < length else 0] for length, stay in zip(lengths, kept, strict=True)])
        rows, slots = (torch.arange(max(kept)) < moved).nonzero().unbind(1)  # all slots that stay of rows that were cut
        places = table[rows, slots // size] * size + slots % size

        def write() -> None:
            for number, layer in enumerate(self.layers[at] if len(rows) else ()):
                new = (x[number][rows, slots] for x in (keys, values))
                layer.impl.do_kv_cache_update(layer, *new, caches[number], places)

        return Dense([keys], [values]), write


def _views(cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return keys and values ``[L, blocks, block_size, H, D]`` of ``[L, blocks, H, block_size, D + Dv]``."""
    by_slot = cache.transpose(2, 3)
    return by_slot[..., :head_dim], by_slot[..., head_dim:]


def _joined(caches: Sequence[Tensor]) -> list[Tensor]:
    """Return the caches of layers as one tensor where they lie at equal distances, else one by one."""
    first, steps = caches[0], {b.data_ptr() - a.data_ptr() for a, b in itertools.pairwise(caches)}
    same = all(c.stride() == first.stride() and c.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
               for c in caches)  # fmt: skip
    if len(caches) == 1 or not same or len(steps) != 1 or min(steps) <= 0 or min(steps) % first.element_size():
        return [cache[None] for cache in caches]
    step = min(steps) // first.element_size()
    sizes, strides = (len(caches), *first.shape), (step, *first.stride())
    return [first.as_strided(sizes, strides, first.storage_offset())]


def _unpacked(caches: Sequence[Tensor], packing: Sequence[Tensor], table: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of some layers and rows, each ``[L, rows, slots, H, D]``."""
    heads, size, both = caches[0].shape[1:]
    (rows, count), dim = table.shape, both // 2
    keys, values = caches[0].new_empty(2, len(caches), rows * count, size, heads, dim)
    steps = [_steps(one) for one in packing]
    for number, cache in enumerate(caches):
        blocks = cache.index_select(0, table.flatten()).view(rows * count, heads, 2, size * dim)
        for which, out in enumerate((keys[number], values[number])):
            _unpack(blocks[:, :, which], packing[which], steps[which], out)
    shape = (len(caches), rows, count * size, heads, dim)
    return keys.view(shape), values.view(shape)


def _unpack(blocks: Tensor, packing: Tensor, steps: list[int] | None, out: Tensor) -> None:
    """Copy blocks ``[n, H, size * dim]`` to ``[n, size, H, dim]``, where numbers lie in order."""
    count, size, heads, dim = out.shape
    if steps is None:
        out.copy_(blocks[..., packing].unflatten(-1, (size, dim)).transpose(1, 2))
        return
    if steps[-1] == 1 and out.dtype.itemsize == 2:  # neighbours stay neighbours: two are copied as one
        blocks, out, steps = blocks.view(torch.int32), out.view(torch.int32), [step // 2 for step in steps[:-1]]
    bits = size.bit_length() - 1
    shape = (count, *[2] * bits, heads, *[2] * (len(steps) - bits))
    strides = (blocks.stride(0), *steps[:bits], blocks.stride(1), *steps[bits:])
    out.view(shape).copy_(blocks.as_strided(shape, strides, blocks.storage_offset()))


def _steps(packing: Tensor) -> list[int] | None:
    """Return how far apart the bits of a number put it in its block, highest bit first; None where they do not.

    Kernels cut axes and permute them: then a block is a strided view, which is copied faster than it is looked up.
    """
    number, bits = torch.arange(len(packing)), len(packing).bit_length() - 1
    steps = [int(packing[1 << bit]) for bit in range(bits)]
    place = sum(((number >> bit & 1) * step for bit, step in enumerate(steps)), torch.zeros_like(number))
    return steps[::-1] if len(packing) == 1 << bits and torch.equal(place, packing) else None


def _packing(layer: Any) -> tuple[Tensor, Tensor]:
    """Return where each number of a block lies, of keys and of values.

    Asks the kernel itself: it writes numbers that say where they were put.
    """
    cache = layer.kv_cache
    heads, size, both = cache.shape[1:]
    dim = both // 2
    number, place = torch.arange(size * dim), torch.zeros(2, size * dim, dtype=torch.int64)
    scale = 1
    while scale < size * dim:
        digit = (number // scale % _DIGIT).to(cache.dtype).view(size, 1, dim).expand(-1, heads, -1).contiguous()
        scratch = torch.zeros(1, *cache.shape[1:], dtype=cache.dtype)
        layer.impl.do_kv_cache_update(layer, digit, digit.clone(), scratch, torch.arange(size))
        place += scratch.view(heads, 2, -1)[0].to(torch.int64) * scale
        scale *= _DIGIT
    # `place` says which number lies at a place; its inverse says where a number lies.
    keys, values = place.argsort(-1)
    return keys, values
