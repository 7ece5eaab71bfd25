"""Write the tables of ``docs/benchmarks-vllm.md`` from the results: ``python -m benchmarks.vllm.page``."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu.page import MISSING, environment_text, section_text
from benchmarks.markdown import blocks

__all__ = ["PAGE", "RESULTS", "filled"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/benchmarks-vllm.md"


def filled(page: str, results: Path = RESULTS) -> str:
    """Return a page with every block ``<!-- results: DEVICE_NAME -->`` ... ``<!-- end -->`` written anew.

    Args:
        page: Markdown.
        results: folder of ``DEVICE-vllm.json``, as ``python -m benchmarks.vllm --json`` writes them. Where there is
            no such file, the page says that the figures are missing.
    """

    def block(name: str) -> str:
        device, _, part = name.partition("_")
        path = results / f"{device}-vllm.json"
        if not path.exists():
            return MISSING
        found = json.loads(path.read_text("utf-8"))
        if part == "environment":
            return environment_text(found)
        section = found["sections"].get(part)
        return "Not part of this run." if section is None else section_text(section)

    return blocks(page, block)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
