"""Requests that follow one policy: :class:`Band`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from kvpolicy.errors import UsageError
from kvpolicy.policy import EvictionPolicy, LayerPlan
from kvpolicy.view import LayerSpec, StageState, State

__all__ = ["Band", "Span", "bands_of"]


class Span(NamedTuple):
    """Name some rows, a row being one layer of one request.

    Attributes:
        store: where they are among all ``layers * requests`` rows of the store.
        band: where they are among those of their band.
    """

    store: slice
    band: slice


@dataclass(eq=False)
class Band:
    """Hold what one policy remembers of the adjacent requests that follow it.

    A batch under one policy is one band. Policies of a batch never see each other's rows.

    Attributes:
        policy: what they follow.
        plan: budget, capacity, interval, recent and window of each layer.
        first: the first request.
        stop: one behind the last.
        layers: layers of the store.
        requests: requests of the store.
        state: ``[layers * (stop - first), H, C, ...]``, and one entry a row.
    """

    policy: EvictionPolicy
    plan: LayerPlan
    first: int
    stop: int
    layers: int
    requests: int
    state: State = field(default=(), init=False)

    @property
    def count(self) -> int:
        """Return how many requests follow the policy."""
        return self.stop - self.first

    def begin(self, spec: LayerSpec) -> State:
        """Return the state of empty rows, contiguous.

        Raises:
            UsageError: it has tensors that cannot follow the slots.
        """
        rows = self.layers * self.count
        return tuple(
            None if held is None else self._checked(index, held, (rows, spec.num_heads, spec.capacity), spec)
            for index, held in enumerate(self.policy.init(spec, rows))
        )

    def _checked(self, index: int, held: StageState, lead: tuple[int, int, int], spec: LayerSpec) -> StageState:
        for tensor, sizes in [*((t, lead) for t in held.slots), *((t, lead[:1]) for t in held.rows)]:
            if tensor.shape[: len(sizes)] != sizes or tensor.device != spec.device:
                raise UsageError(
                    f"state {index} of {self.policy!r} has a tensor {tuple(tensor.shape)} on {tensor.device}; init"
                    f"(spec, rows) must give ({', '.join(map(str, sizes))}, ...) on {spec.device}"
                )
        return StageState(tuple(t.contiguous() for t in held.slots), tuple(t.contiguous() for t in held.rows))

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the state."""
        return [t for held in self.state if held is not None for t in (*held.slots, *held.rows)]

    def slots(self) -> list[Tensor]:
        """Return the tensors that have an entry a slot."""
        return [t for held in self.state if held is not None for t in held.slots]

    def state_of(self, span: Span) -> State:
        """Return the state of some rows, as views."""
        at = span.band
        return tuple(
            None if held is None else StageState(tuple(t[at] for t in held.slots), tuple(t[at] for t in held.rows))
            for held in self.state
        )

    def remember(self, span: Span, state: State) -> None:
        """Take over the state of some rows; modifies ``state``."""
        for mine, new in zip(self.state, state, strict=True):
            if mine is not None and new is not None:
                for held, given in zip((*mine.slots, *mine.rows), (*new.slots, *new.rows), strict=True):
                    held[span.band].copy_(given)

    def layer(self, index: int) -> Span:
        """Return this band's rows of one layer."""
        start = index * self.requests
        return Span(slice(start + self.first, start + self.stop), slice(index * self.count, (index + 1) * self.count))

    def spans(self, most: int, *, by_layer: bool = False) -> Iterator[Span]:
        """Yield all rows of this band, at most ``most`` at once: rows of several layers where they are adjacent.

        Args:
            most: rows.
            by_layer: rows of several layers are never yielded at once.
        """
        if self.count == self.requests and not by_layer:
            total = self.layers * self.requests
            for start in range(0, total, most):
                at = slice(start, min(start + most, total))
                yield Span(at, at)
            return
        for index in range(self.layers):
            store, band = self.layer(index)
            for start in range(0, self.count, most):
                size = min(most, self.count - start)
                yield Span(
                    slice(store.start + start, store.start + start + size),
                    slice(band.start + start, band.start + start + size),
                )


def bands_of(policies: Sequence[EvictionPolicy], plans: Sequence[LayerPlan], layers: int) -> tuple[Band, ...]:
    """Return the bands of a batch: its requests in order, cut where the policy changes.

    Args:
        policies: one a request.
        plans: one a request.
        layers: of the store.
    """
    cuts = [0]
    for r in range(1, len(policies)):
        if policies[r] is not policies[r - 1] or plans[r] != plans[r - 1]:
            cuts.append(r)
    ends = [*cuts[1:], len(policies)]
    return tuple(
        Band(policies[first], plans[first], first, stop, layers, len(policies))
        for first, stop in zip(cuts, ends, strict=True)
    )
