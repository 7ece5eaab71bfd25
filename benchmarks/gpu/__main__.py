"""Measure on a CUDA device: ``python -m benchmarks.gpu [SECTION ...] [--minutes N] [--json FILE] [--page FILE]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.command import run_sections
from benchmarks.gpu import adapter, decode, eviction, kernels, suite
from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.decoder import SHAPES
from benchmarks.gpu.device import described
from benchmarks.gpu.page import PAGE, environment_text, filled, section_text
from benchmarks.report import Section

__all__ = ["SECTIONS", "main"]

HALF = torch.bfloat16


def _kernels(options: argparse.Namespace, deadline: Deadline) -> Section:
    if options.quick:
        return kernels.run(2, 2, [16], 512, deadline)
    return kernels.run(8, 4, [64, 128], 4096, deadline)


def _decode(shape: str, options: argparse.Namespace, deadline: Deadline) -> Section:
    name = f"decode_{shape.lower()}"
    if options.quick:
        sizes = decode.Sizes([2], [48], [16], interval=8, steps=2, warm_up=1)
        return decode.run(name, "tiny", SHAPES["tiny"], sizes, torch.float32, deadline)
    sizes = decode.Sizes([16, 1], [decode.HALFWAY, 16384, 32768], [2048, 4096])
    return decode.run(name, shape, SHAPES[shape], sizes, HALF, deadline)


def _eviction(options: argparse.Namespace, deadline: Deadline) -> Section:
    if options.quick:
        return eviction.run(SHAPES["tiny"], [32], [2], 16, 2**20, torch.float32, deadline, repeats=2)
    return eviction.run(SHAPES["4B"], [2048, 4096], [16, 1], 128, 2**30, HALF, deadline)


def _suite(options: argparse.Namespace, deadline: Deadline) -> Section:
    return suite.run(deadline, ["tests/flash_attn/test_backends_gpu.py"] if options.quick else ["tests"])


def _transformers(options: argparse.Namespace, deadline: Deadline) -> Section:
    if options.quick:
        return adapter.run("tiny", SHAPES["tiny"], 48, [16], 8, torch.float32, deadline)
    return adapter.run("4B", SHAPES["4B"], 8192, [2048, 4096], 128, HALF, deadline)


Run = Callable[[argparse.Namespace, Deadline], Section]

#: In order of worth: what comes late is what is skipped when time is short. With each the seconds without which it
#: is not begun.
SECTIONS: dict[str, tuple[Run, float]] = {
    "kernels": (_kernels, 5),
    "decode_14b": (partial(_decode, "14B"), 60),
    "eviction": (_eviction, 15),
    "suite": (_suite, 20),
    "decode_4b": (partial(_decode, "4B"), 60),
    "transformers": (_transformers, 60),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for while there is time, print it, and write it down after each section."""
    run_sections("python -m benchmarks.gpu", __doc__, SECTIONS, _run, arguments, _options)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --quick")
    parser.add_argument("--minutes", type=float, default=9.0, help="within which it ends (9)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables here as Markdown, too")


def _run(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here: run it on a machine with one, or write --device cpu --quick")
    deadline = Deadline(options.minutes * 60, device)
    found = {
        "environment": described(device),
        "options": {"quick": options.quick, "minutes": options.minutes},
        "sections": dict[str, object](),
    }
    print(environment_text(found), flush=True)
    for name in options.sections or SECTIONS:
        section = _section(name, options, deadline).as_json()
        found["sections"][name] = section
        print(f"\n## {name}\n\n{section_text(section)}", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
            if options.page is not None:
                options.page.write_text(filled(PAGE.read_text("utf-8"), options.json), "utf-8")


def _section(name: str, options: argparse.Namespace, deadline: Deadline) -> Section:
    run, at_least = SECTIONS[name]
    torch.manual_seed(0)
    deadline.longest = 0.0  # of this section's cases
    with torch.no_grad():
        section = deadline.attempt(partial(run, options, deadline), at_least)
    if isinstance(section, str):
        return Section(name, name, [], notes=[section])
    return section


if __name__ == "__main__":
    main()
