"""vLLM's OpenAI server under load: clients that leave, settings over HTTP, counters, and servers that are killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvpolicy.adapters.vllm import account
from tests.models import sharpen
from tests.vllm.runner import environment

pytestmark = pytest.mark.vllm

POLICY = "vase(64, interval=32, recent=8)"
WORDS, TOKENS = 192, 60
LENGTHS = [9, 64, 150, 300] * 4
PROMPTS = [[(7 * n + 13 * i) % (WORDS - 2) + 2 for i in range(length)] for n, length in enumerate(LENGTHS)]
LEAVING = range(2, 16, 3)  # a third of the clients


class Server:
    """One server at a time, started when it is needed."""

    def __init__(self, model: Path, temporary: Path) -> None:
        self._model, self.temporary, self.log = model, temporary, model / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.board: Path | None = None  #: where its workers say what they follow and count

    def run(self) -> Server:
        if self._process is not None:
            return self
        known = set(self.temporary.iterdir())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self._model)),
            *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"),
            *("--additional-config", json.dumps({"kvpolicy": {"policy": POLICY}})),
        ]
        # Sockets have short names: they stay where they are. What is ours can be seen in a folder of its own.
        env = environment(
            VLLM_ENABLE_V1_MULTIPROCESSING="1", TMPDIR=str(self.temporary), VLLM_RPC_BASE_PATH=tempfile.gettempdir()
        )
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while True:
            try:
                if self.get("/health")[0] == 200:
                    (self.board,) = {path for path in self.temporary.glob("kvpolicy-*") if path not in known}
                    return self
            except OSError:
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.end(signal.SIGKILL)
                pytest.fail(f"the server has not started: {self.log.read_text()[-4000:]}")
            time.sleep(0.2)

    def end(self, how: signal.Signals) -> int | None:
        """Send a signal to the server, not to what it started; return its exit code. Then nothing of it is left."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        process.send_signal(how)
        try:
            return process.wait(60)
        finally:
            time.sleep(0.5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whoever has outlived it

    def get(self, path: str) -> tuple[int, str]:
        return self._ask("GET", path, None)

    def post(self, **body: Any) -> tuple[int, Any]:
        status, text = self._ask("POST", "/v1/completions", _body(**body))
        return status, json.loads(text)

    def _ask(self, method: str, path: str, body: str | None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def stream(self, *, leave: int | None = None, **body: Any) -> tuple[list[int], bool]:
        """Return the tokens that came, and whether the answer was whole; leave after ``leave`` tokens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        found: list[int] = []
        try:
            connection.request(
                "POST", "/v1/completions", _body(stream=True, **body), {"Content-Type": "application/json"}
            )
            for line in connection.getresponse():
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    return found, True
                if data:
                    event = json.loads(data)
                    if "error" in event:
                        return found, False
                    found += event["choices"][0]["token_ids"] or []
                if leave is not None and len(found) >= leave:
                    return found, False
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        return found, False

    def counters(self) -> dict[str, float]:
        text = self.get("/metrics")[1]
        return {
            name.removesuffix("_total"): float(value)
            for name, value in re.findall(r'^vllm:kvpolicy_(\w+)\{engine="0"\} (\S+)$', text, re.MULTILINE)
        }

    def running(self) -> float:
        (found,) = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return float(found)


def _body(**given: Any) -> str:
    return json.dumps(
        {"model": "tiny", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **given}
    )


def answers(server: Server, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return the answers, one after another."""
    found = []
    for prompt in prompts:
        status, answer = server.post(prompt=prompt)
        assert status == 200, answer
        found.append(answer["choices"][0]["token_ids"])
    return found


def save(path: Path) -> None:
    """Save a tiny model of random weights, and a tokenizer of as many words."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    sharpen(LlamaForCausalLM(config)).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", unk_token="w0").save_pretrained(path)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("server")
    save(path)
    server = Server(path, tmp_path_factory.mktemp("boards"))
    yield server
    server.end(signal.SIGTERM)


@pytest.fixture
def server(held: Server) -> Server:
    return held.run()


@pytest.fixture(scope="module")
def alone(held: Server) -> list[list[int]]:
    return answers(held.run(), PROMPTS)


def test_counters_are_what_the_lengths_say(server: Server) -> None:
    before = server.counters()
    assert len(answers(server, [PROMPTS[3]])[0]) == TOKENS
    after = server.counters()
    expected = account(POLICY, prompt=len(PROMPTS[3]), output=TOKENS)
    assert after["evictions"] - before.get("evictions", 0) == expected.evictions > 1
    assert after["evicted_tokens"] - before.get("evicted_tokens", 0) == expected.evicted
    assert after["slots_in_use"] == expected.slots
    assert 0 < after["compaction_seconds"] - before.get("compaction_seconds", 0) < 10
    assert after["recomputed_requests"] == 0


def test_clients_that_leave_change_nothing_for_those_that_stay(server: Server, alone: list[list[int]]) -> None:
    before = server.counters()["evictions"]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        clients = [
            pool.submit(server.stream, prompt=prompt, leave=5 + n if n in LEAVING else None)
            for n, prompt in enumerate(PROMPTS)
        ]
        found = [client.result(90) for client in clients]
    for n, (tokens, whole) in enumerate(found):
        assert whole == (n not in LEAVING), n
        assert tokens == alone[n][: len(tokens)], n
        assert len(tokens) == TOKENS if whole else 5 + n <= len(tokens) < TOKENS, n
    deadline = time.monotonic() + 10
    while server.running() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.running() == 0, "a request whose client left goes on"
    assert server.counters()["evictions"] > before
    assert answers(server, PROMPTS[:4]) == alone[:4]


def test_settings_as_json_text(server: Server, alone: list[list[int]]) -> None:
    before = server.counters()["evicted_tokens"]
    text = json.dumps({"budget": 48, "seed": 5})
    status, answer = server.post(prompt=PROMPTS[3], vllm_xargs={"kvpolicy": text})
    assert status == 200, answer
    expected = account(POLICY.replace("64", "48"), prompt=len(PROMPTS[3]), output=TOKENS)
    assert server.counters()["evicted_tokens"] - before == expected.evicted
    assert answer["choices"][0]["token_ids"] != alone[3]


def test_off(server: Server) -> None:
    before = server.counters()["evictions"]
    status, answer = server.post(prompt=PROMPTS[3], vllm_xargs={"kvpolicy": "off"})
    assert status == 200, answer
    assert server.counters()["evictions"] == before


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ('{"budget": 96}', "sets 96 aside for each request"),
        ('{"budgte": 48}', "'budgte' (did you mean 'budget'?)"),
        ('{"policy": "Nonsense() >> TopK(8)"}', "Nonsense"),
        ('{"policy": "snapkv(48)"}', "write an interval"),
        ("[" * 100_000, "cannot read"),
        ("on", "'on' is not known"),
        ("", 'write "off"'),
        (0, 'write "off"'),
        ([], 'write "off"'),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_stops(asked: Any, message: str, server: Server) -> None:
    status, answer = server.post(prompt=PROMPTS[0], vllm_xargs={"kvpolicy": asked})
    assert status == 400, answer
    assert message in answer["error"]["message"]
    assert server.post(prompt=PROMPTS[0], max_tokens=2)[0] == 200


def test_vllm_takes_no_objects_in_vllm_xargs(server: Server) -> None:
    """Which is why the settings are accepted as text, too."""
    assert server.post(prompt=PROMPTS[0], vllm_xargs={"kvpolicy": {"budget": 48}})[0] == 400


def test_killed_with_requests_in_flight_and_started_again(server: Server, alone: list[list[int]]) -> None:
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(server.stream, prompt=prompt, max_tokens=200) for prompt in PROMPTS[:8]]
        deadline = time.monotonic() + 20
        while server.running() < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        server.end(signal.SIGKILL)
        found = [client.result(60) for client in clients]
    assert not all(whole for _, whole in found), "all had their answers before"
    for n, (tokens, _) in enumerate(found):
        assert tokens[:TOKENS] == alone[n][: len(tokens)], n
    assert answers(server.run(), PROMPTS[:4]) == alone[:4]


def test_a_server_that_is_told_to_end_leaves_nothing(server: Server, alone: list[list[int]]) -> None:
    """It is idle: stock vLLM 0.32 may hang where requests are in flight."""
    assert server.board is not None
    assert server.board.is_dir()
    assert server.end(signal.SIGTERM) == 0
    assert not server.board.exists()
    assert server.stream(prompt=PROMPTS[0]) == ([], False)
    assert answers(server.run(), PROMPTS[:4]) == alone[:4]
