"""Write the tables of docs/models.md from what tiny models do: ``python -m tests.docs.models_page``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from kvpolicy import UnsupportedError
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.receipt import Receipt
from tests.docs.pages import ROOT
from tests.families import FAMILIES
from tests.hf.test_oracle import cases
from tests.hf.test_refusals import REFUSED
from tests.hf.zoo import zoo
from tests.models import tiny
from tests.vision import VISION, prompt, seeing

PAGE = ROOT / "docs" / "models.md"
_KINDS = {"SlidingWindow": "sliding window", "Linear": "linear or convolution", "Dummy": "no attention"}


def tables() -> dict[str, str]:
    """Return each table of the page by its name."""
    return {
        "families": _table(("family", "class", "evict", "left alone", "policies", "notes"), families()),
        "vision": _table(("family", "class", "evict", "left alone", "notes"), vision()),
        "refused": _table(("class", "why", "what the error says"), refused()),
    }


def render(page: str) -> str:
    """Return the page with its tables made anew."""
    for name, table in tables().items():
        marks = re.compile(rf"(?<=<!-- begin {name} -->\n).*(?=<!-- end {name} -->)", re.DOTALL)
        found = marks.search(page)
        assert found is not None, f"{PAGE} has no marks for the table {name}"
        page = f"{page[: found.start()]}\n{table}\n{page[found.end() :]}"
    return page


def families() -> Iterator[tuple[str, ...]]:
    """Yield a line for each family, from a receipt of its tiny model."""
    compared = [family for family, _ in cases()]
    for name, family in FAMILIES.items():
        receipt = _receipt(tiny(name), {"input_ids": torch.arange(2, 42)[None]})
        precision = "" if family.dtype == torch.float64 else f" ({str(family.dtype).removeprefix('torch.')})"
        known = (f"{compared.count(name)}{precision}", family.notes)
        yield (name, f"`{family.model}`", *_layers(receipt), *known)


def vision() -> Iterator[tuple[str, ...]]:
    """Yield a line for each model that reads images."""
    for name in VISION:
        model = seeing(name)
        inputs = prompt(name, model, [9], 20)
        notes = "tokens of an image see each other" if "token_type_ids" in inputs else ""
        yield (name, f"`{type(model).__name__}`", *_layers(_receipt(model, inputs)), notes)


def refused() -> Iterator[tuple[str, ...]]:
    """Yield a line for each model that cannot be bound."""
    for one in REFUSED:
        try:
            EvictionCache(one.make(), zoo(24)["vase"])
        except UnsupportedError as error:
            yield f"`{one.model}`", one.why, str(error)
        else:
            raise AssertionError(f"{one.model} can be bound")


def _receipt(model: Any, inputs: dict[str, Any]) -> Receipt:
    with torch.no_grad(), EvictionCache(model, zoo(24)["vase"]) as cache:
        model.generate(**inputs, max_new_tokens=10, do_sample=False, past_key_values=cache)
        receipt = cache.receipt()
    assert min(receipt.evictions) == 2
    return receipt


def _layers(receipt: Receipt) -> tuple[str, str]:
    """Return which layers evict and which are left alone, in words."""
    total = len(receipt.layers) + len(receipt.skipped)
    evict = "all" if not receipt.skipped else f"full attention ({len(receipt.layers)} of {total} here)"
    kinds = {word for kind in receipt.skipped.values() for part, word in _KINDS.items() if part in kind}
    return evict, ", ".join(sorted(kinds))


def _table(head: tuple[str, ...], lines: Iterator[tuple[str, ...]]) -> str:
    rows = [head, ("---",) * len(head), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text("utf-8")), "utf-8")
