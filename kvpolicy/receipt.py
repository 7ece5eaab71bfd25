"""What an adapter can prove after the fact: :class:`Receipt`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpolicy.errors import UsageError
from kvpolicy.store import Store

__all__ = ["Receipt", "receipt_of"]


@dataclass(frozen=True)
class Receipt:
    """Prove what a cache held, and what had happened to it, when it was asked.

    A copy: it neither changes with the cache nor keeps the cache's memory alive.

    Attributes:
        policy: the policy of each request, with every parameter written out.
        version: of kvpolicy.
        seen: tokens of each request.
        slots: slots in use, per KV head, of each request, in the layer with most of those that evict.
        capacity: slots allocated per KV head, in the layer with most of those that evict.
        evictions: of each request, in the layer with most: a layer with a smaller budget may be due earlier.
        guards_broken: guarded tokens that had to go, of each request, over all layers and heads:
            guards protected more than the budget.
        nbytes: bytes allocated for keys, values, positions, window and policy state of the
            layers that evict.
        turn_nbytes: what the largest turn so far held besides, for one layer at a time: the keys and
            values of a prompt, or of a chunk of it joined with the slots.
        window_nbytes: those of nbytes that hold the newest queries.
        other_nbytes: bytes that layers left alone (sliding, linear, or left alone by the policy) hold now.
        layers: the layers that evict.
        skipped: the layers left alone, and why.
        kept: the kept positions of each layer that evicts, on the host; see :meth:`positions`.
        backend: what attends, with its version, where kvpolicy chooses it; None where the engine does.
    """

    policy: tuple[str, ...]
    version: str
    seen: tuple[int, ...]
    slots: tuple[int, ...]
    capacity: int
    evictions: tuple[int, ...]
    guards_broken: tuple[int, ...]
    nbytes: int
    turn_nbytes: int
    window_nbytes: int
    other_nbytes: int
    layers: tuple[int, ...]
    skipped: dict[int, str]
    kept: dict[int, Tensor] = field(repr=False, compare=False)
    backend: str | None = None
    ragged: bool = False

    @property
    def peak_nbytes(self) -> int:
        """Return the most that the evicting layers have held at once, an eviction's workspace apart."""
        return self.nbytes + self.turn_nbytes

    def positions(self, layer: int) -> Tensor:
        """Return the kept positions of one layer, ascending.

        Args:
            layer: index of a layer that evicts.

        Returns:
            ``[requests, KV heads, slots]`` int32 on the host, -1 behind the last one of a shorter row.

        Raises:
            UsageError: this layer does not evict.
        """
        if layer not in self.kept:
            known = ", ".join(map(str, self.layers))
            raise UsageError(f"layer {layer} does not evict; those that do are {known}")
        return self.kept[layer]

    def __str__(self) -> str:
        """Return a table."""
        lines = [f"kvpolicy {self.version}"]
        lines += [f"policy      {text}" for text in dict.fromkeys(self.policy)]
        lines += [] if self.backend is None else [f"attention   {self.backend}"]
        lines.append(
            f"layers      {len(self.layers)} evict" + (f", {len(self.skipped)} left alone" if self.skipped else "")
        )
        each = f"{self.capacity} slots in the largest KV head" if self.ragged else f"{self.capacity} slots per KV head"
        lines.append(f"memory      {size(self.nbytes)} allocated, {each}, never grown")
        if self.window_nbytes:
            lines.append(f"            {size(self.window_nbytes)} of it for the newest queries, which the policy asks")
        lines.append(f"            {size(self.turn_nbytes)} besides during the largest turn, for one layer at a time")
        if self.other_nbytes:
            lines.append(f"            {size(self.other_nbytes)} in the layers left alone")
        lines.append(f"{'request':>7}  {'tokens seen':>11}  {'slots in use':>12}  {'evictions':>9}")
        for r, row in enumerate(zip(self.seen, self.slots, self.evictions, strict=True)):
            lines.append(f"{r:>7}  {row[0]:>11,}  {row[1]:>12,}  {row[2]:>9,}")
        for r, broken in enumerate(self.guards_broken):
            if broken:
                lines.append(
                    f"request {r}: {broken:,} guarded tokens had to go, since guards protected more than the budget"
                )
        return "\n".join(lines)


def receipt_of(
    policies: Sequence[str],
    stores: Sequence[Store],
    alone: Sequence[Store],
    *,
    turn_nbytes: int,
    other_nbytes: int,
    skipped: dict[int, str],
    backend: str | None = None,
) -> Receipt:
    """Return the receipt of layers that lie in some stores.

    Args:
        policies: the text of each request's policy.
        stores: those that evict, at least one.
        alone: those of layers that the policy leaves alone.
        turn_nbytes: what the largest turn so far held besides.
        other_nbytes: what other layers hold.
        skipped: the layers left alone, and why.
        backend: what attends.
    """
    from kvpolicy import __version__

    requests = range(len(policies))
    broken = torch.stack([store.broken.view(-1, len(policies)).sum(0).cpu() for store in stores]).sum(0)
    return Receipt(
        policy=tuple(policies),
        version=__version__,
        seen=tuple(row.seen for row in stores[0].rows),
        slots=tuple(max(store.rows[r].length for store in stores) for r in requests),
        capacity=max(store.widest for store in stores),
        ragged=any(store.ragged for store in stores),
        evictions=tuple(max(store.rows[r].evictions for store in stores) for r in requests),
        guards_broken=tuple(broken.tolist()),
        nbytes=sum(store.nbytes() for store in stores),
        turn_nbytes=turn_nbytes,
        window_nbytes=sum(store.window.nbytes() for store in stores),
        other_nbytes=other_nbytes + sum(store.nbytes() for store in alone),
        layers=tuple(sorted(layer for store in stores for layer in store.layers)),
        skipped=skipped,
        kept={layer: positions for store in stores for layer, positions in store.kept().items()},
        backend=backend,
    )


def size(nbytes: int) -> str:
    """Return bytes as a person reads them.

    >>> size(8_536_560)
    '8.54 MB'
    """
    power = min(4, (len(str(nbytes)) - 1) // 3)
    return f"{nbytes} B" if not power else f"{nbytes / 1000**power:.2f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
