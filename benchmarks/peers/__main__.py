"""Compare kvpolicy with kvpress: ``python -m benchmarks.peers [--quick] [--json FILE]``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import models
from benchmarks.command import run_sections
from benchmarks.peers import kept, memory, speed
from benchmarks.peers.entrants import Sizes, kvpress
from benchmarks.report import Section, environment, show, write_json

__all__ = ["SECTIONS", "main"]

TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
LAYERS = 4  #: of the model, where it runs in float64
FIRINGS = 18


def _speed(name: str, budget: int, options: argparse.Namespace) -> Section:
    if options.quick:
        return speed.run(name, models.tiny(), Sizes(64, 16, 8), options.repeats or 2)
    return speed.run(name, models.load(options.model), Sizes(budget), options.repeats or 5)


def _memory(options: argparse.Namespace) -> Section:
    if options.quick:
        return memory.run(models.tiny(), Sizes(64, 16, 8), 1)
    return memory.run(models.load(options.model), Sizes(1024), 16)


def _kept(options: argparse.Namespace) -> Section:
    if options.quick:
        model, sizes, firings = models.tiny().double(), Sizes(32, 16, 8), 3
        return kept.run(model, models.tokens(model, 32 + 3 * 16), sizes, firings)
    model = _first_layers(models.load(options.model).double())
    return kept.run(model, _text(model), Sizes(128, 20, 16), FIRINGS)


def _first_layers(model: Any) -> Any:
    """Cut a model short, and take its head off: nobody reads the logits."""
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 1, dtype=torch.float64)
    return model


def _text(model: Any) -> Tensor:
    """Return the licence in the model's tokens, ``[1, n]``: a text that everyone has."""
    from transformers import AutoTokenizer

    read: Callable[..., Any] = AutoTokenizer.from_pretrained
    return read(model.config.name_or_path)(TEXT.read_text("utf-8"), return_tensors="pt").input_ids


SECTIONS: dict[str, Callable[[argparse.Namespace], Section]] = {
    "speed_short": partial(_speed, "speed_short", 256),
    "speed_long": partial(_speed, "speed_long", 1024),
    "memory": _memory,
    "kept": _kept,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, print it, and write it down."""
    run_sections("python -m benchmarks.peers", __doc__, SECTIONS, _run, arguments)


def _run(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    console, found = Console(highlight=False), list[Section]()
    if not console.is_terminal:
        console.width = 150
    packages = ("kvpress",) if kvpress() else ()
    console.print("  ".join(f"{name} {value}" for name, value in environment(*packages).items()))
    if not packages:
        console.print("kvpress is not installed here: its rows are left out; `make bench-peers` installs it")
    for name in options.sections or SECTIONS:
        found.append(SECTIONS[name](options))
        show(found[-1], console)
    if options.json is not None:
        write_json(options.json, found, {"quick": options.quick, "repeats": options.repeats}, packages)


if __name__ == "__main__":
    main()
