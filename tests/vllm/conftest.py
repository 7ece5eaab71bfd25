"""Where vLLM is missing, no file here is imported, and each is shown as skipped."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

MISSING = find_spec("vllm") is None


class Unread(pytest.Module):
    """A test file that is not imported."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return Unread.from_parent(parent, path=module_path) if MISSING else None


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.vllm)
