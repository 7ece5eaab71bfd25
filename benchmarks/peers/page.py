"""Write the tables of ``docs/benchmarks-peers.md`` from the results: ``python -m benchmarks.peers.page``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.report import Cell, text
from benchmarks.timing import Ratio

__all__ = ["PAGE", "RESULTS", "filled", "table"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/benchmarks-peers.md"

BLOCK = re.compile(r"(?P<begin><!-- results: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def filled(page: str, results: Path = RESULTS) -> str:
    """Return a page with every block ``<!-- results: NAME -->`` ... ``<!-- end -->`` written anew.

    Args:
        page: Markdown.
        results: folder of ``cpu-peers-NAME.json``, as ``python -m benchmarks.peers NAME --json`` writes them.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        found = json.loads((results / f"cpu-peers-{name}.json").read_text("utf-8"))
        return f"{match['begin']}\n{table(found['sections'][name])}\n\n{_run(found['environment'])}\n\n{match['end']}"

    return BLOCK.sub(block, page)


def table(section: dict[str, Any]) -> str:
    """Return a section's title and rows as Markdown; columns that hold numbers lean to the right."""
    rows = [{name: _cell(cell) for name, cell in row.items()} for row in section["rows"]]
    names = list(rows[0])
    rule = ["---" if all(isinstance(row[name], str) for row in rows) else "---:" for name in names]
    lines = [names, rule, *([text(row[name]) for name in names] for row in rows)]
    title = section["title"][0].upper() + section["title"][1:]
    return "\n".join([f"{title}.", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _cell(cell: Any) -> Cell:
    return Ratio(**cell) if isinstance(cell, dict) else cell


def _run(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {environment[name]}" for name in ("kvpolicy", "kvpress", "torch", "transformers"))
    machine = environment["machine"].partition(",")[0]
    return f"Run on {environment['date'][:10]}: {versions}, Python {environment['python']}, {machine}."


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
