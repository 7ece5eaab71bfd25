"""The class that docs/write-a-policy.md registers is found by its name."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpolicy import parse_policy, registry
from kvpolicy.cli.app import run
from tests.cli.tools import save_tiny
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "write-a-policy.md"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write the files of the page, and what pip would write when it installs them."""
    files = {block.title: block.code for block in blocks(PAGE, "python", "toml") if block.title is not None}
    (tmp_path / "ends.py").write_text(files["ends/ends.py"], "utf-8")
    project = tomllib.loads(files["ends/pyproject.toml"])["project"]
    info = tmp_path / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", "utf-8"
    )
    ((group, points),) = project["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {where}" for name, where in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    registry.policies.cache_clear()
    yield
    registry.policies.cache_clear()
    sys.modules.pop("ends", None)


@pytest.mark.usefixtures("installed")
def test_the_class_of_the_page_is_known_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repr(parse_policy("Ends(256)")) == "Ends(256, first=4, interval=64, recent=64)"
    assert run(["list"]) == 0
    assert re.search(r"^Ends .* ends *$", capsys.readouterr().out, re.MULTILINE)
    assert run(["show", "Ends"]) == 0
    shown = capsys.readouterr().out
    assert "Keep the first tokens, and the newest." in shown
    assert "Ends(1024, first=4, interval=64, recent=64)" in shown
    options = ["--model", str(save_tiny(tmp_path / "tiny")), "--max-new-tokens", "8", "--no-chat"]
    assert run(["generate", "--policy", "Ends(16, interval=4, recent=4)", *options, "Why is the sky blue?"]) == 0
    assert "Ends(16, first=4, interval=4, recent=4)" in capsys.readouterr().err
