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
from benchmarks.eviction import Evictions
from benchmarks.gather import Pair
from benchmarks.lse import Asked
from benchmarks.memory import peak_bytes
from benchmarks.roofline import bytes_touched
from benchmarks.stores import Shape
from benchmarks.timing import ratio, take_turns
from kvpolicy.roofline import bytes_to_move


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathering_decides_as_kvpolicy_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)  # values whose sizes do not tie where the guard ends: such code leaves ties to chance
    pair = Pair(320, Shape(heads=2, group=2, dim=16, dtype=dtype), tau=0)
    for _ in range(3):
        pair.ours()
        pair.theirs()
        kept = pair.store.positions[0, :, :, : pair.budget].sort(-1).values
        assert torch.equal(kept, pair.gathering.positions[:, :, : pair.budget].to(torch.int32))
        assert kept[0, 0].tolist() != list(range(pair.budget)), "nothing had to go"
        at = pair.store.order[0, :, :, : pair.budget].to(torch.int64)[..., None].expand(-1, -1, -1, 16)
        assert torch.equal(pair.store.keys[0].gather(2, at), pair.gathering.keys[:, :, : pair.budget])
        assert torch.equal(pair.store.values[0].gather(2, at), pair.gathering.values[:, :, : pair.budget])


def test_both_ways_to_ask_give_the_same() -> None:
    asked = Asked(200, Shape(heads=2, group=2, dim=16))
    assert torch.allclose(asked.received(asked.lse), asked.received(None), rtol=0, atol=1e-6)
    assert not torch.allclose(asked.received(asked.lse + 0.1), asked.received(None), rtol=0, atol=1e-4)


def test_what_must_be_touched_is_counted() -> None:
    evictions = Evictions(256, Shape(heads=2, group=2, dim=16), layers=3)
    evictions()
    assert evictions.store.spec.capacity == 256
    moved = evictions.laps.moved
    assert 0 < moved <= 3 * 2 * 64
    rows = moved * (2 * 16 * 4 + 4 + 4) + 3 * 2 * 192 * 4  # the order of those that stay
    assert bytes_to_move(evictions.store, moved) == rows
    assert bytes_touched(evictions.store, moved, 64) == 2 * 256 * 16 * 4 + 2 * 64 * 16 * 4 + 2 * rows


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
