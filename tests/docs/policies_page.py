"""Write the table of docs/policies.md from the recipes themselves: ``python -m tests.docs.policies_page``."""

from __future__ import annotations

import re

from kvpolicy import catalog
from kvpolicy.catalog import PolicyFacts
from kvpolicy.cli import listing
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "policies.md"
BLOCK = re.compile(r"(?<=<!-- generated: policies -->\n).*?(?=<!-- end -->)", re.DOTALL)


def render(page: str) -> str:
    """Return the page with its table made anew; a name leads to its entry, where the page has one."""
    rows = [_row(one, page) for one in catalog.policies() if one.package == "kvpolicy"]
    table = listing.markdown(listing.POLICY_HEAD[:-1], rows)
    found = BLOCK.search(page)
    assert found is not None, f"{PAGE} has no marks for the table"
    return f"{page[: found.start()]}\n{table}\n{page[found.end() :]}"


def _row(one: PolicyFacts, page: str) -> tuple[str, ...]:
    name, *others, _ = listing.policy_row(one, link=True)
    return f"[{name}](#{name})" if f"{{ #{name} }}" in page else name, *others


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text("utf-8")), "utf-8")
