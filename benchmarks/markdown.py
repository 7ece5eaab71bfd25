"""Pages whose tables are written from results."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from benchmarks.report import Cell, text
from benchmarks.timing import Ratio

__all__ = ["blocks", "table"]

BLOCK = re.compile(r"(?P<begin><!-- results: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def blocks(page: str, write: Callable[[str], str]) -> str:
    """Return a page with every block ``<!-- results: NAME -->`` ... ``<!-- end -->`` written anew.

    Args:
        page: Markdown.
        write: what stands in the block of a name.
    """
    return BLOCK.sub(lambda match: f"{match['begin']}\n{write(match['name'])}\n\n{match['end']}", page)


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
