"""The page of the conformance kit says what the checks say, and has an entry for everything public."""

from __future__ import annotations

import pytest

from kvpolicy import testing
from tests.docs.testing_page import PAGE, render

TEXT = PAGE.read_text("utf-8")


def test_the_table_is_not_stale() -> None:
    assert render(TEXT) == TEXT, "docs/api/testing.md is stale: python -m tests.docs.testing_page"
    stale = TEXT.replace("no free slot is kept", "anything is kept")
    assert render(stale) == TEXT != stale


@pytest.mark.parametrize("name", testing.__all__)
def test_everything_public_has_an_entry(name: str) -> None:
    assert f"::: kvpolicy.testing.{name}\n" in TEXT or f"\n`{name}` " in TEXT
