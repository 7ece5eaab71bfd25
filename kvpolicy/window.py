"""The observation window: a ring of each layer's newest queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.host import on_device

__all__ = ["QueryWindow", "oldest_first"]


class QueryWindow:
    """Hold the newest ``W`` queries of every layer and request, each with its own rotation.

    Attributes:
        queries: ``[layers, requests, Hq, W, D]``, a ring.
        positions: ``[layers, requests, W]`` int32, the position of each query, -1 where absent.
        at: where the next query of each request goes.
    """

    def __init__(
        self,
        layers: int,
        requests: int,
        heads: int,
        size: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.size = size
        self.queries = torch.zeros(layers, requests, heads, size, dim, dtype=dtype, device=device)
        self.positions = torch.full((layers, requests, size), -1, dtype=torch.int32, device=device)
        self.at = [0] * requests

    @property
    def uniform(self) -> bool:
        """Return whether the next query goes to the same place in every request."""
        return all(at == self.at[0] for at in self.at)

    def align(self, counts: Sequence[int]) -> None:
        """Let the last of the first queries of each request come to the same place.

        Requests whose next query goes to the same place are written together. Only while the
        window is empty.

        Args:
            counts: first queries of each request.
        """
        if self.size:
            self.at = [(max(counts) - count) % self.size for count in counts]

    def write(self, index: int, queries: Tensor, counts: Sequence[int]) -> None:
        """Write the newest queries of one layer; :meth:`advance` makes them count.

        Args:
            index: the layer, counted within the store.
            queries: ``[requests, Hq, T, D]``, left-padded.
            counts: new queries of each request, the last columns.
        """
        if not self.size:
            return
        width, ring = queries.shape[2], self.queries[index]
        if width == 1 and self.uniform and all(counts):
            ring[:, :, self.at[0] : self.at[0] + 1].copy_(queries)
            return
        if width == 1 and all(counts):
            requests, at = torch.arange(len(self.at), device=ring.device), on_device(self.at, ring.device)
            ring[requests, :, at] = queries[:, :, 0]
            return
        for r, count in enumerate(counts):
            kept = min(count, self.size)
            places = self._places(r, count, kept)
            ring[r].index_copy_(1, places, queries[r, :, width - kept :])

    def after(self, counts: Sequence[int], seen: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Return positions ``[requests, W]`` and ``at`` as they are once new queries count.

        Args:
            counts: new queries of each request.
            seen: tokens of each request before them, which is the position of the first.
        """
        positions = self.positions[0].clone()
        if not self.size:
            return positions, self.at
        for r, count in enumerate(counts):
            kept = min(count, self.size)
            first = seen[r] + count - kept
            new = torch.arange(first, first + kept, dtype=torch.int32, device=positions.device)
            positions[r, self._places(r, count, kept)] = new
        return positions, [(at + count) % self.size for at, count in zip(self.at, counts, strict=True)]

    def advance(self, counts: Sequence[int], seen: Sequence[int]) -> None:
        """Make what was written count; the arguments are those of :meth:`after`."""
        if self.size and self.uniform and set(counts) == {1}:  # the hot path
            new = seen[0] if len(set(seen)) == 1 else on_device(seen, self.positions.device)
            self.positions[:, :, self.at[0]] = new
            self.at = [(self.at[0] + 1) % self.size] * len(self.at)
            return
        positions, self.at = self.after(counts, seen)
        self.positions.copy_(positions.expand_as(self.positions))

    def _places(self, request: int, count: int, kept: int) -> Tensor:
        """Return where the newest ``kept`` of ``count`` queries go."""
        first = self.at[request] + count - kept
        return torch.arange(first, first + kept, device=self.queries.device) % self.size

    def crop(self, counts: Sequence[int], seen: Sequence[int]) -> None:
        """Forget the newest queries of each request; those that they had overwritten stay lost.

        Args:
            counts: queries to forget.
            seen: tokens of each request that remain.
        """
        if not self.size:
            return
        left = torch.tensor(list(seen), device=self.positions.device)[None, :, None]
        self.positions.masked_fill_(self.positions >= left, -1)
        self.at = [(at - count) % self.size for at, count in zip(self.at, counts, strict=True)]

    def copy_rows(self, source: QueryWindow, requests: Tensor) -> None:
        """Replace every request by the one that ``requests`` names of a window, which may be this one.

        Of a larger window, the newest queries are taken.
        """
        queries, positions = source.queries.index_select(1, requests), source.positions.index_select(1, requests)
        at = [source.at[r] for r in requests.tolist()]
        if self.size < source.size:
            queries, positions = oldest_first(queries, positions, at)
            first = source.size - self.size
            queries, positions, at = queries[:, :, :, first:], positions[:, :, first:], [0] * len(at)
        self.queries.copy_(queries)
        self.positions.copy_(positions)
        self.at = at

    def nbytes(self) -> int:
        """Return the bytes of queries and positions."""
        return sum(t.numel() * t.element_size() for t in (self.queries, self.positions))

    def reset(self) -> None:
        """Forget every query."""
        self.positions.fill_(-1)
        self.at = [0] * len(self.at)


def oldest_first(queries: Tensor, positions: Tensor, at: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the queries and positions of a ring, oldest first.

    Args:
        queries: ``[..., requests, Hq, W, D]``.
        positions: ``[..., requests, W]``.
        at: where the next query of each request goes, which is where its oldest is.
    """
    if not any(at):
        return queries, positions
    if len(set(at)) == 1:
        return queries.roll(-at[0], -2), positions.roll(-at[0], -1)
    size = queries.shape[-2]
    start = on_device(at, queries.device)
    places = (start[:, None] + torch.arange(size, device=start.device)) % size
    return (
        queries.gather(-2, places[:, None, :, None].expand(queries.shape)),
        positions.gather(-1, places.expand(positions.shape)),
    )
