"""No request holds more blocks than it was promised, and every block comes back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import LLM

from kvpolicy.adapters.vllm import Config, Reservation, Settings
from kvpolicy.adapters.vllm.progress import Progress, Request
from tests.vllm.engine import (
    BLOCK,
    CHUNK,
    answers,
    engine,
    managers,
    params,
    preempted,
    prompt_of,
    scheduler,
)

POLICY = "vase(64, interval=32, recent=16)"
DECODE = 3  # blocks of 96 slots


def soak(llm: LLM, requests: list[tuple[list[int], Any]], aborts: set[int], exact: bool) -> None:
    """Serve requests with aborts, and look at every request's blocks at every step."""
    core, (manager,), stopped = scheduler(llm), managers(llm), preempted(llm)
    pool, config = manager.block_pool, Config(POLICY)
    free, chunk = pool.get_num_free_blocks(), None if exact else CHUNK
    default = Reservation(slots=96, budget=64, block_size=BLOCK, chunk=chunk)
    for number, (tokens, asked) in enumerate(requests):
        llm.llm_engine.add_request(str(number), prompt_of(tokens), asked)
    steps = finished = 0
    while llm.llm_engine.has_unfinished_requests():
        finished += sum(one.finished for one in llm.llm_engine.step())
        steps += 1
        held = [block.block_id for blocks in manager.req_to_blocks.values() for block in blocks]
        assert len(held) == len(set(held))
        assert pool.get_num_free_blocks() == free - len(held)
        for request in core.running:
            blocks, decoded = len(manager.req_to_blocks[request.request_id]), request.num_output_tokens
            plan = Settings.of(config, request.sampling_params).plan
            if plan is None:  # it keeps everything, which is known behind its admission
                at_least = -(-request.num_computed_tokens // BLOCK)
                at_most = max(DECODE, -(-request.num_tokens // BLOCK))
            else:
                own = Reservation(plan.capacity, plan.budget, BLOCK, chunk)
                prompt = request.num_prompt_tokens
                at_least = own.decode
                at_most = own.decode if decoded > 2 else max(own.prefill(prompt), default.prefill(prompt))
            assert at_least <= blocks <= at_most, (request.request_id, decoded)
        going = [one.request_id for one in core.running]
        gone = [name for name in going if int(name.split("-")[0]) in aborts and steps % 7 == 0]
        if gone:
            llm.llm_engine.abort_request([name.split("-")[0] for name in gone])
            finished += len(gone)
    assert finished == len(requests)
    assert all(Settings.of(config, requests[int(name.split("-")[0])][1]).off for name in stopped)
    assert pool.get_num_free_blocks() == free
    assert not manager.req_to_blocks
    assert not manager.num_cached_block
    assert not manager._requests


def work(count: int, settings: list[Any]) -> list[tuple[list[int], Any]]:
    """Return requests of mixed lengths."""
    draw = random.Random(0)
    return [
        (
            [draw.randrange(512) for _ in range(draw.choice([1, 5, 31, 32, 33, 96, 97, 200, 257, 600]))],
            params(draw.choice([1, 2, 3, 33, 64, 120]), draw.choice(settings)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("prefill", ["exact", "bounded"])
def test_two_hundred_requests_with_aborts(folder: Path, prefill: str) -> None:
    llm = engine(folder, {"policy": POLICY, "prefill": prefill}, num_gpu_blocks_override=70, max_num_seqs=8)
    asked = [None, {"budget": 24}, {"policy": "knorm(90, interval=6, recent=8)"}, {"seed": 5}]
    count = 200 if prefill == "exact" else 60
    soak(llm, work(count, asked), set(range(0, count, 9)), prefill == "exact")


def test_requests_that_keep_everything_grow_beside_others(folder: Path) -> None:
    llm = engine(folder, {"policy": POLICY}, num_gpu_blocks_override=130, max_num_seqs=6)
    soak(llm, work(40, [None, "off"]), {3, 11}, exact=True)


def test_decoding_never_preempts(folder: Path) -> None:
    llm = engine(folder, {"policy": POLICY}, num_gpu_blocks_override=64 + 1, max_num_seqs=32)
    stopped = preempted(llm)
    answers(llm, [[i] * 40 for i in range(40)], params(150))
    assert not stopped


def test_what_a_prompt_needed_comes_back_behind_it(folder: Path) -> None:
    llm = engine(folder, {"policy": POLICY})
    (manager,) = managers(llm)
    llm.llm_engine.add_request("0", prompt_of([1] * 900), params(20))
    held = []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        held += [len(blocks) for blocks in manager.req_to_blocks.values()]
    chunks = -(-900 // CHUNK)
    assert held[:chunks] == [-(-900 // BLOCK)] * chunks
    assert held[chunks + 1 :] == [DECODE] * len(held[chunks + 1 :])


@given(
    prompt=st.integers(1, 700), budget=st.integers(20, 200), interval=st.integers(1, 80), output=st.integers(0, 300),
    again=st.integers(0, 300), block=st.sampled_from([16, 32, 128]), edge=st.sampled_from([0, 1, None]),
    exact=st.booleans(), data=st.data(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_worker_never_fills_more_slots_than_the_scheduler_gave(
    prompt: int, budget: int, interval: int, output: int, again: int, block: int, edge: int | None, exact: bool,
    data: st.DataObject,
) -> None:  # fmt: skip
    """Tokens that were decoded before a preemption are computed again behind the prompt, in chunks like it."""
    if edge is not None:  # the slots end with a block, or are one more than that
        interval += (edge - budget - interval) % block
    config = Config(f"Policy(KeyNorm() >> TopK({budget}), interval={interval}, recent=4)")
    plan, chunk, end = config.plan, 64, prompt + again
    promised = Reservation(plan.capacity, plan.budget, block, None if exact else chunk)
    progress = Progress.of(Request(0, prompt, Settings(*config.default, 0)))
    while progress.row.seen < end + output:
        left = end - progress.row.seen
        count = data.draw(st.integers(1, min(chunk, left))) if left > 0 else 1
        if progress.due():
            assert progress.over
            progress.row = progress.row.evicted(plan.budget, plan.recent)
        blocks = promised.prefill(end) if left > 0 else promised.decode
        assert progress.row.length + count <= blocks * block
        progress.advance(count, exact=exact)


@given(
    slots=st.integers(1, 4096), less=st.integers(0, 4096), block=st.sampled_from([16, 32, 128]),
    chunk=st.none() | st.integers(1, 8192), tokens=st.integers(1, 100_000),
)  # fmt: skip
def test_what_is_promised(slots: int, less: int, block: int, chunk: int | None, tokens: int) -> None:
    budget = max(1, slots - less)
    promised = Reservation(slots, budget, block, chunk)
    held = promised.prefill(tokens)
    assert slots <= promised.decode * block < slots + block
    assert held >= promised.decode
    assert promised.prefill(tokens + 1) >= held
    if chunk is None:
        assert held * block >= tokens
    else:  # however long the prompt
        assert held * block >= min(tokens, budget + chunk)
        assert held * block < max(slots, budget + chunk) + block
