"""Write what pages of the zoo state of the code: ``python -m tests.docs.zoo_pages``."""

from __future__ import annotations

import re
from pathlib import Path

from kvpolicy import catalog
from kvpolicy.catalog import PolicyFacts
from kvpolicy.cli import listing
from kvpolicy.evaluation.table import grid
from kvpolicy.testing import CHECKS
from tests.docs.pages import ROOT

FOLDER = ROOT / "docs" / "zoo"
INDEX = FOLDER / "index.md"
#: Where methods are compared with programs written from their formulas.
COMPARED = [*sorted((ROOT / "tests").glob("policies/test_golden*.py")), ROOT / "tests/core/test_published_vase.py"]


def facts() -> dict[str, PolicyFacts]:
    """Return what every method of the zoo is, by name."""
    return {one.name: one for one in catalog.policies() if one.package == "kvpolicy"}


def index(page: str) -> str:
    """Return the page of all methods with its table made anew."""
    rows = []
    for name, one in facts().items():
        _, *others, _ = listing.policy_row(one, link=True)
        rows.append((f"[{title(name)}]({name}.md)", f"`{name}`", *others))
    head = ("method", *listing.POLICY_HEAD[:-1])
    return replaced(page, "policies", listing.markdown(head, rows))


def method(page: str, one: PolicyFacts) -> str:
    """Return the page of a method with its facts made anew."""
    sources = " ".join(f"[{shown(url)}]({url})" for url in one.sources) or "none"
    rows = [
        ["sources", sources],
        ["phase", one.phase or "–"],
        ["needs", one.needs_in_words],
        ["compared with", compared(one.name)],
        ["measured here", measured(one.name)],
        ["invariants", f"all {len(CHECKS)} of [`kvpolicy.testing`](../api/testing.md), `tests/testing/test_zoo.py`"],
    ]
    return replaced(page, "facts", grid(["", f"`{one.name}`"], rows, [True, True]))


def compared(name: str) -> str:
    """Return which test holds a method to its formula, written out a second time."""
    uses = re.compile(rf"\b{name}\(")
    found = [file.relative_to(ROOT).as_posix() for file in COMPARED if uses.search(file.read_text("utf-8"))]
    assert found, f"no test compares {name} with its formula"
    return "its formula written out in loops, " + ", ".join(f"`{file}`" for file in found)


def measured(name: str) -> str:
    """Return how far a method was from the full cache on running text, as the page of results has it."""
    page = (ROOT / "docs/results.md").read_text("utf-8")
    label = re.search(rf"^- ([^:`]+): `{name}\(b\b(?!, redraw)", page, re.MULTILINE)
    if label is None:
        return "not yet; `kvpolicy eval` does it"
    blocks = re.findall(r"<!-- results: (\S+) wikitext.*?-->(.*?)<!-- end -->", page, re.DOTALL)
    found = []
    for model, block in blocks:
        row = re.search(rf"^\| {re.escape(label[1])} \| 128 \| \d+ \| ([\d.]+) ", block, re.MULTILINE)
        assert row, f"docs/results.md has no row of {label[1]} on {model}"
        found.append(f"{row[1]} ({model})")
    kl = f"KL to the full cache at 128 slots, nats: {', '.join(found)}"
    return f"{kl}{_answered(label[1], page)}; see [Results](../results.md)"


def _answered(label: str, page: str) -> str:
    """Return how many answers were right under a method, where that was measured."""
    table = re.search(r"<!-- results: (\S+) svamp.*?-->(.*?)<!-- end -->", page, re.DOTALL)
    row = table and re.search(rf"^\| {re.escape(label)} \| (\d+) \| \d+ \| ([\d.]+) ", table[2], re.MULTILINE)
    return f"; elementary questions right at {row[1]} slots, %: {row[2]} ({table[1]})" if table and row else ""


def shown(url: str) -> str:
    """Return how a source is named."""
    return re.sub(r"^https?://(arxiv\.org/abs/)?(github\.com/)?", "", url)


def title(name: str) -> str:
    """Return what the page of a method is called."""
    return page_of(name).read_text("utf-8").splitlines()[0].removeprefix("# ")


def page_of(name: str) -> Path:
    """Return the page of a method."""
    return FOLDER / f"{name}.md"


def replaced(page: str, name: str, text: str) -> str:
    """Return a page with what stands between two marks made anew."""
    block = re.compile(rf"(?<=<!-- generated: {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
    assert block.search(page), f"there are no marks <!-- generated: {name} --> and <!-- end -->"
    return block.sub(lambda _: f"\n{text}\n\n", page, count=1)


def pages() -> dict[Path, str]:
    """Return every page of the zoo as it should be."""
    made = {page_of(name): method(page_of(name).read_text("utf-8"), one) for name, one in facts().items()}
    return made | {INDEX: index(INDEX.read_text("utf-8"))}


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, "utf-8")
