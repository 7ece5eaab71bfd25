"""docs/flash-attention.md has the table of backends that the code has."""

from __future__ import annotations

from kvpolicy.adapters.flash_attn.backends import markdown_rows
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs/flash-attention.md").read_text("utf-8")


def test_the_table_of_backends_is_the_codes_own() -> None:
    assert "\n".join(["", *markdown_rows(), ""]) in PAGE
