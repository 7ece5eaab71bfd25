"""Which pages an eviction writes, copies first, and gives up: :class:`Book`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.adapters.flash_attn.sharing import overlaps
from kvpolicy.adapters.flash_attn.state import EvictionState
from kvpolicy.errors import UsageError
from kvpolicy.host import insist, on_device, sent

__all__ = ["Book"]


@dataclass(frozen=True, eq=False)
class Book:
    """Keep the books of one eviction: rows have pages in the order of a table.

    Attributes:
        table: ``[B, max_blocks]`` int32 on the device.
        refs: ``[B, max_blocks]`` integers on the host, how many hold each page, or None: one each.
        sizes: how many pages there are, and slots in each.
        lengths: slots in use of each row, on the host.
        kept: those that it keeps.
        due: which rows are cut.
    """

    table: Tensor
    refs: Tensor | Sequence[Sequence[int]] | None
    sizes: Sequence[int]
    lengths: Sequence[int]
    kept: Sequence[int]
    due: Sequence[bool]

    def _pages(self, slots: int) -> int:
        """Return how many pages so many slots take."""
        return -(-slots // self.sizes[1])

    def check(self, state: EvictionState) -> None:
        """Refuse a table that is none, and pages that rows cannot have together; modifies nothing.

        Raises:
            UsageError: on the CPU; another device stops instead where its table names wrong pages.
        """
        table, spec, rows = self.table, state.store.spec, state.batch_size
        if not isinstance(table, Tensor) or table.dim() != 2 or len(table) != rows:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"block_table is {_named(table)}; it is int32 [B, max_blocks], here [{rows}, ...]")
        if table.dtype != torch.int32 or table.device != spec.device:
            raise UsageError(f"block_table is {table.dtype} on {table.device}; kernels read int32 on {spec.device}")
        if table.shape[1] * self.sizes[1] < spec.capacity:
            raise UsageError(
                f"block_table has {table.shape[1]} pages of {self.sizes[1]} slots for each row, and the state was made "
                f"for {spec.capacity} slots"
            )
        if overlaps(table):
            raise UsageError(
                f"block_table has strides {table.stride()}: rows share memory, and an eviction may write one of them; "
                "write block_table.contiguous()"
            )
        refs = self._host_refs()
        for row, length in zip(refs or [], self.lengths, strict=False):
            if min(row[: self._pages(length)], default=1) < 1:
                raise UsageError(
                    f"page_refs={row}: a page in use is held by its row at least, so that it counts 1 or more"
                )
        if not any(self.due):
            return
        blocks, device = self.sizes[0], table.device
        used = on_device([self._pages(length) for length in self.lengths], device)[:, None]
        in_use = torch.arange(table.shape[1], device=device) < used
        pages = table.to(torch.int64)
        wrong = in_use & ((pages < 0) | (pages >= blocks))
        insist(~wrong.any(), UsageError(f"block_table names a page that is none of the {blocks}; nothing was modified"))
        pages = torch.where(in_use, pages.clamp(0, blocks - 1), blocks)
        ascending = pages.sort(-1).values
        same = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] < blocks)
        insist(~same.any(), UsageError("block_table names a page twice in one row; nothing was modified"))
        named = torch.zeros(blocks + 1, dtype=torch.int64, device=device)
        named = named.scatter_add(0, pages.flatten(), torch.ones_like(pages).flatten())
        held = torch.ones_like(pages) if refs is None else sent(torch.tensor(refs), device)
        shared = in_use & (named.index_select(0, pages.flatten()).view(pages.shape) > held)
        error = UsageError(
            "two rows of block_table have a page in common that page_refs does not count so often: an eviction in one "
            "would overwrite the other's tokens; give page_refs= and allocate=, so that such pages are copied; nothing "
            "was modified"
        )
        insist(~shared.any(), error)

    def _host_refs(self) -> list[list[int]] | None:
        """Return the reference counts of the table's places.

        Raises:
            UsageError: they are no integers on the host, of the shape of the table.
        """
        refs: Any = self.refs
        if refs is None:
            return None
        if isinstance(refs, Tensor):
            if refs.device.type != "cpu":
                raise UsageError(f"page_refs is on {refs.device}, and would have to be waited for: keep it on the CPU")
            refs = refs.tolist()
        shape = tuple(self.table.shape)
        rows = list(refs) if isinstance(refs, Sequence) else [refs]
        if not all(isinstance(row, Sequence) and not isinstance(row, str) for row in rows):
            raise UsageError(f"page_refs={self.refs!r}: give a list of integers for each row of block_table")
        if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
            raise UsageError(f"page_refs has another shape than block_table {shape}: one count for each of its places")
        wrong = next((n for row in rows for n in row if not isinstance(n, int) or isinstance(n, bool)), None)
        if wrong is not None:
            raise UsageError(
                f"page_refs holds {wrong!r}: how many hold a page is an integer; for a tensor write .long()"
            )
        return [list(row) for row in rows]

    def copy_shared_(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        allocate: Callable[[int], Tensor | Sequence[int]] | None,
    ) -> Tensor:
        """Copy pages that others hold, too, where an eviction may write; return what rows give up.

        Modifies the new pages and the table.

        Args:
            keys: ``[l, blocks, page, H, D]``, all layers.
            values: the same.
            allocate: gives free pages.

        Returns:
            ``[n]`` int32, in the order of rows.

        Raises:
            UsageError: there is nobody to give pages, or they are none; nothing was modified.
        """
        refs = self._host_refs()
        rows = [r for r, cut in enumerate(self.due) if cut]
        shared = [(r, at) for r in rows for at in range(self._pages(self.kept[r])) if refs and refs[r][at] > 1]
        gone = [(r, at) for r in rows for at in range(self._pages(self.kept[r]), self._pages(self.lengths[r]))]
        freed = self._at(shared + gone)
        if not shared:
            return freed
        if allocate is not None and not callable(allocate):  # pyright: ignore[reportUnnecessaryComparison]
            raise UsageError(
                f"allocate={allocate!r}: give a function that takes a number and returns so many free pages"
            )
        if allocate is None:
            raise UsageError(
                f"{len(shared)} pages of rows that are cut have others that hold them: give allocate=, which returns "
                "free pages to copy them into; nothing was modified"
            )
        new = self._allocated(allocate(len(shared)), len(shared))
        old = freed[: len(shared)].to(torch.int64)
        for tensor in (*keys, *values):
            for layer in tensor:
                layer.index_copy_(0, new, layer.index_select(0, old))
        row, at = (on_device(column, self.table.device) for column in zip(*shared, strict=True))
        self.table.index_put_((row, at), new.to(torch.int32))
        return freed

    def _at(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """Return what stands in some places of the table, a copy."""
        if not places:
            return self.table.new_empty(0)
        row, at = (on_device(column, self.table.device) for column in zip(*places, strict=True))
        return self.table[row, at]

    def _allocated(self, given: Tensor | Sequence[int], count: int) -> Tensor:
        """Return new pages, ``[count]`` int64 on the device, none of which is in use."""
        device, blocks = self.table.device, self.sizes[0]
        whole = isinstance(given, Sequence) and all(isinstance(n, int) for n in given)
        new = given if isinstance(given, Tensor) else torch.tensor(list(given)) if whole else None
        if new is None or new.dim() != 1 or len(new) != count or new.is_floating_point() or new.dtype == torch.bool:
            raise UsageError(
                f"allocate({count}) returned {_named(given)}; it returns {count} page numbers; nothing was modified"
            )
        new = sent(new.to(torch.int64), device) if new.device.type == "cpu" else new.to(torch.int64)
        error = UsageError(
            f"allocate({count}) returned pages that do not exist, twice, or in use; nothing was modified"
        )
        ascending = new.sort().values
        used = on_device([self._pages(length) for length in self.lengths], device)[:, None]
        taken = torch.where(torch.arange(self.table.shape[1], device=device) < used, self.table.to(torch.int64), -1)
        right = (ascending[0] >= 0) & (ascending[-1] < blocks) & (ascending[1:] > ascending[:-1]).all()
        insist(right & ~(taken[..., None] == new).any(), error)
        return new


def _named(x: object) -> str:
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x)
