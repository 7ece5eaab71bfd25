"""What the load generator for a server of vLLM sends, and what it counts; aiohttp comes with vLLM."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm import serve


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
