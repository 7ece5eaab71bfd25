"""The page of results is written from result files, and says where values are large."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.quality.page import BLOCK, written
from benchmarks.quality.values import Ranges, by_layer, largest, said
from kvpolicy import Policy
from kvpolicy.evaluation.leaderboard import ABLATION, LEADERBOARD, QUICK
from kvpolicy.evaluation.record import Cell, Record
from kvpolicy.evaluation.templates import fill

ROOT = Path(__file__).parents[2]


def test_a_block_holds_the_table_of_its_model_and_task() -> None:
    records = [
        Record(
            Cell("m", "w", "e", "float32", task, "full", "VaSE: vase(b)", 8, 0),
            f"p/{i}",
            1.0,
            {"tokens": 3},
            {"t": "1"},
        )
        for task in ("a(length=1, count=2)", "other")
        for i in range(3)
    ]
    blocks = ("<!-- results: m a(length=1, count=2) -->\nold\n<!-- end -->", "<!-- results: policies -->\n<!-- end -->")
    page = "\n".join(("before", *blocks, ""))
    found = written(page, records)
    assert "old" not in found
    assert "| VaSE | 8 | 3 |" in found
    assert "- VaSE: `vase(b)`" in found
    assert written(found, records) == found
    with pytest.raises(SystemExit, match="no result of m on unknown"):
        written("<!-- results: m unknown -->\n<!-- end -->", records)


def test_the_parts_of_a_policy_have_a_table_of_their_own() -> None:
    def record(label: str, score: float, i: int, budget: int = 8) -> Record:
        cell = Cell("m", "w", "e", "float32", "t", label, label, budget, 0)
        return Record(cell, f"p/{i}", score, {"tokens": 3}, {"t": "1"})

    part = next(one for one in ABLATION if one.startswith("top-k + sampling: "))
    top_k = next(one for one in ABLATION if one.startswith("top-k: "))
    shared = next(one for one in ABLATION if one.startswith("random: "))
    records = [record(one, float(one == part), i) for one in (part, top_k, shared, "mine: vase(b)") for i in range(8)]
    records += [record(shared, 0.0, i, budget=16) for i in range(8)]
    page = "".join(f"<!-- {kind}: m t -->\n<!-- end -->\n" for kind in ("results", "ablation"))
    compared, parts, _ = written(page, records).split("<!-- end -->")
    assert [name in compared for name in ("| top-k", "| random |", "| mine |")] == [False, True, True]
    assert [name in parts for name in ("| top-k |", "| random |", "| mine |")] == [True, True, False]
    assert ("| random | 16 |" in compared, "| random | 16 |" in parts) == (True, False)
    assert re.search(r"\| top-k \+ sampling \|.*\+100\.0 \[100\.0, 100\.0\]", parts)


def test_the_page_names_what_the_script_runs() -> None:
    tasks = {match["name"].partition(" ")[2] for match in BLOCK.finditer((ROOT / "docs/results.md").read_text("utf-8"))}
    script = shlex.split((ROOT / "benchmarks/quality.sh").read_text("utf-8"), comments=True)
    assert tasks - {""} <= {word for before, word in itertools.pairwise(script) if before == "--task"}


def test_the_script_refuses_a_section_that_there_is_not() -> None:
    found = subprocess.run([ROOT / "benchmarks/quality.sh", "nothing"], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "leaderboard, answers, ablation" in found.stderr


@pytest.mark.parametrize("policies", [LEADERBOARD, ABLATION, QUICK])
def test_every_policy_that_is_compared_can_be_made_and_is_matched(policies: tuple[str, ...]) -> None:
    for one in fill(list(policies), [96]):
        if one.policy is not None:
            assert isinstance(one.policy, Policy)
            assert one.policy.interval == 12
            assert one.label.startswith(("H2O", "TOVA")) or one.policy.recent == 12
    assert len({one.partition(": ")[0] for one in policies}) == len(policies)


def test_where_values_are_large() -> None:
    ranges = torch.ones(2, 1, 200)
    ranges[1, 0, 150], ranges[:, 0, 0] = 5.0, 0.25
    found = Ranges("m", ranges, [f"t{i}" for i in range(200)])
    assert "| 1 | 5.00 |" in by_layer(found)
    assert re.search(r"\| 1 \| 0 \| 150 \| 't150' \| 5.00 \|", largest(found, 1))
    assert "the first 4 positions" in said(found)[0]
