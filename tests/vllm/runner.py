"""Start vLLM as the JSON on standard input says, and print as JSON what it answered: run as a process of its own.

The input is a list of engines. Each has ``engine``, the arguments of ``vllm.LLM``, and ``rounds``: lists of requests
``{"prompt": token numbers, "params": arguments of SamplingParams}``; the requests of a round run together.
``"async": true`` schedules ahead of the results, which vLLM's CPU platform turns off whatever it is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

#: What every process of vLLM needs here; ``nobind``: ranks may share a core.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
ROOT = Path(__file__).parents[2]


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a process that runs vLLM with this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # A board of its own: an engine that was started here before has named one for all that this process starts.
    inherited = {name: value for name, value in os.environ.items() if name != "KVPOLICY_VLLM_BOARD"}
    return {**inherited, **ENVIRONMENT, "PYTHONPATH": path, **changes}


def run(engines: Sequence[dict[str, Any]], *, timeout: float = 400, **changes: str) -> list[dict[str, Any]]:
    """Return what another process printed for each engine."""
    # A session of its own: what vLLM started ends with it, even where it hangs.
    with subprocess.Popen(
        [sys.executable, __file__], env=environment(**changes), start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(json.dumps(engines), timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-6000:]
    return json.loads(out.splitlines()[-1])


@contextlib.contextmanager
def _scheduling(ahead: bool) -> Generator[None]:
    from vllm.platforms import current_platform

    platform = type(current_platform)
    stock = platform.check_and_update_config

    def keep(config: Any) -> None:
        stock(config)
        config.scheduler_config.async_scheduling = ahead

    platform.check_and_update_config = staticmethod(keep)
    try:
        yield
    finally:
        platform.check_and_update_config = stock


def _answer(output: Any) -> dict[str, Any]:
    """Return tokens, their logarithmic probabilities, and by how much they led at the closest step."""
    found = [sorted((one.logprob for one in step.values()), reverse=True) for step in output.logprobs]
    lead = min(first - second for first, second, *_ in found)
    return {"tokens": list(output.token_ids), "logprobs": [first for first, *_ in found], "lead": lead}


def _serve(asked: dict[str, Any]) -> dict[str, Any]:
    import vllm

    rounds: list[list[Any]] = []
    with _scheduling(asked.get("async", False)):
        engine = vllm.LLM(**{"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, **asked["engine"]})
    asked["started"] = True
    for requests in asked.get("rounds", []):
        prompts = [vllm.TokensPrompt(prompt_token_ids=one["prompt"]) for one in requests]
        params = [
            vllm.SamplingParams(temperature=0, ignore_eos=True, detokenize=False, logprobs=2, **one["params"])
            for one in requests
        ]
        done = engine.generate(prompts, params, use_tqdm=False)
        rounds.append([_answer(one.outputs[0]) for one in done])
    config = engine.llm_engine.vllm_config
    facts = {
        "async": config.scheduler_config.async_scheduling,
        "ranks": config.parallel_config.tensor_parallel_size,
        "compiled": int(config.compilation_config.mode) > 0,
        "core": type(engine.llm_engine.engine_core).__name__,
    }
    return {"rounds": rounds, "facts": facts}


def _messages(error: BaseException | None) -> list[str]:
    found = []
    while error is not None:
        found.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return found


def _attempt(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        return _serve(asked)
    except Exception as error:
        return {"errors": _messages(error), "started": asked.get("started", False)}


def _apart(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what a fork of this process found: vLLM leaves much behind that a second engine trips over."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        with os.fdopen(write, "w") as pipe:
            json.dump(_attempt(asked), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"errors": ["the process died"], "started": None}


def main() -> None:
    """Serve each engine; one with ``"may_fail"`` prints its errors, the outermost first, and whether it started."""
    importlib.import_module("vllm.v1.worker.cpu_worker")  # once, for all forks

    found = [_apart(asked) if asked.get("may_fail") else _serve(asked) for asked in json.load(sys.stdin)]
    print()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
