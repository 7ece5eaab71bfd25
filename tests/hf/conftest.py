from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version

from kvpolicy.adapters.hf.compat import VERSION

#: Families that ``DynamicCache`` holds only since a version of transformers, and where their cache was before.
SINCE = {"qwen3_next": ("5.5", "keeps its cache in a class of its own")}

#: The policies that other versions of transformers run, too: one asks queries at its evictions, one asks every query.
FEW = {"vase", "h2o"}


def parameter(item: Any, name: str) -> Any:
    return item.callspec.params.get(name) if hasattr(item, "callspec") else None


def pytest_itemcollected(item: pytest.Item) -> None:
    dear = any(item.get_closest_marker(name) for name in ("model", "slow", "gpu"))
    if not dear and parameter(item, "name") in {None, *FEW}:
        item.add_marker(pytest.mark.versions)


@pytest.fixture(autouse=True)
def known_family(request: pytest.FixtureRequest) -> None:
    family = parameter(request.node, "family")
    since, why = SINCE.get(family, ("0", ""))
    if Version(VERSION) < Version(since):
        pytest.skip(f"{family}: transformers {VERSION}, before {since}, {why}")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
