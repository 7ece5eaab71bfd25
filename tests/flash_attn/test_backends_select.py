"""Which backend serves whom: decided from one table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvpolicy.adapters.flash_attn.backends import BACKENDS, FEATURES, TABLE, markdown_rows, select, select_backend
from kvpolicy.adapters.flash_attn.backends.engines import Engine
from kvpolicy.adapters.flash_attn.backends.features import Request, lacking
from kvpolicy.errors import ParameterError, UnsupportedError

Machine = Callable[..., None]
ON_GPU: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 128}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a function that says what is installed."""

    def install(torch_version: str, flash: str | None, absent: dict[str, str] | None = None) -> None:
        here = {
            "torch": Engine(torch_version),
            "flash-attn": Engine(flash, "" if flash else "ImportError: No module named 'flash_attn'", absent or {}),
        }
        monkeypatch.setattr(select, "installed", here.__getitem__)

    return install


@pytest.mark.parametrize(
    ("torch_version", "flash", "asked", "wanted"),
    [
        ("2.13.0", "2.8.3", {}, "flash-attn"),
        ("2.13.0", None, {}, "torch"),
        ("2.11.0", None, {}, "reference"),
        ("2.11.0", None, {"needs": frozenset()}, "sdpa"),
        ("2.13.0", "2.5.9", {}, "torch"),
        ("2.13.0", None, {"page": 256}, "torch"),
        ("2.12.1", None, {"page": 256}, "reference"),
        ("2.13.0", "2.8.3", {"page": 16}, "reference"),
        ("2.13.0", "2.8.3", {"dtype": torch.float32}, "reference"),
        ("2.13.0", "2.8.3", {"head_dim": 264}, "reference"),
        ("2.13.0", "2.8.3", {"head_dim": 100}, "reference"),
        ("2.13.0", "2.8.3", {"device": "cpu"}, "reference"),
        ("2.13.0", None, {"needs": frozenset({"softcap"})}, "reference"),
        ("2.13.0", "2.8.3", {"needs": frozenset({"softcap", "lse", "varlen", "head_lengths"})}, "flash-attn"),
        ("2.13.0", None, {"needs": frozenset({"lse", "varlen", "head_lengths"})}, "torch"),
        ("2.13.0", "2.8.3", {"needs": frozenset({"value_dim"})}, "reference"),
    ],
)
def test_auto_takes_the_first_that_can(
    machine: Machine, torch_version: str, flash: str | None, asked: dict[str, Any], wanted: str
) -> None:
    machine(torch_version, flash)
    found = select_backend("auto", **{**ON_GPU, **asked})
    assert found.name == wanted
    assert type(found) is BACKENDS[wanted]
    assert select_backend(wanted, **{**ON_GPU, **asked}) == found


def test_a_kernel_without_seqused_k_is_passed_over(machine: Machine) -> None:
    machine("2.13.0", "2.6.3", {"head_lengths": "no seqused_k"})
    assert select_backend("auto", **ON_GPU).name == "flash-attn"
    assert select_backend("auto", **ON_GPU, needs={"varlen", "head_lengths"}).name == "torch"
    with pytest.raises(
        UnsupportedError, match=r"flash-attn 2\.6\.3 has no head_lengths: no seqused_k; write .*'torch'"
    ):
        select_backend("flash-attn", **ON_GPU, needs={"varlen", "head_lengths"})


@pytest.mark.parametrize(
    ("name", "asked", "text"),
    [
        ("flash-attn", {}, r"flash-attn is not here \(ImportError.*pip install 'flash-attn>=2.6'; write .*'torch'"),
        ("torch", {"page": 16}, "its pages have a multiple of 256 tokens; write backend='reference'"),
        ("torch", {"dtype": torch.float32}, "it takes float16 and bfloat16 only; write backend='reference'"),
        ("torch", {"device": "cpu"}, "it runs on cuda only; write backend='reference'"),
        ("torch", {"needs": {"softcap"}}, "it has no softcap"),
        ("sdpa", {}, "it has no row_lengths"),
        ("reference", {"needs": {"append_in_kernel"}}, "it has no append_in_kernel; no other backend can"),
        (
            "auto",
            {"needs": {"append_in_kernel"}},
            r"no backend can serve .*flash-attn: .*; torch: .*; reference: it has no",
        ),
    ],
)
def test_a_name_is_never_replaced(machine: Machine, name: str, asked: dict[str, Any], text: str) -> None:
    machine("2.13.0", None)
    with pytest.raises(UnsupportedError, match=text):
        select_backend(name, **{**ON_GPU, **asked})


def test_old_versions(machine: Machine) -> None:
    machine("2.11.0", "2.5.9")
    with pytest.raises(UnsupportedError, match=r"torch 2\.11\.0 is too old: install torch 2\.12 or later"):
        select_backend("torch", **ON_GPU)
    with pytest.raises(UnsupportedError, match=r"flash-attn 2\.5\.9 is too old"):
        select_backend("flash-attn", **ON_GPU)
    machine("2.12.1", None)
    with pytest.raises(UnsupportedError, match=r"it has paged since torch 2\.13, and this is 2\.12\.1"):
        select_backend("torch", **ON_GPU, page=256)


def test_old_devices() -> None:
    request = Request(torch.device("cuda"), torch.float16, 64, frozenset(), None, (7, 5))
    found = lacking(TABLE["torch"], Engine("2.13.0"), request)
    assert found == ["it needs compute capability 8.0, and this device has 7.5"]


def test_everything_that_is_missing_is_named(machine: Machine) -> None:
    machine("2.13.0", None)
    with pytest.raises(UnsupportedError) as raised:
        select_backend("torch", device="cpu", dtype=torch.float32, head_dim=300, needs={"softcap"}, page=48)
    for text in ("torch.float32 on cpu, head_dim=300, pages of 48", "cuda", "bfloat16", "256 tokens", "no softcap"):
        assert text in str(raised.value)


@pytest.mark.parametrize(
    ("name", "asked", "text"),
    [
        ("flash_attn", {}, "did you mean 'flash-attn'"),
        ("auto", {"needs": {"row_length"}}, "did you mean 'row_lengths'"),
        ("auto", {"needs": {"paged"}}, "page is not given"),
        ("auto", {"page": 0}, "page=0"),
        ("auto", {"needs": "paged"}, r"write needs=\{'paged'\}"),
        ("auto", {"needs": None}, "needs are several words"),
        ("auto", {"needs": [1]}, "needs are several words"),
        (None, {}, "backend None is no name"),
    ],
)
def test_words_that_nobody_knows(name: Any, asked: dict[str, Any], text: str) -> None:
    with pytest.raises(ParameterError, match=text):
        select_backend(name, **{**ON_GPU, **asked})


def test_needs_are_any_words() -> None:
    for needs in (["varlen", "lse"], ("varlen", "lse"), iter(["varlen", "lse"])):
        assert (
            select_backend("reference", device="cpu", dtype=torch.float32, head_dim=8, needs=needs).name == "reference"
        )


# The table


def test_the_table_names_what_there_is() -> None:
    assert list(TABLE) == list(BACKENDS)
    for features in TABLE.values():
        assert set(features.has) <= set(FEATURES)


def test_the_table_in_markdown() -> None:
    rows = markdown_rows()
    assert rows[0] == "| | flash-attn | torch | sdpa | reference |"
    assert rows[1] == "| --- | --- | --- | --- | --- |"
    assert {row.count("|") for row in rows} == {6}
    paged = next(row for row in rows if row.startswith("| `paged`"))
    assert paged.endswith("| yes, multiples of 256 | from torch 2.13, multiples of 256 | no | yes |")
    assert all(any(row.startswith(f"| `{name}`") for row in rows) for name in FEATURES)


def test_the_text_of_a_receipt() -> None:
    version = torch.__version__.partition("+")[0]
    texts = [BACKENDS[name]().text for name in ("torch", "sdpa", "reference")]
    assert texts == [f"torch {version} varlen", f"torch {version} sdpa (flash)", f"reference, torch {version}"]


def test_importing_brings_no_engine() -> None:
    program = (
        "import sys, kvpolicy.adapters.flash_attn; sys.exit(bool({'transformers', 'flash_attn'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
