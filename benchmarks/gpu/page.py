"""Write the tables of ``docs/benchmarks-gpu.md`` from the results: ``python -m benchmarks.gpu.page``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.markdown import blocks, table

__all__ = ["PAGE", "RESULTS", "filled", "section_text"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/gpu.json"
PAGE = ROOT / "docs/benchmarks-gpu.md"
MISSING = "**Not measured yet**: no GPU was at hand."


def filled(page: str, results: Path = RESULTS) -> str:
    """Return a page with every block ``<!-- results: NAME -->`` ... ``<!-- end -->`` written anew.

    Args:
        page: Markdown.
        results: what ``python -m benchmarks.gpu --json`` has written; where there is no such file, the
            page says that the figures are missing.
    """
    found = json.loads(results.read_text("utf-8")) if results.exists() else None

    def block(name: str) -> str:
        if found is None:
            return MISSING
        if name == "environment":
            return environment_text(found)
        section = found["sections"].get(name)
        return "Not part of this run." if section is None else section_text(section)

    return blocks(page, block)


def section_text(section: dict[str, Any]) -> str:
    """Return a section as Markdown: its table, the targets it missed, and its notes."""
    parts = [table(section)] if section["rows"] else []
    missed = [one for one in section["targets"] if not one["holds"]]
    if section["targets"]:
        lines = [f"* missed: {one['what']}: {one['value']:.4g}, at most {one['at_most']:.4g}" for one in missed]
        parts.append("\n".join([f"{len(section['targets']) - len(missed)} of {len(section['targets'])} targets hold."]))
        parts += ["\n".join(lines)] if lines else []
    parts += ["\n".join(f"* {note}" for note in section["notes"])] if section["notes"] else []
    return "\n\n".join(parts)


def environment_text(found: dict[str, Any]) -> str:
    """Return where and how a run was made, a line each."""
    lines = [f"* {name}: {value}" for name, value in found["environment"].items()]
    return "\n".join([*lines, *(f"* option {name}: {value}" for name, value in found["options"].items())])


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
