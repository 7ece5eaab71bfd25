"""What vLLM's benchmark counts and times, and its page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.vllm import serve
from benchmarks.vllm.__main__ import ON_CPU, ON_GPU, QUICK
from benchmarks.vllm.engine import FULL, Run, Step
from benchmarks.vllm.page import PAGE, filled
from benchmarks.vllm.sections import ample, bound, eviction
from benchmarks.vllm.serve import Answer
from benchmarks.vllm.sizes import Sizes


@pytest.mark.parametrize("sizes", [ON_CPU, ON_GPU, QUICK])
def test_a_quarter_of_the_blocks_is_what_all_requests_need_under_the_policy(sizes: Sizes) -> None:
    slots = sizes.budget + sizes.interval
    assert sizes.blocks(0.25) - 1 == sizes.requests * -(-slots // sizes.block)
    assert sizes.context >= 4 * sizes.budget


def _runs(full: float, evicting: float) -> dict[str, list[Run]]:
    plain = [Step(full, 2, 2, 0, 0)] * 4
    shorter = [Step(evicting, 4, 4, 0, 0), Step(evicting + 0.5, 4, 4, 2, 0)]
    return {FULL: [Run(plain, preemptions=1)], "policy": [Run(shorter, compaction=0.4)]}


def test_targets_compare_the_full_cache_with_the_policy() -> None:
    section = bound(_runs(1.0, 0.75), QUICK, 9)
    assert [target.value for target in section.targets] == [0.5, 0.5]
    rows = [dict(zip(section.columns, row, strict=True)) for row in section.rows]
    assert [row["in flight, ratio"] for row in rows] == [1.0, 2.0]
    assert [row["preemptions"] for row in rows] == [1, 0]


def test_a_policy_that_is_slower_misses_the_target_of_ample_memory() -> None:
    assert [target.holds for target in ample(_runs(1.0, 1.7), QUICK, 9).targets] == [True]
    assert [target.holds for target in ample(_runs(1.0, 1.9), QUICK, 9).targets] == [False]


def test_an_eviction_is_what_a_step_takes_beyond_one_that_decodes() -> None:
    section = eviction(_runs(1.0, 0.75), QUICK)
    row = dict(zip(section.columns, section.rows[1], strict=True))
    assert (row["a step that decodes"], row["evictions add"], row["each request"]) == (750.0, 500.0, 250.0)
    assert row["by kvpolicy's counter"] == pytest.approx(200.0)


def test_a_step_that_reads_prompts_is_none_that_decodes() -> None:
    run = Run([Step(9.0, 4, 4, 0, 4), Step(1.0, 4, 4, 0, 0), Step(0.5, 1, 1, 0, 0)])
    assert run.decoding == [1.0]


def test_times_are_to_the_first_token_and_between_tokens() -> None:
    answer = Answer(1.0, [1.5, 1.6, 1.8], 3)
    found = serve.summary([answer, replace(answer, error="lost")], 2.0)
    assert (found["answers"], found["failures"], found["tokens per second"]) == (1, 1, 1.5)
    assert found["first token, p50"] == pytest.approx(500)
    assert found["between tokens, p50"] == pytest.approx(150)
    assert found["between tokens, p95"] == pytest.approx(195)


def test_the_page_says_what_was_measured_or_that_nothing_was() -> None:
    page = PAGE.read_text("utf-8")
    assert page == filled(page), "run python -m benchmarks.vllm.page"
