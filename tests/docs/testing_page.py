"""Write the table of docs/api/testing.md from the checks themselves: ``python -m tests.docs.testing_page``."""

from __future__ import annotations

import inspect
import re

from kvpolicy.cli import listing
from kvpolicy.testing import CHECKS
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "api" / "testing.md"
BLOCK = re.compile(r"(?<=<!-- generated: checks -->\n).*?(?=<!-- end -->)", re.DOTALL)


def render(page: str) -> str:
    """Return the page with its table made anew."""
    found = BLOCK.search(page)
    assert found is not None, f"{PAGE} has no marks for the table"
    table = listing.markdown(("Check", "It asserts that"), [(f"`{name}`", said(name)) for name in CHECKS])
    return f"{page[: found.start()]}\n{table}\n{page[found.end() :]}"


def said(name: str) -> str:
    """Return what a check's docstring says, in one line, without ``Check that``."""
    text = " ".join((inspect.getdoc(CHECKS[name]) or "").split())
    start = "Check that "
    assert text.startswith(start), f"{name}: a check's docstring begins with {start!r}"
    return text.removeprefix(start).replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text("utf-8")), "utf-8")
