"""The benchmarks run and say what they should; how long things take is not asserted."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import SECTIONS, main
from benchmarks.memory import peak_bytes
from benchmarks.timing import ratio, take_turns


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path: Path = tmp_path_factory.mktemp("bench") / "bench.json"
    threads = torch.get_num_threads()
    main(["--quick", "--repeats", "2", "--json", str(path)])
    assert torch.get_num_threads() == threads
    return json.loads(path.read_text("utf-8"))


def test_the_environment_is_written_down(found: dict[str, Any]) -> None:
    assert {"date", "machine", "python", "torch", "transformers", "kvpolicy"} <= set(found["environment"])
    assert found["environment"]["threads"] == 1
    assert found["options"] == {"quick": True, "repeats": 2}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_has_rows_of_finite_numbers(found: dict[str, Any], name: str) -> None:
    section = found["sections"][name]
    assert section["title"]
    assert section["rows"]
    for row in section["rows"]:
        for cell in row.values():
            numbers = cell.values() if isinstance(cell, dict) else [cell]
            assert all(isinstance(n, str) or math.isfinite(n) for n in numbers), row
    for target in section["targets"]:
        assert target["holds"] == (target["value"] <= target["at_most"])


def test_decoding_compares_every_cache(found: dict[str, Any]) -> None:
    caches = [row["cache"] for row in found["sections"]["decode"]["rows"]]
    assert caches[:3] == ["DynamicCache", "StaticCache", "vase(128)"]
    assert caches[-1] == "vase(128)"  # a quarter of the largest


def test_both_dtypes_are_evicted_and_something_moves(found: dict[str, Any]) -> None:
    assert {row["dtype"] for row in found["sections"]["eviction"]["rows"]} == {"float32", "bfloat16"}
    assert all(row["must move, KiB"] > 0 for row in found["sections"]["compaction"]["rows"])


def test_an_eviction_stays_within_its_workspace(found: dict[str, Any]) -> None:
    """Bytes are exact, unlike times."""
    assert all(target["holds"] for target in found["sections"]["memory"]["targets"])


def test_a_long_run_keeps_its_slots(found: dict[str, Any]) -> None:
    rows = found["sections"]["flat"]["rows"]
    assert len({row["slots"] for row in rows}) == 1
    assert rows[-1]["evictions"] > rows[0]["evictions"]


def test_sections_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    main(["layers", "--quick", "--repeats", "1"])
    shown = capsys.readouterr().out
    assert "layers:" in shown
    assert "decode:" not in shown
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "no section 'speed'" in capsys.readouterr().err


def test_peak_counts_what_is_freed_and_what_operators_take() -> None:
    def work() -> None:
        for _ in range(3):
            torch.zeros(2**20, dtype=torch.uint8)

    assert 2**20 <= peak_bytes(work) < 1.5 * 2**20


def test_contestants_take_turns() -> None:
    calls: list[str] = []

    def turn(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    seconds = take_turns({name: partial(turn, name) for name in "ab"}, 3)
    assert "".join(calls) == "abbaab"
    assert seconds == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}
    found = ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.5)
