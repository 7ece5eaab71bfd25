"""`kvpolicy generate --compare`: the same run with the full cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvpolicy.cli import compare, devices
from kvpolicy.cli.compare import Measured, parting
from kvpolicy.cli.running import Run
from kvpolicy.generation import held_bytes
from tests.cli.tools import Command, Result, byte_tokenizer

POLICY = "Policy(Recency() >> Sinks(2) >> TopK(24), interval=8, recent=4)"


def cells(result: Result) -> dict[str, list[str]]:
    """The rows of the table, by their first cell."""
    assert result.code == 0, result.err
    rows = [line.split("│")[1:-1] for line in result.out.splitlines() if line.startswith("│")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in rows}


def test_a_policy_that_evicts_nothing_changes_nothing(kvpolicy: Command, tiny: Path) -> None:
    result = kvpolicy(
        *("generate", "abc", "--model", tiny, "--compare", "--max-new-tokens", 40),
        *("--policy", "vase(256)", "--temperature", 0.7),
    )
    table = cells(result)
    assert table["texts"] == ["identical", "identical"]
    assert "first eviction" not in table
    assert "warning: nothing was evicted" in result.err
    assert "outgrows them after about" in result.err
    assert table["tokens generated"] == ["40", "40"]
    first, second = result.out.split("── full cache\n")
    assert second.startswith(first.partition("\n")[2].rstrip("\n"))


def test_bytes_and_the_parting_point(kvpolicy: Command, tiny: Path) -> None:
    result = kvpolicy(
        *("generate", "abc", "--model", tiny, "--compare", "--max-new-tokens", 200),
        *("--policy", POLICY, "--no-chat"),
    )
    assert "warning" not in result.err
    table = cells(result)
    ours, full = (int(cell.replace(",", "")) for cell in table["KV memory, bytes"])
    heads, width, layers, float32 = 2, 8, 2, 4
    assert full == layers * heads * (3 + 199) * 2 * width * float32
    assert ours == layers * heads * (24 + 8) * (2 * width * float32 + 8)
    assert table["of the full cache"] == [f"{100 * ours / full:.1f} %", "100.0 %"]
    assert table["first eviction"] == ["after token 25", "never"]  # 3 + 24 > 24, first due at 24
    at = int(table["texts part"][0].removeprefix("at token ").replace(",", ""))
    assert at > 25
    assert table["texts part"][1] == ""
    assert all("┃" in cell for cell in table["there"])


def test_parting() -> None:
    assert parting((1, 2), (1, 2)) is None
    assert parting((1, 2), (1, 3)) == 1
    assert parting((1, 2), (1,)) == 1
    assert parting((), (1,)) == 0


def printed(table: Any) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_texts_that_part_before_an_eviction_say_so() -> None:
    tokenizer = byte_tokenizer(None)
    left = Measured(Run((5, 6, 7), 0.1, 0.2, whole=2), 10)
    right = Measured(Run((5, 9, 7), 0.1, 0.0, whole=3), 20)
    text = printed(compare.table(tokenizer, left, right))
    assert "by rounding alone" in text
    assert "after token 2" in text
    assert "50.0 %" in text
    assert "10.0" in text  # two tokens in 0.2 s


def test_a_text_that_ends_first_is_shown() -> None:
    tokenizer = byte_tokenizer(None)
    left = Measured(Run(tuple(range(5, 25)), 0.1, 0.2, whole=1), 0)
    right = Measured(Run(tuple(range(5, 60)), 0.1, 0.0, whole=1), 0)
    text = printed(compare.table(tokenizer, left, right))
    assert "at token 21" in text
    assert "(ends)" in text
    assert "┃" in text
    assert "…" in text


def test_held_bytes_count_what_a_view_keeps_alive() -> None:
    cache = DynamicCache()
    states = torch.zeros(1, 2, 10, 4)
    cache.update(states, states.clone(), 0)
    assert held_bytes(cache) == 2 * states.nbytes

    layer = DynamicSlidingWindowLayer(sliding_window=4)
    layer.update(torch.zeros(1, 2, 10, 4), torch.zeros(1, 2, 10, 4))
    cache.layers[0] = layer
    assert layer.keys is not None
    assert layer.keys.shape[2] == 3  # a piece of a tensor of ten, which stays
    assert held_bytes(cache) >= 2 * states.nbytes


@pytest.mark.parametrize("has", [True, False])
def test_auto_is_bfloat16_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(devices, "_cpu_computes_bfloat16", lambda: has)
    cpu = torch.device("cpu")
    assert devices.choose_dtype("auto", cpu) == (torch.bfloat16 if has else torch.float32)
    assert devices.choose_dtype("auto", cpu, exact=True) == torch.float32
    assert devices.choose_dtype("float16", cpu, exact=True) == torch.float16
