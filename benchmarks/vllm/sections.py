"""The tables: memory that binds, memory that does not, and the time of one eviction."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.report import Cell, Section, Target
from benchmarks.timing import median_ms, ratio
from benchmarks.vllm.engine import FULL, Engine, Run
from benchmarks.vllm.sizes import Sizes

__all__ = ["ample", "bound", "eviction", "serve_in_turns"]

Runs = dict[str, list[Run]]

CLOCK = "CPU time, engines taking turns at every step; on a GPU time of the wall, taking turns at every load"


def serve_in_turns(engines: Sequence[Engine], sizes: Sizes, repeats: int, *, by_step: bool) -> Runs:
    """Let every engine serve the same load, another one first each time.

    Args:
        engines: of one process.
        sizes: of the load.
        repeats: of it.
        by_step: engines take turns at every step, so that all of them meet the same noise; else at every load. On a
            GPU an engine may leave a step running, which another's would wait for.
    """
    runs: Runs = {engine.name: [] for engine in engines}
    order = list(engines)
    for turn in range(repeats):
        for engine in engines:
            runs[engine.name].append(engine.begin(sizes))
        while any(engine.busy for engine in engines):
            for engine in order:
                while engine.busy:
                    engine.step()
                    if by_step:
                        break
            order.append(order.pop(0))
        took = ", ".join(f"{name} {ones[-1].seconds:.1f} s" for name, ones in runs.items())
        print(f"  round {turn + 1}: {took}", flush=True)
    for ones in runs.values():
        assert all(run.tokens == sizes.requests * sizes.output for run in ones)
    return runs


def bound(runs: Runs, sizes: Sizes, blocks: int) -> Section:
    """Return what a load took where memory is short."""
    section = _section("bound", "memory binds", runs, sizes, blocks)
    for name in _policies(runs):
        section.targets += [
            Target(
                f"requests in flight with the full cache, to {name}",
                _of(runs[FULL], "running") / _of(runs[name], "running"),
                0.5,
            ),
            Target(f"tokens per second with the full cache, to {name}", 1 / _speedup(runs, name), 0.5),
        ]
    return section


def ample(runs: Runs, sizes: Sizes, blocks: int) -> Section:
    """Return what a load took where memory is ample."""
    section = _section("ample", "memory does not bind", runs, sizes, blocks)
    section.targets = [
        Target(f"time under {name}, to that with the full cache", 1 / _speedup(runs, name), 1 / 0.97)
        for name in _policies(runs)
    ]
    return section


def _section(name: str, title: str, runs: Runs, sizes: Sizes, blocks: int) -> Section:
    section = Section(
        name,
        f"{title}: {sizes.described()}, {blocks} blocks for each cache; medians of {len(runs[FULL])} runs, "
        f"{CLOCK}; ratios to the full cache (quartiles)",
        _COLUMNS,
    )
    section.rows = _rows(runs)
    return section


def _policies(runs: Runs) -> list[str]:
    return [name for name in runs if name != FULL]


def eviction(runs: Runs, sizes: Sizes) -> Section:
    """Return what one eviction takes, beside a step that decodes."""
    section = Section(
        "eviction",
        f"one eviction beside one decoded token of {sizes.requests} requests, from the runs above; ms, medians over "
        "steps; what evictions add is the time of a step that evicts, less that of one that does not",
        ["cache", "a step that decodes", "evictions add", "each request", "share of the run", "by kvpolicy's counter"],
    )
    for name, ones in runs.items():
        plain = [seconds for run in ones for seconds in run.decoding]
        row: list[Cell] = [name, median_ms(plain)]
        steps = [step for run in ones for step in run.steps if step.evictions and not step.first]
        if steps:
            added = [step.seconds - statistics.median(plain) for step in steps]
            count = sum(step.evictions for step in steps)
            total = sum(step.evictions for run in ones for step in run.steps)
            row += [median_ms(added), 1e3 * sum(added) / count]
            row += [sum(added) / sum(run.seconds for run in ones), 1e3 * sum(run.compaction for run in ones) / total]
        section.rows.append(row if steps else [*row, *["–"] * 4])
    return section


_COLUMNS = [
    "cache", "in flight, mean", "most", "steps", "preemptions", "seconds", "tokens/s", "in flight, ratio",
    "tokens/s, ratio",
]  # fmt: skip


def _rows(runs: Runs) -> list[list[Cell]]:
    full = runs[FULL]
    return [
        [
            name,
            _of(ones, "running"),
            max(run.most for run in ones),
            round(statistics.median(len(run.steps) for run in ones)),
            round(statistics.median(run.preemptions for run in ones)),
            _of(ones, "seconds"),
            ones[0].tokens / _of(ones, "seconds"),
            _of(ones, "running") / _of(full, "running"),
            ratio([run.tokens / run.seconds for run in ones], [run.tokens / run.seconds for run in full]),
        ]
        for name, ones in runs.items()
    ]


def _of(runs: Sequence[Run], name: str) -> float:
    return float(statistics.median(getattr(run, name) for run in runs))


def _speedup(runs: Runs, name: str) -> float:
    return _of(runs[FULL], "seconds") / _of(runs[name], "seconds")
