"""The numbers of the first page are those of the results."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT

#: The columns of the first page.
MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")
NAMES = {"random, prompt protected": "random + prompt", "evicting the largest values": "evict largest values"}


def test_the_first_page_says_what_was_measured() -> None:
    results = (ROOT / "docs/results.md").read_text("utf-8")
    rows = re.findall(r"^\| \[?([\w ,-]+?)\]?(?:\([^)]+\))? \| ([\d.]+) \| ([\d.]+) \|$",
                      (ROOT / "docs/index.md").read_text("utf-8"), re.MULTILINE)  # fmt: skip
    assert len(rows) == 8
    for model, column in zip(MODELS, (1, 2), strict=True):
        found = re.search(rf"<!-- results: {re.escape(model)} wikitext.*?<!-- end -->", results, re.DOTALL)
        assert found, model
        for row in rows:
            name = NAMES.get(row[0], row[0])
            kl = re.search(rf"^\| {re.escape(name)} \| 128 \| 32 \| ([\d.]+) ", found[0], re.MULTILINE)
            assert kl, name
            assert f"{float(kl[1]):.3f}" == row[column], name
