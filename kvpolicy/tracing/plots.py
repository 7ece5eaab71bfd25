"""Figures of a trace, for notebooks and files. They change no setting of matplotlib.

Each takes axes to draw into, or makes a figure of its own, and returns the axes. Needs matplotlib, of the
extra ``kvpolicy[eval]``; it is imported when something is drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from kvpolicy.errors import UsageError
from kvpolicy.tracing.traces import Trace, ranges

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]

__all__ = ["KINDS", "lifetimes", "map_of_heads", "memory", "survival", "values"]

#: Of Okabe and Ito, Color Universal Design, 2008; grey for what is gone.
HELD, PROTECTED, IN_USE, GONE = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"


def survival(trace: Trace, ax: Axes | None = None) -> Axes:
    """Draw which share of the tokens a head still holds so many tokens later.

    The Kaplan-Meier estimate over all tokens and heads: those that are held at the end count for as long
    as they were watched.

    Args:
        trace: of a generation.
        ax: where to draw; a new figure by default.

    Returns:
        The axes.
    """
    axes = _axes(ax, "tokens later", "share still held", "How long tokens stay")
    ages = trace.lifetimes().flatten()
    size = int(ages.max()) + 1
    gone = torch.bincount(ages[trace.dropped.flatten() > 0], minlength=size)
    watched = torch.bincount(ages, minlength=size).flip(0).cumsum(0).flip(0)  # held for at least so long
    alive = torch.cumprod(1 - gone.double() / watched.clamp(min=1), 0)
    axes.step(range(size), alive.tolist(), where="post", color=HELD, linewidth=1.5)
    axes.set_ylim(0, 1.02)
    return axes


def lifetimes(trace: Trace, ax: Axes | None = None) -> Axes:
    """Draw a histogram of how many tokens each token was held for, in each head.

    Args:
        trace: of a generation.
        ax: where to draw; a new figure by default.

    Returns:
        The axes.
    """
    axes = _axes(ax, "lifetime, tokens", "tokens × heads", "Lifetimes")
    ages, gone = trace.lifetimes().flatten(), trace.dropped.flatten() > 0
    edges = [2**power for power in range(math.ceil(math.log2(trace.seen + 1)) + 1)]
    axes.hist(
        [ages[gone].tolist(), ages[~gone].tolist()],
        bins=edges,
        stacked=True,
        color=[GONE, HELD],
        label=["dropped", "held at the end"],
        edgecolor="white",
        linewidth=0.5,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(edges, [f"{edge:,}" for edge in edges])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize="small")
    return axes


def memory(trace: Trace, ax: Axes | None = None) -> Axes:
    """Draw the bytes that are allocated and in use after each forward pass, beside the full cache.

    Args:
        trace: of a generation.
        ax: where to draw; a new figure by default.

    Returns:
        The axes.
    """
    most = max(*trace.full_nbytes, *trace.nbytes)
    power = min(3, int(math.log10(most)) // 3)
    axes = _axes(ax, "tokens seen", ("bytes", "kB", "MB", "GB")[power], "Memory")
    lines = (
        ("full cache", trace.full_nbytes, GONE),
        ("allocated", trace.nbytes, HELD),
        ("in use", trace.used_nbytes, IN_USE),
    )
    for name, found, colour in lines:
        axes.plot(trace.steps, [one / 1000**power for one in found], label=name, color=colour, linewidth=1.5)
    axes.set_ylim(0)
    axes.legend(frameon=False, fontsize="small")
    return axes


def values(trace: Trace, ax: Axes | None = None, *, layer: int | None = None, head: int = 0) -> Axes:
    """Draw how large the value of each token is in one head, and which of them a guard protected at some eviction.

    Args:
        trace: of a generation.
        ax: where to draw; a new figure by default.
        layer: one that evicts; by default the layer and head whose largest value is furthest above its median.
        head: a KV head of that layer.

    Returns:
        The axes.

    Raises:
        UsageError: there is no such layer or head.
    """
    line = _furthest(trace) if layer is None else _line(trace, layer, head)
    where = "layer {}, head {}".format(*trace.heads[line])
    axes = _axes(ax, "position", f"{trace.norm} of the value", f"Values of {where}")
    found, held = trace.values[line], trace.held()[line]
    guarded = trace.tier[line] > 0
    kinds = (
        ("dropped", ~held & ~guarded, {"color": "none", "edgecolors": GONE, "s": 12}),
        ("held at the end", held & ~guarded, {"color": HELD, "s": 12}),
        ("protected by a guard", guarded, {"color": PROTECTED, "s": 28, "marker": "D"}),
    )
    for name, which, style in kinds:
        at = which.nonzero().flatten()
        axes.scatter(at.tolist(), found[at].tolist(), label=name, linewidths=0.7, **style)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize="small")
    return axes


def map_of_heads(trace: Trace, ax: Axes | None = None, *, seen: int | None = None) -> Axes:
    """Draw which tokens every layer and head holds: a line a head, a column a token.

    Args:
        trace: of a generation.
        ax: where to draw; a new figure by default.
        seen: once so many tokens were seen; all by default.

    Returns:
        The axes.
    """
    now = trace.seen if seen is None else seen
    axes = _axes(ax, "position", "layer", f"What each head holds after {now:,} tokens")
    held = trace.held(now)
    number = sum(at <= now for at in trace.evictions)
    safe = held & (trace.protected_first > 0) & (trace.protected_first <= number) & (trace.protected_last >= number)
    picture = held.to(torch.uint8) + safe.to(torch.uint8)
    from matplotlib.colors import ListedColormap  # pyright: ignore[reportMissingImports]

    colours = ListedColormap(["#ecebe6", HELD, PROTECTED])
    axes.imshow(picture.tolist(), aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=2)
    first = {layer: line for line, (layer, head) in enumerate(trace.heads) if head == 0}
    shown = list(first)[:: max(1, math.ceil(len(first) / 10))]
    axes.set_yticks([first[layer] for layer in shown], [str(layer) for layer in shown])
    axes.grid(visible=False)
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports]

    key = [Patch(color=HELD, label="held"), Patch(color=PROTECTED, label="protected by a guard")]
    axes.legend(handles=key, frameon=False, fontsize="small", ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return axes


#: What ``kvpolicy plot --kind`` can draw.
KINDS = {"survival": survival, "lifetimes": lifetimes, "memory": memory, "values": values, "map": map_of_heads}


def _axes(ax: Axes | None, across: str, up: str, title: str) -> Any:
    """Return axes with names, of a new figure where none are given."""
    if ax is None:
        try:
            from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise UsageError("figures need matplotlib, which is not installed: pip install 'kvpolicy[eval]'") from error
        ax = Figure(figsize=(7, 4), layout="constrained").subplots()
    axes: Any = ax
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _furthest(trace: Trace) -> int:
    """Return the line of the head whose largest value is furthest above its median."""
    return int((trace.values.max(1).values / trace.values.median(1).values.clamp(min=1e-30)).argmax())


def _line(trace: Trace, layer: int, head: int) -> int:
    if (layer, head) not in trace.heads:
        heads = {found for at, found in trace.heads if at == layer or layer not in trace.layers}
        known = f"layers {ranges(trace.layers)}, heads {ranges(heads)}"
        raise UsageError(f"layer {layer}, head {head}: the trace has no such KV head; it has {known}")
    return trace.heads.index((layer, head))
