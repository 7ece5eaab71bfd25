"""The page of models says what the models do."""

from __future__ import annotations

from tests.docs.models_page import PAGE, render
from tests.docs.pages import ROOT


def test_the_tables_are_not_stale() -> None:
    page = PAGE.read_text("utf-8")
    assert render(page) == page, "docs/models.md is stale: python -m tests.docs.models_page"


def test_the_tests_that_it_names_exist() -> None:
    import re

    named = set(re.findall(r"`(test_\w+\.py)`", PAGE.read_text("utf-8")))
    assert len(named) >= 6
    assert named <= {path.name for path in (ROOT / "tests" / "hf").glob("test_*.py")}
