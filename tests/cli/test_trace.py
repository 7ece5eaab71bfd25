"""`kvpolicy trace` and `kvpolicy plot` on a tiny random model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvpolicy.tracing import Trace
from tests.cli.tools import Command
from tests.tracing.traces import usual

SHORT = ["--policy", "vase(32)", "--interval", 8, "--recent", 4, "--max-new-tokens", 30, "--dtype", "float32"]


def test_trace_writes_what_generate_writes_and_both_files(kvpolicy: Command, tiny: Path, tmp_path: Path) -> None:
    page, file = tmp_path / "a.html", tmp_path / "a.json"
    common = ["A prompt of some bytes.", "--model", tiny, "--system", "Be brief.", *SHORT]
    found = kvpolicy("trace", *common, "--html", page, "--json", file)
    assert found.code == 0, found.err
    assert found.out == kvpolicy("generate", *common).out
    trace = Trace.load(file)
    assert "".join(trace.pieces).endswith(found.out.removesuffix("\n"))
    assert trace.run["model"] == str(tiny)
    assert (trace.run["system"], trace.run["chat"], trace.run["prompt"]) == (
        "Be brief.",
        None,
        "A prompt of some bytes.",
    )
    assert "TopK(32), interval=8, recent=4" in trace.run["policy"]
    assert trace.evictions
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert f"the page is in {page}" in found.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give --html FILE for a page, or --json FILE"),
        (["--html", "/nowhere/a.html"], "there is no folder /nowhere"),
        (["--json", "/"], "it is a folder"),
        (["--html", "a.html", "--max-new-tokens", 0], "it is at least 1"),
    ],
)
def test_trace_refuses_before_a_model_is_loaded(kvpolicy: Command, options: list[str], says: str) -> None:
    found = kvpolicy("trace", "abc", *options)
    assert (found.code, says in found.error) == (2, True), found.error


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.parametrize(("kind", "ending"), [("survival", "png"), ("map", "svg"), ("values", "pdf")])
def test_plot_writes_a_figure(kvpolicy: Command, tmp_path: Path, kind: str, ending: str) -> None:
    usual().save(tmp_path / "a.json")
    out = tmp_path / f"a.{ending}"
    assert kvpolicy("plot", tmp_path / "a.json", "-o", out, "--kind", kind).code == 0
    assert out.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kind", "pie"], "there are survival, lifetimes, memory, values, map"),
        (["--layer", 1], "goes with --kind values"),
        (["--head", 1, "--kind", "values"], "say of which layer"),
        (["--seen", 1], "goes with --kind map"),
        ([], "cannot read"),
    ],
)
def test_plot_refuses(kvpolicy: Command, tmp_path: Path, options: list[str], says: str) -> None:
    found = kvpolicy("plot", tmp_path / "none.json", "-o", tmp_path / "a.png", *options)
    assert (found.code, says in found.error) == (2, True), found.error
    assert ".png, .svg, .pdf" in kvpolicy("plot", "a.json", "-o", "a.gif").error
