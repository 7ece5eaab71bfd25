"""The memory that an eviction of all layers takes, against its limit."""

from __future__ import annotations

from collections.abc import Callable

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
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def run(cases: list[tuple[Shape, int, int]], workspaces: list[int]) -> Section:
    """Evict all layers within each workspace.

    Args:
        cases: the shape of a layer, how many there are, and the budget.
        workspaces: limits, in MiB.
    """
    section = Section(
        "memory",
        "peak of the CPU allocator during one vase eviction of all layers",
        ["layers", "budget", "slots MiB", "workspace MiB", "peak MiB", "peak / workspace"],
    )
    for shape, layers, budget in cases:
        store = filled(vase(budget), shape, range(layers))
        name = f"{layers} × {shape.heads} × {shape.dim} {str(shape.dtype).removeprefix('torch.')}"
        for workspace in workspaces:
            grow(store)
            limit = logits_of(store, workspace * 2**20)
            peak = peak_bytes(lambda limit=limit: evict(store, [True], limit)) / 2**20
            share = peak / workspace
            held = store.nbytes() / 2**20
            section.rows.append([name, budget, held, workspace, peak, share])
            what = f"{name}, budget {budget}, peak / workspace of {workspace} MiB"
            section.targets.append(Target(what, share, 1.0))
    return section
