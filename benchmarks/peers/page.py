"""Write the tables of ``docs/benchmarks-peers.md`` from the results: ``python -m benchmarks.peers.page``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.markdown import blocks, table

__all__ = ["PAGE", "RESULTS", "filled"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/benchmarks-peers.md"


def filled(page: str, results: Path = RESULTS) -> str:
    """Return a page with every block ``<!-- results: NAME -->`` ... ``<!-- end -->`` written anew.

    Args:
        page: Markdown.
        results: folder of ``cpu-peers-NAME.json``, as ``python -m benchmarks.peers NAME --json`` writes them.
    """

    def block(name: str) -> str:
        found = json.loads((results / f"cpu-peers-{name}.json").read_text("utf-8"))
        return f"{table(found['sections'][name])}\n\n{_run(found['environment'])}"

    return blocks(page, block)


def _run(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {environment[name]}" for name in ("kvpolicy", "kvpress", "torch", "transformers"))
    machine = environment["machine"].partition(",")[0]
    return f"Run on {environment['date'][:10]}: {versions}, Python {environment['python']}, {machine}."


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
