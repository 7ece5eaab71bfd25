"""A policy that shows a test every view that it is given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from kvpolicy import Attention, Policy, Scores, TopK, View


@dataclass(eq=False)
class Probe:
    """Hold copies of views, one for each layer of each eviction."""

    views: list[View] = field(default_factory=list)

    def of_layer(self, layer: int) -> list[View]:
        """Return the views of one layer."""
        return [_rows(view, view.layer == layer) for view in self.views if bool((view.layer == layer).any())]


@dataclass(frozen=True, repr=False)
class Seen(Attention):
    """Score by attention, and let a probe see the view."""

    probe: Any = None

    def score(self, view: View, state: Any) -> Scores:
        self.probe.views.append(dataclasses.replace(view, **{name: x.clone() for name, x in _tensors(view).items()}))
        return super().score(view, state)


def probed(probe: Probe, *, window: int, budget: int, interval: int, recent: int = 8) -> Policy:
    """Return a policy whose views are copied into a probe."""
    return Policy(Seen(window, probe=probe) >> TopK(budget), interval=interval, recent=recent)


def asked(view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the queries of a view and their positions."""
    assert view.queries is not None
    assert view.query_positions is not None
    return view.queries, view.query_positions.long()


def _tensors(view: View) -> dict[str, torch.Tensor]:
    return {name: x for name, x in vars(view).items() if isinstance(x, torch.Tensor)}


def _rows(view: View, chosen: torch.Tensor) -> View:
    return dataclasses.replace(view, **{name: x[chosen] for name, x in _tensors(view).items()})
