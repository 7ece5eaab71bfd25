"""The comparison with kvpress runs, its reference is right, and its page says what was measured.

kvpress needs an older transformers than the tests run with: its rows are in `make bench-peers` only.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import models
from benchmarks.markdown import table
from benchmarks.peers import kept, reference
from benchmarks.peers.__main__ import SECTIONS, main
from benchmarks.peers.entrants import Sizes, kvpress
from benchmarks.peers.page import PAGE, RESULTS, filled

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path: Path = tmp_path_factory.mktemp("peers") / "peers.json"
    threads = torch.get_num_threads()
    main(["--quick", "--repeats", "2", "--json", str(path)])
    assert torch.get_num_threads() == threads
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_has_rows_of_finite_numbers(found: dict[str, Any], name: str) -> None:
    rows = found["sections"][name]["rows"]
    assert {row["tool"] for row in rows} >= {"kvpolicy"}
    for row in rows:
        for cell in row.values():
            numbers = cell.values() if isinstance(cell, dict) else [cell]
            assert all(isinstance(n, str) or math.isfinite(n) for n in numbers), row


def test_everybody_holds_as_many_slots_before_an_eviction(found: dict[str, Any]) -> None:
    rows = found["sections"]["memory"]["rows"]
    assert {row["slots before"] for row in rows} == {64 + 16 - 1}
    assert {row["slots after"] for row in rows if row["tool"] != "transformers"} == {64}
    assert all(0 < row["of it keys and values"] <= row["held"] for row in rows)


def test_kvpolicy_keeps_what_the_written_out_rules_keep(found: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in found["sections"]["kept"]["rows"] if row["tool"] == "kvpolicy"}
    assert (rows["StreamingLLM"]["kept"], rows["StreamingLLM"]["sinks of 4"]) == (1.0, 4.0)
    exact, pooled = rows["SnapKV, pooling 1"], rows["SnapKV, pooling 5"]
    assert (exact["kept"], exact["victims"]) == (1.0, 1.0)
    assert 0.7 < pooled["victims"] < 1.0  # kvpolicy's average runs on into the last tokens


def test_the_measure_sees_queries_that_are_rotated_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a share of 1 would mean nothing: here the reference asks with other queries."""
    queries = reference.Recorder.queries
    monkeypatch.setattr(reference.Recorder, "queries", lambda self, layer: queries(self, layer).roll(1, -1))
    model = models.tiny().double()
    section = kept.run(model, models.tokens(model, 32 + 2 * 16), Sizes(32, 16, 8), 2)
    for row in (dict(zip(section.columns, row, strict=True)) for row in section.rows):
        assert (row["victims"] == 1.0) == (row["method"] == "StreamingLLM")


def test_the_reference_of_snapkv_by_hand() -> None:
    """One head, one query asked, no pooling: the largest logits stay, and the token that asks."""
    queries, keys = torch.ones(1, 6, 1).double(), torch.tensor([[3.0], [9.0], [1.0], [8.0], [2.0], [0.0]]).double()
    held = torch.tensor([0, 2, 3, 4, 5])  # 1 was evicted before, large as its key is
    assert reference.snapkv(3, 1, 1)(queries, keys, held).tolist() == [0, 3, 5]
    assert reference.streaming(3, sinks=1)(queries, keys, held).tolist() == [0, 4, 5]


def test_sections_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tokens"])
    assert "no section 'tokens'" in capsys.readouterr().err


@pytest.mark.skipif(kvpress() is None, reason="kvpress needs transformers < 5.3: `make bench-peers` runs it")
def test_kvpress_takes_part(found: dict[str, Any]) -> None:
    assert all("kvpress" in {row["tool"] for row in section["rows"]} for section in found["sections"].values())


# The page


def test_the_page_says_what_was_measured() -> None:
    page = PAGE.read_text("utf-8")
    assert page == filled(page), "run python -m benchmarks.peers.page"
    assert all(f"<!-- results: {name} -->" in page for name in SECTIONS)


@pytest.mark.parametrize("name", SECTIONS)
def test_results_are_of_a_whole_run_beside_kvpress(name: str) -> None:
    found = json.loads((RESULTS / f"cpu-peers-{name}.json").read_text("utf-8"))
    assert not found["options"]["quick"]
    assert {row["tool"] for row in found["sections"][name]["rows"]} >= {"kvpress", "kvpolicy"}
    pinned = (ROOT / "benchmarks/peers/constraints.txt").read_text("utf-8").splitlines()
    for package in ("kvpress", "transformers", "torch"):
        assert f"{package}=={found['environment'][package].partition('+')[0]}" in pinned


def test_a_table_shows_ratios_with_their_quartiles() -> None:
    section = {"title": "t", "rows": [{"name": "a", "ratio": {"median": 1.0, "low": 0.5, "high": 1.5}, "n": 3}]}
    assert table(section).splitlines() == [
        "T.",
        "",
        "| name | ratio | n |",
        "| --- | ---: | ---: |",
        "| a | 1.000 (0.500–1.500) | 3 |",
    ]


def test_both_environments_name_one_torch() -> None:
    """The Makefile installs the torch of constraints.txt first, in either environment."""
    files = [ROOT / "constraints.txt", ROOT / "benchmarks/peers/constraints.txt"]
    torches = {line for file in files for line in file.read_text("utf-8").splitlines() if line.startswith("torch==")}
    assert len(torches) == 1
