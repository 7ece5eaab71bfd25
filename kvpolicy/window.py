"""The observation window: a ring of each layer's newest queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.errors import UsageError
from kvpolicy.host import on_device

__all__ = ["QueryWindow", "oldest_first", "unrolled"]


class QueryWindow:
    """Hold the newest ``W`` queries of every layer and request, each with its own rotation.

    Attributes:
        queries: ``[layers, requests, Hq, W, D]``, a ring.
        positions: ``[layers, requests, W]`` int32, the position of each query, -1 where absent.
        lse: ``[layers, requests, Hq, W]`` float32 (float64 beside float64 queries), a ring: the
            log-sum-exp of each query over all that it saw; None where the engine does not tell.
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
        lse: bool = False,
    ) -> None:
        self.size = size
        self.queries = torch.zeros(layers, requests, heads, size, dim, dtype=dtype, device=device)
        self.positions = torch.full((layers, requests, size), -1, dtype=torch.int32, device=device)
        self.lse: Tensor | None = None
        if lse:
            kept = torch.float64 if dtype == torch.float64 else torch.float32
            self.lse = torch.zeros(layers, requests, heads, size, dtype=kept, device=device)
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

    def write(self, index: int, queries: Tensor, counts: Sequence[int], lse: Tensor | None = None) -> None:
        """Write the newest queries of one layer; :meth:`advance` makes them count.

        Args:
            index: the layer, counted within the store.
            queries: ``[requests, Hq, T, D]``, left-padded.
            counts: new queries of each request, the last columns.
            lse: ``[requests, Hq, T]``, of these queries; None where the window holds none.

        Raises:
            UsageError: the window holds log-sum-exps and none are given, or the reverse; nothing
                was written.
        """
        if not self.size:
            return
        if (lse is None) != (self.lse is None):
            raise UsageError(
                "queries came without their log-sum-exp, which the window holds: pass observe(..., lse=lse) at every "
                "step, or make Store(..., lse=False)"
                if lse is None
                else "queries came with a log-sum-exp, for which the window has no place: make Store(..., lse=True)"
            )
        self._write(self.queries[index], queries, counts)
        if lse is not None and self.lse is not None:
            self._write(self.lse[index], lse, counts)

    def _write(self, ring: Tensor, given: Tensor, counts: Sequence[int]) -> None:
        """Write ``[requests, Hq, T, ...]`` into a ring ``[requests, Hq, W, ...]``."""
        width = given.shape[2]
        if width == 1 and self.uniform and all(counts):
            ring[:, :, self.at[0] : self.at[0] + 1].copy_(given)
            return
        if width == 1 and all(counts):
            requests, at = torch.arange(len(self.at), device=ring.device), on_device(self.at, ring.device)
            ring[requests, :, at] = given[:, :, 0].to(ring.dtype)
            return
        for r, count in enumerate(counts):
            kept = min(count, self.size)
            places = self._places(r, count, kept)
            ring[r].index_copy_(1, places, given[r, :, width - kept :].to(ring.dtype))

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
        at, first = [source.at[r] for r in requests.tolist()], source.size - self.size
        pairs = [(self.queries, source.queries, -4, -2), (self.positions, source.positions, -2, -1)]
        if self.lse is not None and source.lse is not None:
            pairs.append((self.lse, source.lse, -3, -1))
        for mine, theirs, request_axis, axis in pairs:
            named = theirs.index_select(1, requests)
            if first > 0:
                named = unrolled(named, at, request_axis, axis).narrow(axis, first, self.size)
            mine.copy_(named)
        self.at = [0] * len(at) if first > 0 else at

    def tensors(self) -> list[Tensor]:
        """Return queries and positions, and log-sum-exps where there are any."""
        return [self.queries, self.positions, *([] if self.lse is None else [self.lse])]

    def nbytes(self) -> int:
        """Return the bytes of queries, positions and log-sum-exps."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

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
    return unrolled(queries, at, -4, -2), unrolled(positions, at, -2, -1)


def unrolled(ring: Tensor, at: Sequence[int], request_axis: int, axis: int) -> Tensor:
    """Return a ring, oldest first.

    Args:
        ring: any tensor of the window.
        at: where the next query of each request goes.
        request_axis: the axis of requests, counted from the end.
        axis: the axis of the window's places, counted from the end.
    """
    if not any(at):
        return ring
    if len(set(at)) == 1:
        return ring.roll(-at[0], axis)
    size, shape = ring.shape[axis], [1] * ring.dim()
    shape[request_axis], shape[axis] = len(at), size
    start = on_device(at, ring.device)
    places = (start[:, None] + torch.arange(size, device=ring.device)) % size
    return ring.gather(axis, places.view(shape).expand(ring.shape))
