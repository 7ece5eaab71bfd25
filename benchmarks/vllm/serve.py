"""Load a server of the OpenAI API with streaming clients: ``python -m benchmarks.vllm.serve --clients 16``.

Run it against the same server started with and without ``--additional-config '{"kvpolicy": ...}'``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Answer", "Load", "main", "offer", "summary"]


@dataclass(frozen=True)
class Load:
    """Say what is asked of a server.

    Attributes:
        url: of the server.
        clients: each has one request at a time.
        requests: of all clients together.
        prompt: tokens of each request.
        output: tokens of each request.
        model: name that the server knows.
    """

    url: str
    clients: int
    requests: int
    prompt: int
    output: int
    model: str


@dataclass
class Answer:
    """Hold when the pieces of one answer came.

    Attributes:
        start: when it was asked for.
        times: of each piece that the server sent.
        tokens: as the server has counted them.
        error: what went wrong; None for a whole answer.
    """

    start: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


def body(load: Load, number: int) -> dict[str, Any]:
    """Return a request whose prompt shares no beginning with another's, and whose answer has all its tokens."""
    prompt = [100 + (number * 31 + 17 * place) % 397 for place in range(load.prompt)]
    return {
        "model": load.model,
        "prompt": [100 + number % 397, *prompt[1:]],
        "max_tokens": load.output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def offer(load: Load) -> tuple[list[Answer], float]:
    """Return the answers of a server, and the seconds that all of them took."""
    import aiohttp

    numbers, answers = iter(range(load.requests)), list[Answer]()
    timeout, begin = aiohttp.ClientTimeout(total=None, sock_read=600), time.perf_counter()
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=load.clients)) as session:
        await asyncio.gather(*(_client(session, load, numbers, answers) for _ in range(load.clients)))
    return answers, time.perf_counter() - begin


async def _client(session: Any, load: Load, numbers: Iterator[int], answers: list[Answer]) -> None:
    for number in numbers:
        answers.append(answer := Answer(time.perf_counter()))
        try:
            await _ask(session, load, number, answer)
        except Exception as error:  # it is counted; the others go on
            answer.error = f"{type(error).__name__}: {error}"


async def _ask(session: Any, load: Load, number: int, answer: Answer) -> None:
    async with session.post(f"{load.url}/v1/completions", json=body(load, number)) as response:
        if response.status != 200:
            answer.error = f"{response.status}: {(await response.text())[:200]}"
            return
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            piece = json.loads(line[6:])
            if "error" in piece:
                answer.error = str(piece["error"])[:200]
                return
            if piece.get("choices"):
                answer.times.append(time.perf_counter())
            if piece.get("usage"):
                answer.tokens = piece["usage"]["completion_tokens"]
    if answer.tokens != load.output:
        answer.error = f"{answer.tokens} tokens, and {load.output} were asked for"


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, float | int | str]:
    """Return throughput, waiting times in milliseconds, and failures."""
    whole = [one for one in answers if one.error is None]
    first = [1e3 * (one.times[0] - one.start) for one in whole if one.times]
    between = [1e3 * (b - a) for one in whole for a, b in zip(one.times, one.times[1:], strict=False)]
    errors = [one.error for one in answers if one.error is not None]
    return {
        "answers": len(whole),
        "failures": len(errors),
        "tokens per second": sum(one.tokens for one in whole) / seconds,
        "first token, p50": _quantile(first, 50),
        "first token, p95": _quantile(first, 95),
        "between tokens, p50": _quantile(between, 50),
        "between tokens, p95": _quantile(between, 95),
        **({"first failure": errors[0]} if errors else {}),
    }


def _quantile(numbers: Sequence[float], percent: int) -> float:
    if len(numbers) < 2:
        return numbers[0] if numbers else float("nan")
    return statistics.quantiles(numbers, n=100, method="inclusive")[percent - 1]


def _model_of(url: str) -> str:
    from urllib.request import urlopen

    with urlopen(f"{url}/v1/models", timeout=30) as response:
        return str(json.load(response)["data"][0]["id"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Load a server and print what it did; 1 where an answer failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm.serve", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, help="of all clients together; two a client by default")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each request")
    parser.add_argument("--output", type=int, default=640, help="tokens of each request")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    options = parser.parse_args(arguments)
    requests = options.requests or 2 * options.clients
    url = options.url.rstrip("/")
    load = Load(url, options.clients, requests, options.prompt, options.output, _model_of(url))
    found = summary(*asyncio.run(offer(load)))
    for name, value in found.items():
        print(f"{name}: {value:.1f}" if isinstance(value, float) else f"{name}: {value}")
    if options.json is not None:
        asked = {"clients": load.clients, "requests": requests, "prompt": load.prompt, "output": load.output}
        options.json.write_text(json.dumps({"load": asked, "found": found}, indent=2) + "\n", "utf-8")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
