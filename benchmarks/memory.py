"""The memory that an eviction of all layers takes, against its limit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.report import Section, Target
from benchmarks.stores import Shape, filled, grow, logits_of
from kvpolicy.eviction import evict
from kvpolicy.policies import vase

__all__ = ["peak_bytes", "run"]


def peak_bytes(work: Callable[[], None]) -> int:
    """Return the most bytes that torch's CPU allocator held at once, beyond those held before.

    Every allocation counts, those inside of operators too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    assert found.profiler is not None
    results = found.profiler.kineto_results
    assert results is not None
    events: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def run(cases: list[tuple[Shape, int, int, list[int]]]) -> Section:
    """Evict all layers within each workspace.

    Args:
        cases: the shape of a layer, how many there are, the budget, and the workspaces in MiB. One
            row's slots, at 96 bytes each, and one head's keys in float32 are the least that an
            eviction takes. A budget that the window does not divide leaves the ring of queries
            where it must be turned.
    """
    section = Section(
        "memory",
        "peak of the CPU allocator during one vase eviction of all layers",
        ["layers", "budget", "slots MiB", "workspace MiB", "peak MiB", "peak / workspace"],
    )
    for shape, layers, budget, workspaces in cases:
        store = filled(vase(budget), shape, range(layers))
        name = f"{layers} × {shape.heads} × {shape.dim} {str(shape.dtype).removeprefix('torch.')}"
        for workspace in workspaces:
            grow(store)
            peak = peak_bytes(partial(evict, store, [True], logits_of(store, workspace * 2**20)))
            peak_mib, held = peak / 2**20, store.nbytes() / 2**20
            share = peak_mib / workspace
            section.rows.append([name, budget, held, workspace, peak_mib, share])
            what = f"{name}, budget {budget}, peak / workspace of {workspace} MiB"
            section.targets.append(Target(what, share, 1.0))
    return section
