"""The page of policies says what the recipes say."""

from __future__ import annotations

from tests.docs.policies_page import PAGE, render


def test_the_table_is_not_stale() -> None:
    page = PAGE.read_text("utf-8")
    assert render(page) == page, "docs/policies.md is stale: python -m tests.docs.policies_page"


def test_the_table_is_made_anew() -> None:
    page = PAGE.read_text("utf-8")
    assert "| [vase](#vase) | [2606.03928](https://arxiv.org/abs/2606.03928) | prefill, decode |" in page
    assert render(page.replace("| prefill, decode |", "| never |")) == page
    assert "| vase |" in render(page.replace("{ #vase }", ""))
