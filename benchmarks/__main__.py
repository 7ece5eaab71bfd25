"""Run the benchmarks: ``python -m benchmarks [SECTION ...] [--quick]``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from benchmarks import compaction, decode, eviction, flat, gather, layers, lse, memory, models, roofline
from benchmarks.command import run_sections
from benchmarks.report import Section, environment, show, write_json
from benchmarks.stores import Shape

__all__ = ["SECTIONS", "main"]

SMALL = Shape(heads=3, group=3, dim=64)  # SmolLM2-135M
LARGE = Shape(heads=8, group=4, dim=128)  # an 8B model
HALF = Shape(heads=8, group=4, dim=128, dtype=torch.bfloat16)


def _decode(options: argparse.Namespace) -> Section:
    if options.quick:
        return decode.run(models.tiny(), [128, 512], 2)
    return decode.run(models.load(options.model), [256, 4096], options.repeats or 5)


def _eviction(options: argparse.Namespace) -> Section:
    if options.quick:
        return eviction.run(LARGE, [1024, 4096], options.repeats or 3)
    return eviction.run(LARGE, [1024, 4096, 16384, 32768], options.repeats or 9)


def _compaction(options: argparse.Namespace) -> Section:
    if options.quick:
        return compaction.run(LARGE, [(1, 1024), (1, 4096), (2, 1024)], options.repeats or 5)
    return compaction.run(LARGE, [(1, 1024), (1, 4096), (1, 16384), (1, 32768), (16, 4160)], options.repeats or 15)


def _gather(options: argparse.Namespace) -> Section:
    if options.quick:
        return gather.run(LARGE, [1024], options.repeats or 3)
    return gather.run(LARGE, [1024, 4096, 16384], options.repeats or 9)


def _lse(options: argparse.Namespace) -> Section:
    if options.quick:
        return lse.run(LARGE, [1024], options.repeats or 3)
    return lse.run(LARGE, [4096, 8192, 16384, 32768], options.repeats or 7)


def _roofline(options: argparse.Namespace) -> Section:
    if options.quick:
        return roofline.run(LARGE, [1024], options.repeats or 3)
    return roofline.run(LARGE, [1024, 4096, 16384, 32768], options.repeats or 9)


def _layers(options: argparse.Namespace) -> Section:
    if options.quick:
        return layers.run({"4 × 3 × 64": (SMALL, 4)}, [256], options.repeats or 3)
    shapes = {"30 × 3 × 64": (SMALL, 30), "16 × 8 × 128": (LARGE, 16)}
    return layers.run(shapes, [256, 1024, 4096], options.repeats or 7)


def _memory(options: argparse.Namespace) -> Section:
    if options.quick:
        return memory.run([(SMALL, 8, 500, [256, 16])])
    cases = [(SMALL, 30, 4000, [256, 16]), (HALF, 32, 4000, [256, 16]), (HALF, 96, 300, [256, 16])]
    return memory.run([*cases, (HALF, 2, 32000, [256, 128])])


def _flat(options: argparse.Namespace) -> Section:
    if options.quick:
        return flat.run(models.tiny(), 128, 512, 256, 64)
    return flat.run(models.load(options.model), 256, 8192 - 64, 1024, 64)


SECTIONS: dict[str, Callable[[argparse.Namespace], Section]] = {
    "decode": _decode,
    "eviction": _eviction,
    "compaction": _compaction,
    "gather": _gather,
    "lse": _lse,
    "roofline": _roofline,
    "layers": _layers,
    "memory": _memory,
    "flat": _flat,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for, print it, and write it down."""
    run_sections("python -m benchmarks", __doc__, SECTIONS, _run, arguments)


def _run(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    console, found = Console(highlight=False), list[Section]()
    if not console.is_terminal:
        console.width = 130
    console.print("  ".join(f"{name} {value}" for name, value in environment().items()))
    for name in options.sections or SECTIONS:
        found.append(SECTIONS[name](options))
        show(found[-1], console)
    if options.json is not None:
        write_json(options.json, found, {"quick": options.quick, "repeats": options.repeats})


if __name__ == "__main__":
    main()
