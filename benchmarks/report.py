"""What a benchmark found: tables for people, JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import kvpolicy
from benchmarks.timing import Ratio

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Section", "Target", "environment", "show", "text", "version_of", "write_json"]

Cell = str | int | float | Ratio


@dataclass(frozen=True)
class Target:
    """Compare one number with what it should not exceed."""

    what: str
    value: float
    at_most: float

    @property
    def holds(self) -> bool:
        """Return whether it does not."""
        return self.value <= self.at_most


@dataclass
class Section:
    """Hold the results of one benchmark.

    Attributes:
        name: what selects it on the command line.
        title: what was measured, and how.
        columns: headings.
        rows: one cell a column.
        targets: what the numbers should be.
        notes: what was left out, and why.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return plain values; each row by its column."""
        rows = [
            {
                name: dataclasses.asdict(cell) if isinstance(cell, Ratio) else cell
                for name, cell in zip(self.columns, row, strict=True)
            }
            for row in self.rows
        ]
        targets = [{**dataclasses.asdict(target), "holds": target.holds} for target in self.targets]
        return {"title": self.title, "rows": rows, "targets": targets, "notes": self.notes}


def text(cell: Cell) -> str:
    """Return a cell as tables show it."""
    if isinstance(cell, Ratio):
        return f"{text(cell.median)} ({text(cell.low)}–{text(cell.high)})"
    if isinstance(cell, float):
        return f"{cell:.3f}" if abs(cell) < 10 else f"{cell:.1f}"
    return str(cell)


def show(section: Section, console: Console) -> None:
    """Print a table, its targets and its notes."""
    from rich.table import Table

    table = Table(title=f"{section.name}: {section.title}", title_justify="left")
    for number, name in enumerate(section.columns):
        table.add_column(name, justify="right" if number else "left")
    for row in section.rows:
        table.add_row(*map(text, row))
    console.print(table)
    for target in section.targets:
        verdict = "[green]holds[/]" if target.holds else "[red]missed[/]"
        console.print(f"  {verdict}  {target.what}: {text(target.value)}, at most {text(target.at_most)}")
    for note in section.notes:
        console.print(f"  {note}")
    console.print()


def environment(*packages: str) -> dict[str, Any]:
    """Return versions, those of further packages among them, machine and date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kvpolicy": kvpolicy.__version__,
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        **{name: version_of(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {_processor()}, {platform.system()} {platform.release()}",
        "threads": torch.get_num_threads(),
    }


def version_of(package: str) -> str:
    """Return the version of a distribution, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_json(path: Path, sections: list[Section], options: dict[str, Any], packages: Sequence[str] = ()) -> None:
    """Write everything to a file, with the versions of further packages."""
    found = {
        "environment": environment(*packages),
        "options": options,
        "sections": {section.name: section.as_json() for section in sections},
    }
    path.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
