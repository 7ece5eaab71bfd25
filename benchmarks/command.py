"""The command line that all benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

__all__ = ["run_sections"]


def measured(parser: argparse.ArgumentParser) -> None:
    """Add the options of benchmarks that repeat what they measure, on a model from a folder."""
    parser.add_argument("--model", type=Path, help="folder of a model; by default the demo's")
    parser.add_argument("--repeats", type=int, help="of each measurement")


def run_sections(
    prog: str,
    about: str | None,
    sections: Collection[str],
    run: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
    add_options: Callable[[argparse.ArgumentParser], None] = measured,
) -> None:
    """Read a command line that names sections, and run them on one thread."""
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(sections))
    parser.add_argument("--quick", action="store_true", help="small sizes, and a model of no weight")
    add_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.sections) - set(sections)):
        parser.error(f"there is no section {unknown[0]!r}; there are {', '.join(sections)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(options)
    finally:
        torch.set_num_threads(threads)
