"""Attention received by every slot: from the kernel's log-sum-exp, and by softmax."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from benchmarks.report import Section, Target
from benchmarks.stores import Shape
from benchmarks.timing import clock, median_ms, ratio, take_turns
from kvpolicy import View
from kvpolicy.probabilities import received
from kvpolicy.testing import RowSpec, make_view

__all__ = ["Asked", "run"]

LIMIT, WINDOW = 1 / 2, 64
LSE, SOFTMAX = "log-sum-exp", "softmax"


def run(shape: Shape, sizes: list[int], repeats: int) -> Section:
    """Ask 64 queries about all slots of a layer, in float32 and bfloat16.

    Args:
        shape: of the layer.
        sizes: slots in use.
        repeats: of each.
    """
    section = Section(
        "lse",
        f"CPU ms of the attention that all slots receive from {WINDOW} queries, {shape.heads} KV heads, "
        f"{shape.heads * shape.group} query heads of {shape.dim}, {repeats} repeats",
        ["slots", "dtype", LSE, SOFTMAX, f"{LSE} / {SOFTMAX}"],
    )
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for size in sizes:
            asked = Asked(size, dataclasses.replace(shape, dtype=dtype))
            contestants = {LSE: partial(asked.seconds, asked.lse), SOFTMAX: partial(asked.seconds, None)}
            take_turns(contestants, 1)
            seconds = take_turns(contestants, repeats)
            found = ratio(seconds[LSE], seconds[SOFTMAX])
            section.rows.append([size, name, *(median_ms(seconds[one]) for one in (LSE, SOFTMAX)), found])
            if size == 32768:
                section.targets.append(Target(f"{name}, {size} slots, {LSE} / {SOFTMAX}", found.median, LIMIT))
    return section


class Asked:
    """Hold a layer, a window of queries, and their log-sum-exps as a kernel returns them."""

    def __init__(self, size: int, shape: Shape) -> None:
        self.view = make_view(
            rows=(RowSpec(length=size, fresh=WINDOW, budget=size - WINDOW),),
            heads=shape.heads,
            group=shape.group,
            head_dim=shape.dim,
            value_dim=2,
            window=WINDOW,
            recent=WINDOW,
            spare=0,
            dtype=shape.dtype,
        )
        self.lse = _log_sum_exp(self.view, shape.group)

    def received(self, lse: Tensor | None) -> Tensor:
        """Return what each slot receives."""
        view = self.view
        assert view.queries is not None
        assert view.query_positions is not None
        weight = torch.full_like(view.query_positions, 1 / WINDOW, dtype=torch.float32)
        ask = partial(received, view, view.queries, view.query_positions, view.valid, weight)
        return ask(causal=True, temperature=1.0, reduce="mean", lse=lse)

    def seconds(self, lse: Tensor | None) -> float:
        """Return how long it took."""
        start = clock()
        self.received(lse)
        return clock() - start


def _log_sum_exp(view: View, group: int) -> Tensor:
    """Return ``[1, Hq, W]``, one query head at a time."""
    assert view.queries is not None
    assert view.query_positions is not None
    found = []
    for head, asked in enumerate(view.queries[0].float()):
        future = view.positions[0, head // group] > view.query_positions[0, :, None]
        logits = asked @ view.keys[0, head // group].float().mT * view.scaling
        found.append(logits.masked_fill(future, -torch.inf).logsumexp(-1))
    return torch.stack(found)[None]
