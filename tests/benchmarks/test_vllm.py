"""What vLLM's benchmark counts, what its load generator sends and times, and its page."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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


# The load generator


class Server(ThreadingHTTPServer):
    """Answer as a server of the OpenAI API, but for requests whose first token is in ``broken``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.broken: set[int] = set()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "a model"}]}).encode())

    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        if asked["prompt"][0] in self.server.broken:
            self._send(b"out of order", 500)
            return
        pieces = [{"choices": [{"text": "a"}]}] * asked["max_tokens"]
        usage = {"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}}
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in (*pieces, usage)]
        self._send("".join([*lines, "data: [DONE]\n\n"]).encode())

    def _send(self, answer: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("aiohttp", reason="vLLM brings aiohttp: make test-vllm")
    with Server() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def _load(server: Server, path: Path) -> tuple[int, dict[str, Any]]:
    url = f"http://127.0.0.1:{server.server_port}"
    sizes = ["--clients", "2", "--requests", "5", "--prompt", "7", "--output", "3"]
    status = serve.main(["--url", url, *sizes, "--json", str(path)])
    return status, json.loads(path.read_text("utf-8"))["found"]


def test_every_request_is_answered_once(server: Server, tmp_path: Path) -> None:
    status, found = _load(server, tmp_path / "found.json")
    assert (status, found["answers"], found["failures"]) == (0, 5, 0)
    assert found["tokens per second"] > 0
    prompts = [asked["prompt"] for asked in server.asked]
    assert len(prompts) == 5
    assert all(len(prompt) == 7 for prompt in prompts)
    assert len({prompt[0] for prompt in prompts}) == 5  # nothing for a prefix cache


def test_failures_are_counted_and_told_by_the_status(server: Server, tmp_path: Path) -> None:
    server.broken = {101, 103}
    status, found = _load(server, tmp_path / "found.json")
    assert (status, found["answers"], found["failures"]) == (1, 3, 2)
    assert found["first failure"] == "500: out of order"


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
