"""docs/transformers-tests.md is complete: its tests exist, every test stands on it, and it counts right."""

from __future__ import annotations

import ast
import re

from tests.docs.pages import ROOT

PAGE = (ROOT / "docs/transformers-tests.md").read_text("utf-8")
HERE = ROOT / "tests/hf"
COUNTS = re.compile(r"(\d+) tests are listed: (\d+) pass, (\d+) are refused by name, (\d+) do not apply")
SECTIONS = ("What passes", "What is refused by name", "What does not apply")


def rows(section: str) -> list[list[str]]:
    """Return the cells of a section's table."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`(test_\w+)`", cell)


def defined(pattern: str) -> set[str]:
    """Return the tests in files of tests/hf."""
    trees = [ast.parse(file.read_text("utf-8")) for file in HERE.glob(pattern)]
    functions = [node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {name for name in functions if name.startswith("test_")}


def test_every_test_that_the_page_names_exists() -> None:
    known = defined("test_*.py")
    for section in SECTIONS[:2]:
        for row in rows(section):
            assert names(row[1]), row
            assert set(names(" ".join(row[1:]))) <= known, row


def test_every_test_stands_on_the_page() -> None:
    assert defined("test_transformers_*.py") <= set(names(PAGE))


def test_the_page_counts_right_and_names_nothing_twice() -> None:
    listed = [[name for row in rows(section) for name in names(row[0])] for section in SECTIONS]
    every = [name for section in listed for name in section]
    assert len(set(every)) == len(every)
    found = COUNTS.search(PAGE)
    assert found
    assert [int(number) for number in found.groups()] == [len(every), *(len(section) for section in listed)]


def test_every_row_says_why() -> None:
    assert all(row[-1] for section in SECTIONS[1:] for row in rows(section))
