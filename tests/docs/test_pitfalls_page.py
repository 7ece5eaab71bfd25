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


def test_every_entry_names_a_test_or_says_that_there_is_none() -> None:
    assert len(rows()) >= 34
    for row in rows():
        assert len(row) == 4, row
        assert all(row), row
        if not TEST.search(row[3]):
            assert row[3] == "none", row
            assert row[2].startswith("Not yet"), row
    assert {row[0] for row in rows() if row[3] == "none"} == {"vLLM, serving", "pages that span heads"}


def test_every_test_that_the_page_names_is_collected() -> None:
    ids = sorted(f"tests/{name}" for name in named())
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *ids]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


def test_the_page_names_every_test_of_a_pitfall() -> None:
    found = set()
    for path in sorted((ROOT / "tests/hf").glob("test_pitfalls*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.add(f"hf/{path.name}::{node.name}")
    assert found
    assert found <= named(), sorted(found - named())
