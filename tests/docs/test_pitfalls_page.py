"""docs/pitfalls.md and the tests that it names agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

from tests.docs.pages import ROOT

PAGE = ROOT / "docs/pitfalls.md"
TEST = re.compile(r"`([\w/]+\.py::\w+)`")


def named() -> set[str]:
    return set(TEST.findall(PAGE.read_text("utf-8")))


def rows() -> list[list[str]]:
    """Return the cells of every row, without heads and rules."""
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "entry" and set(row[0]) != {"-"}]


def test_every_entry_names_a_test() -> None:
    assert len(rows()) >= 34
    for row in rows():
        assert len(row) == 4, row
        assert all(row), row
        assert TEST.search(row[3]), row


def test_every_test_that_the_page_names_is_collected() -> None:
    ids = sorted(f"tests/{name}" for name in named() if not name.startswith("vllm/"))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *ids]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


def test_every_test_of_vllm_that_the_page_names_is_there() -> None:
    """They are not collected where vLLM is missing."""
    asked = {name for name in named() if name.startswith("vllm/")}
    assert asked
    assert asked <= defined("vllm/test_*.py"), sorted(asked - defined("vllm/test_*.py"))


def test_the_page_names_every_test_of_a_pitfall() -> None:
    for pattern in ("hf/test_pitfalls*.py", "vllm/test_vllm_pitfalls.py"):
        found = defined(pattern)
        assert found
        assert found <= named(), sorted(found - named())


def defined(pattern: str) -> set[str]:
    """Return the tests in files below tests/."""
    return {
        f"{path.relative_to(ROOT / 'tests').as_posix()}::{node.name}"
        for path in (ROOT / "tests").glob(pattern)
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
