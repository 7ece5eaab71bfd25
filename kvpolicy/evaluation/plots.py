"""Figures of results. They belong to no window and change no setting of matplotlib.

Needs matplotlib, of the extra ``kvpolicy[eval]``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

from kvpolicy.evaluation.measures import Row, TextRow
from kvpolicy.evaluation.record import short

__all__ = ["curves", "kl_against_budget", "score_against_budget"]

#: Okabe and Ito, Color Universal Design, 2008, without the yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # as many again before a pair of both repeats


def score_against_budget(rows: Sequence[Row], title: str = "") -> Figure:
    """Return the score of each policy against its budget, with 95 % intervals; the full cache is a band.

    Args:
        rows: of one model and task.
        title: above the axes.
    """
    figure, axes = _axes(title, "budget, slots per KV head", "score, %")
    _against_budget(axes, [(short(row.cell.label), row.cell.budget, row.score) for row in rows], 100)
    return figure


def kl_against_budget(rows: Sequence[TextRow], title: str = "") -> Figure:
    """Return the divergence of each policy against its budget, with 95 % intervals.

    Args:
        rows: of one model and task.
        title: above the axes.
    """
    figure, axes = _axes(title, "budget, slots per KV head", "KL from the full cache, nats")
    _against_budget(axes, [(short(row.cell.label), row.cell.budget, row.kl) for row in rows], 1)
    return figure


def curves(lines: Mapping[str, Sequence[float]], across: str, up: str, title: str = "") -> Figure:
    """Return a line for each name: KL by position, or attention lost by layer.

    Args:
        lines: values at 0, 1, 2, ...
        across: what is counted there.
        up: what the values are, and their unit.
        title: above the axes.
    """
    figure, axes = _axes(title, across, up)
    for index, (name, values) in enumerate(lines.items()):
        axes.plot(range(len(values)), values, label=name, markersize=4, **_style(index))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes)
    return figure


def _against_budget(axes: Any, points: Sequence[tuple[str, int, Any]], scale: float) -> None:
    by_label: defaultdict[str, list[tuple[int, Any]]] = defaultdict(list)
    for label, budget, interval in sorted(points, key=lambda point: point[:2]):
        by_label[label].append((budget, interval))
    for label, found in by_label.items():
        if all(budget == 0 for budget, _ in found):  # the full cache has no budget
            interval = found[0][1]
            axes.axhline(scale * interval.estimate, color="#666666", linestyle="--", label=label)
            low, high = interval.estimate - interval.low, interval.high - interval.estimate
            band = (scale * (interval.estimate - _finite(low)), scale * (interval.estimate + _finite(high)))
            axes.axhspan(*band, color="#666666", alpha=0.15, linewidth=0)
    evicting = [label for label, found in by_label.items() if any(budget for budget, _ in found)]
    for index, label in enumerate(evicting):
        # policies at one budget stand side by side, or their intervals would hide each other
        aside = 1 + 0.02 * (index - (len(evicting) - 1) / 2)
        found = [(budget, one) for budget, one in by_label[label] if budget]
        budgets = [budget * aside for budget, _ in found]
        means = [scale * one.estimate for _, one in found]
        arms = [
            [_finite(scale * (one.estimate - one.low)) for _, one in found],
            [_finite(scale * (one.high - one.estimate)) for _, one in found],
        ]
        axes.errorbar(budgets, means, yerr=arms, label=label, capsize=3, markersize=5, **_style(index))
    if budgets := sorted({budget for _, budget, _ in points if budget}):
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
        axes.minorticks_off()
    _legend(axes)


def _finite(length: float) -> float:
    """Return the length of an arm; none is drawn where one problem tells nothing of the spread."""
    return length if math.isfinite(length) else 0.0


def _axes(title: str, across: str, up: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "linewidth": 1.5}


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize="small")
