"""The pages of the zoo say what the recipes say."""

from __future__ import annotations

import inspect

import pytest

from kvpolicy import Policy, docstrings, policies
from tests.docs import zoo_pages
from tests.docs.pages import ROOT
from tests.docs.test_docs import README, signature

#: How a page calls a method that wants more than a budget.
CALLS = {"duo_attention": "duo_attention(1024, ((True, False),))"}


def test_nothing_is_stale() -> None:
    stale = [file.name for file, text in zoo_pages.pages().items() if file.read_text("utf-8") != text]
    assert not stale, f"{stale} in docs/zoo: python -m tests.docs.zoo_pages"


def test_the_table_is_made_anew() -> None:
    page = zoo_pages.INDEX.read_text("utf-8")
    assert "| `vase` | [2606.03928](https://arxiv.org/abs/2606.03928) | prefill, decode |" in page
    assert zoo_pages.index(page.replace("| prefill, decode |", "| never |")) == page


@pytest.mark.parametrize("recipe", policies.__all__)
def test_every_method_has_its_page(recipe: str) -> None:
    function = getattr(policies, recipe)
    page = zoo_pages.page_of(recipe).read_text("utf-8")
    assert f"`{recipe}{signature(function)}`" in page
    assert f"`{Policy.parse(CALLS.get(recipe, f'{recipe}(1024)'))!r}`" in page
    assert f"](pictures/{recipe}.png)" in page
    assert (zoo_pages.FOLDER / "pictures" / f"{recipe}.png").exists()
    assert f"(docs/zoo/{recipe}.md)" in README.read_text("utf-8")
    assert f"zoo/{recipe}.md\n" in (ROOT / "mkdocs.yml").read_text("utf-8")

    parts = advice(page)
    assert all(20 < len(part.split()) < 130 for part in parts)
    assert "](http" in parts[1] or "there is no paper" in parts[1]

    papers = docstrings.links(inspect.getdoc(function) or "")
    assert papers
    assert not [paper for paper in papers if paper not in page]


def test_a_page_that_says_not_when_it_helps_is_found() -> None:
    page = zoo_pages.page_of("vase").read_text("utf-8")
    helps, reports = advice(page)
    for part in (helps, reports):
        with pytest.raises(AssertionError, match="before its arguments"):
            advice(page.replace(f"{part}\n\n", ""))
    with pytest.raises(AssertionError, match="before its arguments"):
        advice(page.replace(f"{helps}\n\n{reports}", f"{reports}\n\n{helps}"))


def advice(page: str) -> list[str]:
    """Return the two paragraphs of a page that say when a method helps, and what its paper reports."""
    *_, helps, reports, last = page.split("\n\n")
    begins = [("When it helps: ", helps), ("What its paper reports: ", reports), ("Arguments and errors: ", last)]
    missing = [begin for begin, part in begins if not part.startswith(begin)]
    assert not missing, f"{missing}: write these paragraphs at the end of {page.splitlines()[0]}, before its arguments"
    return [helps, reports]
