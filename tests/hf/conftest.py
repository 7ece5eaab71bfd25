from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version

from kvpolicy.adapters.hf.compat import VERSION
from tests.families import KINDS

#: Families that ``DynamicCache`` holds only since a version of transformers, and where their cache was before.
SINCE = {"qwen3_next": ("5.5", "keeps its cache in a class of its own")}

#: Those, and families that work before, but not in float64, in which the tests compare.
SKIPPED = {**SINCE, "deepseek_v3": ("5.16", "caches expanded keys, and its experts know no float64")}

#: What other versions of transformers run, too: one family of each kind of cache, two policies (one asks queries at
#: its evictions, one asks every query), and the files that ask transformers for something.
FEW = {"vase", "h2o"}
FILES = {
    *("test_versions", "test_stock", "test_oracle", "test_batches", "test_use", "test_drafts", "test_chunks"),
    *("test_replay", "test_rows", "test_copies", "test_compile", "test_combinations"),
}


def parameter(item: Any, name: str) -> Any:
    return item.callspec.params.get(name) if hasattr(item, "callspec") else None


def pytest_itemcollected(item: pytest.Item) -> None:
    dear = any(item.get_closest_marker(name) for name in ("model", "slow", "gpu"))
    plain = parameter(item, "name") in {None, *FEW} and parameter(item, "family") in {None, *KINDS}
    if not dear and plain and item.path.stem in FILES:
        item.add_marker(pytest.mark.versions)


@pytest.fixture(autouse=True)
def known_family(request: pytest.FixtureRequest) -> None:
    family = parameter(request.node, "family")
    since, why = SKIPPED.get(family, ("0", ""))
    if Version(VERSION) < Version(since):
        pytest.skip(f"{family}: transformers {VERSION}, before {since}, {why}")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
