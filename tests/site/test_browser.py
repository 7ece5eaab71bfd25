"""The built site in Chromium: pages without console errors, search, a method's picture, both colour schemes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.browser import Browser, chromium

#: Ten pages of every kind.
PAGES = (
    "",
    "ten-minutes/",
    "concepts/",
    "compose/",
    "write-a-policy/",
    "zoo/",
    "zoo/vase/",
    "transformers/",
    "results/",
    "api/stages/",
)
#: Where pictures of the pages are left for somebody to look at; made anew by each run.
PICTURES = Path(__file__).resolve().parents[2] / "site" / "screenshots"

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium: apt install chromium, or KVPOLICY_CHROMIUM")


def test_pages_open_without_an_error_and_searching_finds(site: str) -> None:
    PICTURES.mkdir(exist_ok=True)
    with Browser.start() as browser:
        for at, where in enumerate(PAGES):
            page = browser.open(f"{site}/{where}", dark=at % 2 == 1)
            page.wait_for("document.querySelector('h1')")
            broken = "[...document.images].filter((one) => one.complete && !one.naturalWidth).map((one) => one.src)"
            assert page.value(broken) == []
            page.screenshot(PICTURES / f"{where.strip('/').replace('/', '-') or 'home'}.png")
            assert page.errors == [], where
            assert all(one.startswith((site, "data:", "blob:")) for one in page.requests), page.requests

        page = browser.open(f"{site}/")
        page.wait_for("document.querySelector('h1')")
        page.focus("input.md-search__input")
        page.value("document.querySelector('input.md-search__input').value = 'reservoir'")
        page.value(
            "document.querySelector('input.md-search__input').dispatchEvent(new Event('keyup', {bubbles: true}))"
        )
        page.wait_for("document.querySelectorAll('.md-search-result__item').length > 0")
        assert page.errors == []
