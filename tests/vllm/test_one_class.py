"""An engine follows a policy in one class, known by its name, as one of stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.one_class import register
from tests.vllm.engine import answers, engine, params

PROMPTS = [[(i * k) % 512 for i in range(n)] for k, n in ((3, 50), (5, 300))]
SIZES = "64, interval=32, recent=16"


def test_an_engine_and_a_request_follow_one_class(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    llm = engine(folder, f"short_keys({SIZES})")
    of_stages = answers(llm, PROMPTS, params(100, f"knorm({SIZES})"))
    assert answers(llm, PROMPTS, params(100)) == of_stages
    assert answers(llm, PROMPTS, params(100, "off")) != of_stages
    smaller = answers(llm, PROMPTS, params(100, {"budget": 40}))
    assert smaller == answers(llm, PROMPTS, params(100, "knorm(40, interval=32, recent=16)"))
