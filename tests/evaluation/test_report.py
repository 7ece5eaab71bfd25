"""A page has every table, how to run a row again, and figures where matplotlib is installed."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.record import Record
from kvpolicy.evaluation.report import command, report
from tests.evaluation.records import FULL, answer, answers, cell, text, texts

VASE = cell("vase(b)", 64)
WIKI = replace(VASE, task="wiki(length=512)")
RECORDS = answers(FULL, [1.0] * 8) + answers(VASE, [0.0, 1.0] * 4) + texts(WIKI, [0.1, 0.3])
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed (kvpolicy[eval])"
)


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )


def section(page: str, title: str) -> str:
    """The text under a heading that begins so."""
    return re.split(r"^## ", page.split(f"\n## {title}", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_a_page_has_all_but_figures(tmp_path: Path) -> None:
    before = set(sys.modules)
    path = report(RECORDS, tmp_path / "new" / "folder")
    assert [file.name for file in path.parent.iterdir()] == ["report.md"]
    page = path.read_text("utf-8")
    assert section(page, "Figures").strip().startswith("No figures: matplotlib is not installed")
    assert "| tiny | gsm8k | vase(b) | 64 | 8 | 50.0 [" in section(page, "Answers")
    assert "| tiny | wiki(length=512) | vase(b) | 64 | 2 | 0.2000 [" in section(page, "Texts")
    assert "- budget: slots kept" in section(page, "Texts")
    assert "- torch 2.9.0\n" in section(page, "Versions")
    assert not any(name.startswith("matplotlib") for name in set(sys.modules) - before)


@pytest.mark.usefixtures("without_matplotlib")
def test_positions_and_layers_have_tables(tmp_path: Path) -> None:
    records = [
        text(WIKI, "a", mass_lost=[0.0, 0.5], by_position={"kl": [0.0, 1.0, 3.0]}),
        text(WIKI, "b", mass_lost=[0.5, None], by_position={"kl": [0.5, 2.0]}),
        text(cell("snapkv(b)", 1024, task=WIKI.task), "a", by_position={"log_prob": [-2.0], "full_log_prob": [-1.5]}),
        text(cell("snapkv(b)", 512, task=WIKI.task), "a", by_position={"kl": [4.0]}),
    ]
    page = report(records, tmp_path / "page.md").read_text("utf-8")
    assert section(page, "KL from the full cache, nats, by block: tiny, wiki(length=512)").splitlines()[2:] == [
        "| block | snapkv(b), b = 512 | vase(b), b = 64 |",
        "| --: | --: | --: |",
        "| 0 | 4.0000 | 0.2500 |",
        "| 1 | – | 1.5000 |",
        "| 2 | – | 3.0000 |",
        "",
    ]
    assert "| 0 | 0.5000 |" in section(page, "log-likelihood lost, nats, by block")
    mass = section(page, "attention on evicted tokens, by layer").splitlines()
    assert mass[2] == "| layer | snapkv(b), b = 512 | snapkv(b), b = 1024 | vase(b), b = 64 |"
    assert mass[4:6] == ["| 0 | 0.1000 | 0.1000 | 0.2500 |", "| 1 | 0.3000 | 0.3000 | 0.5000 |"]


@pytest.mark.usefixtures("without_matplotlib")
def test_a_page_says_how_to_run_each_cell_again(tmp_path: Path) -> None:
    seeds = [answer(replace(VASE, seed=seed, temperature=0.6), "a") for seed in (0, 1)]
    page = report([answer(FULL), *seeds], tmp_path).read_text("utf-8")
    lines = [line for line in section(page, "Run a row again").splitlines() if line.startswith("$ ")]
    assert [shlex.split(line)[1:3] for line in lines] == [["kvpolicy", "eval"]] * 3
    assert "--budget" not in lines[0]
    for seed, line in enumerate(lines[1:]):
        words = shlex.split(line)[3:]
        options = dict(zip(words[::2], words[1::2], strict=True))
        assert options["--policy"] == "vase(b)"
        assert (options["--budget"], options["--seed"], options["--temperature"]) == ("64", str(seed), "0.6")
        assert (options["--model"], options["--engine"], options["--dtype"]) == ("tiny", "transformers", "float32")
        assert options["--task"] == "gsm8k"


def test_a_command_is_safe_to_paste() -> None:
    odd = cell("Policy(Recency() >> TopK(b))", 64, model="my models/tiny; rm")
    assert "my models/tiny; rm" in shlex.split(command(odd))
    assert "Policy(Recency() >> TopK(b))" in shlex.split(command(odd))


@pytest.mark.usefixtures("without_matplotlib")
def test_versions_that_differ_are_all_named(tmp_path: Path) -> None:
    other = Record(VASE, "b", 1.0, {"tokens": 1}, {"torch": "2.8.0"})
    page = report([answer(VASE, "a"), other], tmp_path).read_text("utf-8")
    assert "- torch 2.8.0, 2.9.0\n" in page


def test_what_cannot_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="name another place"):
        report(RECORDS, tmp_path / "file" / "folder")
    with pytest.raises(EvaluationError, match="found none"):
        report([], tmp_path)


@needs_matplotlib
def test_figures_lie_beside_the_page_and_are_shown(tmp_path: Path) -> None:
    path = report([*answers(FULL, [1.0, 0.0]), text(WIKI, output_error=None)], tmp_path / "page.md")
    shown = re.findall(r"^!\[(.*)\]\((.*)\)$", path.read_text("utf-8"), flags=re.MULTILINE)
    assert {file.name for file in tmp_path.iterdir()} == {
        "page.md",
        *(name for _, name in shown),
        *(name.replace(".png", ".svg") for _, name in shown),
    }
    titles = " ".join(title for title, _ in shown)
    for part in (
        "score against budget: tiny, gsm8k",
        "KL against budget",
        "nats, by block",
        "evicted tokens, by layer",
    ):
        assert part in titles
    assert (tmp_path / shown[0][1]).read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


@needs_matplotlib
def test_a_figure_shows_scores_with_their_intervals() -> None:
    from kvpolicy.evaluation import plots
    from kvpolicy.evaluation.table import rows

    found = rows(answers(FULL, [1.0] * 8) + answers(VASE, [0.0, 1.0] * 4) + answers(cell("vase(b)", 128), [1.0] * 8))
    [axes] = plots.score_against_budget(found).axes
    points: Any
    [points] = [container for container in axes.containers if container.get_label() == "vase(b)"]
    assert list(points.lines[0].get_xdata()) == [64, 128]
    assert list(points.lines[0].get_ydata()) == [50, 100]
    [bars] = points.lines[2]
    low, high = bars.get_segments()[0][:, 1]
    score = next(row.score for row in found if row.cell == VASE)
    assert [low, high] == pytest.approx([100 * score.low, 100 * score.high])
    assert axes.get_legend_handles_labels()[1] == ["full", "vase(b)"]
