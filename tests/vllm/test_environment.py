"""The vLLM that is installed here is one that the adapter is tested on, and serves while kvpolicy is not asked for."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest
import vllm
from packaging.version import Version

from kvpolicy.adapters.vllm.plugin import TESTED
from tests.vllm.engine import answers, engine, params


def test_version_is_one_of_those_tested() -> None:
    assert Version(vllm.__version__).public in TESTED


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.logits_processors"])
def test_vllm_is_told_of_kvpolicy(group: str) -> None:
    assert "kvpolicy" in entry_points(group=group).names


def test_vllm_generates_where_no_policy_is_asked_for(folder: Path) -> None:
    (answer,) = answers(engine(folder), [[1, 2, 3, 4, 5]], params(4))
    assert len(answer) == 4
