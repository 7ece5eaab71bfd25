"""What a step's kernels are told, in memory that keeps its address: :class:`Buffers`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpolicy.host import sent

__all__ = ["Buffers"]

Integers = npt.NDArray[np.int64]


class Buffers:
    """Hold the lengths of a step's rows, and where the query of each of its tokens goes.

    Graphs that were captured read the same addresses when they are replayed.

    Args:
        rows: of a step, at most.
        tokens: of a step, at most.
        places: requests that can be remembered at once.
        window: queries that are remembered of each; 0 for none.
        device: of the caches.
    """

    def __init__(self, rows: int, tokens: int, places: int, window: int, device: torch.device) -> None:
        self._lengths = torch.zeros(max(rows, tokens), dtype=torch.int32, device=device)
        self._nobody, self._window, self._device = places * window, window, device
        self._lines = torch.full((tokens + rows,), self._nobody, dtype=torch.int64, device=device)
        self._written = 0  #: lines that may be for a query that somebody asks
        self.lines: Tensor | None = None  #: of this step, ``[tokens]``; None where no query is remembered

    def take_lengths(self, lengths: Tensor, known: Tensor | None = None) -> Tensor:
        """Return the lengths of a step's rows, as kernels read them.

        Args:
            lengths: ``[rows]``, vLLM's, on the device.
            known: ``[n]`` of the first rows, on the host, in their place.
        """
        held = self._lengths[: len(lengths)]
        held.copy_(lengths)
        if known is not None:
            held[: len(known)].copy_(sent(known, self._device))
        return held

    def map_slots(self, cm: Any, counts: Integers, starts: Integers, block_size: int) -> None:
        """Write into ``cm.slot_mapping`` where the keys and values of a step's tokens go.

        Args:
            cm: vLLM's ``CommonAttentionMetadata``.
            counts: tokens of each row.
            starts: slots in use of each row.
            block_size: slots of a block.
        """
        row, nth = _tokens(counts)
        # The host divides: what is left for the device is a look-up and a sum.
        nth_block, offset = np.divmod(starts[row] + nth, block_size)
        rows, blocks, offsets = sent(torch.from_numpy(np.stack([row, nth_block, offset])), self._device)
        held = cm.block_table_tensor[rows, blocks]
        torch.add(offsets, held, alpha=block_size, out=cm.slot_mapping[: len(row)])

    def direct(self, tokens: int, counts: Integers, seen: Integers, places: Integers) -> None:
        """Write where queries go; those of padding go where nobody asks.

        Args:
            tokens: of the step, padding among them.
            counts: tokens of each row.
            seen: tokens of each row before them.
            places: of the rows' requests, -1 where nothing is remembered.
        """
        if not self._window:
            return
        row, nth = _tokens(counts)
        asked = (places[row] >= 0) & (nth >= counts[row] - self._window)
        lines = np.where(asked, places[row] * self._window + (seen[row] + nth) % self._window, self._nobody)
        size = max(tokens, len(lines))
        # A graph that was captured for more tokens reads on behind those of this step.
        whole = np.full(max(size, self._written), self._nobody, dtype=np.int64)
        whole[: len(lines)] = lines
        self._lines[: len(whole)].copy_(sent(torch.from_numpy(whole), self._device))
        self._written, self.lines = len(lines), self._lines[:size]


def _tokens(counts: Integers) -> tuple[Integers, Integers]:
    """Return the row of each token of a step, and which of the row's tokens it is."""
    if len(counts) and counts.max() == 1:  # all decode
        return np.arange(len(counts)), np.zeros(len(counts), dtype=np.int64)
    row = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    return row, np.arange(len(row)) - first[row]
