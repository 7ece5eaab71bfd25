"""The page is one file that asks nobody for anything, and shows text as text."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from kvpolicy import UsageError
from kvpolicy.tracing import packing, write_page
from kvpolicy.tracing.page import page
from tests.docs.browser import Browser, chromium
from tests.tracing.traces import HOSTILE, made_up, usual

MOST = 3_000_000  #: bytes of a trace, or a page, of 2,000 tokens and 90 heads


class Reader(HTMLParser):
    """Read what a browser would: the attributes, and the text of each element that may hold code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.names: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def test_page_asks_nobody_for_anything() -> None:
    text = page(usual())
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|fetch\(|XMLHttpRequest|import\s*\(|WebSocket", text)
    addresses = [one for one in Reader(text).attributes if one[1] in ("src", "href", "srcset", "action", "data")]
    assert addresses == [("link", "href", "data:,"), ("a", "href", "#tokens")]


def test_text_of_the_trace_cannot_become_markup() -> None:
    assert "</script><b>" in "".join(usual().pieces)
    read = Reader(page(usual()))
    assert len(read.scripts) == 4
    assert json.loads(read.scripts[0].split("\n\n")[0]) == json.loads(json.dumps(usual().to_dict()))
    assert read.names.count("b") == 0
    assert read.names[-1] == "script"


def test_a_hostile_name_of_a_model_is_escaped() -> None:
    run = {**usual().run, "model": "</title><script>alert(1)</script>{{DATA}}"}
    made = usual().__class__(**{**vars(usual()), "run": run})
    assert "alert(1)</script>" not in page(made)
    assert len(Reader(page(made)).scripts) == 4


def test_two_thousand_tokens_of_ninety_heads_are_small(tmp_path: Path) -> None:
    trace = made_up(2000, 30, 3)
    trace.save(tmp_path / "a.json")
    write_page(trace, tmp_path / "a.html")
    assert 100_000 < (tmp_path / "a.json").stat().st_size < MOST
    assert (tmp_path / "a.html").stat().st_size < MOST


def test_packed_numbers_are_what_javascript_reads() -> None:
    small, large = packing.packed(torch.tensor([[1, 200]])), packing.packed(torch.tensor([[0], [70_000]]))
    assert (small["type"], large["type"], large["shape"]) == ("uint8", "int32", [2, 1])
    assert zlib.decompress(base64.b64decode(large["data"])) == struct.pack("<ii", 0, 70_000)
    floats = packing.packed_floats(torch.tensor([[0.0, 3e-5, 123.4]]))
    raw = struct.unpack("<3e", zlib.decompress(base64.b64decode(floats["data"])))
    assert [one * floats["scale"] for one in raw] == pytest.approx([0.0, 3e-5, 123.4], rel=1e-3)
    assert packing.unpacked(packing.packed(torch.zeros(2, 0))).shape == (2, 0)
    with pytest.raises(UsageError, match="no packed array"):
        packing.unpacked({"type": "uint8"})


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed: apt-get install chromium")
def test_page_works_in_a_browser(tmp_path: Path) -> None:
    write_page(usual(), tmp_path / "a.html")
    colours = "[...document.querySelectorAll('#tokens span')].map((one) => getComputedStyle(one).backgroundColor)"
    with Browser.start() as browser:
        for dark in (False, True):
            page = browser.open(tmp_path / "a.html", dark=dark)
            page.wait_for("document.documentElement.dataset.ready")
            shown = page.value("document.querySelector('#prompt').textContent")
            assert shown.replace("·", "") == HOSTILE
            assert page.value("document.querySelectorAll('#tokens b').length") == 0

            # by keyboard: the slider, evictions, tokens, the map, the theme
            page.focus("#moment")
            page.press("Home")
            first = page.value(colours)
            page.press("ArrowRight")
            assert page.value("seenNow()") == usual().steps[1]
            page.press("PageUp")
            assert page.value("seenNow()") == usual().evictions[1]
            page.press("End")
            assert page.value(colours) != first
            held = usual().held().sum(0).tolist()
            assert page.value("[...columns.held]") == held
            assert page.value("[...columns.safe]") == safe_now()
            page.focus("#tokens")
            page.press("Home", "ArrowRight")
            label = "document.querySelector('#tokens [aria-selected=true]').getAttribute('aria-label')"
            assert "position 1, of the prompt, held by" in page.value(label)
            page.press("ArrowDown")
            assert "written by the model" in page.value(label)
            page.focus("#map")
            page.press("ArrowDown", "ArrowRight")
            assert "layer 0, head 1" in page.value("document.querySelector('#cell').textContent")
            paper = "getComputedStyle(document.body).backgroundColor"
            before = page.value(paper)
            assert (sum(map(int, re.findall(r"\d+", before))) < 200) == dark
            page.focus("#theme")
            page.press("Enter")
            assert page.value(paper) != before

            named = "one.hidden || one.textContent.trim() || one.labels?.length || one.getAttribute('aria-label')"
            all_of_them = "[...document.querySelectorAll('button, input, select, canvas, svg, [role]')]"
            assert page.value(f"{all_of_them}.filter((one) => !({named})).map((one) => one.outerHTML)") == []
            assert page.errors == []
            assert page.requests == [(tmp_path / "a.html").as_uri()]


def safe_now() -> list[int]:
    """Return in how many heads a guard protected each token at the last eviction."""
    last = len(usual().evictions)
    safe = (usual().protected_first > 0) & (usual().protected_first <= last) & (usual().protected_last >= last)
    return (safe & usual().held()).sum(0).tolist()
