"""Engines in one process, with and without eviction, and what a load takes in each."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.vllm.sizes import Sizes

__all__ = ["FULL", "Engine", "Run", "Step", "engines"]

FULL = "full"  #: the engine without eviction


@dataclass(frozen=True)
class Step:
    """Hold one step of an engine.

    Attributes:
        seconds: by the clock of the engine.
        running: requests in flight.
        tokens: that were generated.
        evictions: of requests.
        first: tokens that are the first of their request: the step has read prompts.
    """

    seconds: float
    running: int
    tokens: int
    evictions: int
    first: int


@dataclass
class Run:
    """Hold a load that an engine has served.

    Attributes:
        steps: all of them.
        preemptions: of requests.
        compaction: seconds that evictions took, as kvpolicy counts them.
    """

    steps: list[Step] = field(default_factory=list)
    preemptions: int = 0
    compaction: float = 0.0

    @property
    def seconds(self) -> float:
        """Return the time of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def tokens(self) -> int:
        """Return the tokens that were generated."""
        return sum(step.tokens for step in self.steps)

    @property
    def running(self) -> float:
        """Return the requests in flight, averaged over the steps."""
        return statistics.fmean(step.running for step in self.steps)

    @property
    def most(self) -> int:
        """Return the most requests in flight."""
        return max(step.running for step in self.steps)

    @property
    def decoding(self) -> list[float]:
        """Return the times of the steps with most requests that neither evicted nor read a prompt."""
        plain = [step for step in self.steps if not step.evictions and not step.first]
        most = max(step.running for step in plain)
        return [step.seconds for step in plain if step.running == most]


class Engine:
    """Run vLLM in this process, so that its scheduler can be looked into.

    Args:
        model: a folder.
        sizes: of the load.
        blocks: of its cache.
        dtype: of weights and cache.
        device: cpu or cuda.
        policy: that evicts, as text; None for the full cache.
        weights: are in the folder; else they are random.
    """

    def __init__(
        self, model: Path, sizes: Sizes, blocks: int, dtype: str, device: str, *, policy: str | None, weights: bool
    ) -> None:
        from vllm import LLM

        asked = {} if policy is None else {"kvpolicy": {"policy": policy}}
        self.name = policy or FULL
        self.clock = time.process_time if device == "cpu" else time.perf_counter
        self._llm = LLM(
            str(model),
            dtype=dtype,
            load_format="auto" if weights else "dummy",
            skip_tokenizer_init=True,
            enforce_eager=device == "cpu",
            max_model_len=sizes.context,
            max_num_seqs=sizes.requests,
            block_size=sizes.block,
            num_gpu_blocks_override=blocks,
            kv_cache_memory_bytes=_bytes(model, sizes, blocks, dtype),
            additional_config=asked,
        )
        self._engine = self._llm.llm_engine
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._counters: Any = None
        if policy is not None:
            from kvpolicy.adapters.vllm.requests import table_of

            table = table_of(self._engine.vllm_config)
            assert table is not None
            self._counters = table.counters
        self._served, self._run = 0, Run()
        self._lengths: dict[str, int] = {}
        self._requests: list[Any] = []

    @property
    def busy(self) -> bool:
        """Return whether there is something to serve."""
        return bool(self._engine.has_unfinished_requests())

    def begin(self, sizes: Sizes) -> Run:
        """Take a load whose requests are all there at the beginning, and return what its steps will be noted in."""
        from vllm import SamplingParams

        self._lengths, self._run = {f"{self._served}-{number}": 0 for number in range(sizes.requests)}, Run()
        self._served += 1
        params = SamplingParams(temperature=0, max_tokens=sizes.output, ignore_eos=True, detokenize=False)
        for number, name in enumerate(self._lengths):
            prompt = [100 + (number * 31 + 17 * place) % 397 for place in range(sizes.prompt)]
            self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        self._requests = list(self._scheduler.requests.values())
        return self._run

    def step(self) -> None:
        """Let the engine make one step, and note it."""
        before, start = self._count(), self.clock()
        outputs = self._engine.step()
        seconds, after, running = self.clock() - start, self._count(), len(self._scheduler.running)
        tokens = first = 0
        for output in outputs:
            length, held = len(output.outputs[0].token_ids), self._lengths[output.request_id]
            tokens, first = tokens + length - held, first + (held == 0)
            self._lengths[output.request_id] = length
            running += output.finished  # it was in flight until now
        evictions = int(after["evictions"] - before["evictions"])
        self._run.steps.append(Step(seconds, running, tokens, evictions, first))
        self._run.compaction += after["compaction_seconds"] - before["compaction_seconds"]
        self._run.preemptions = sum(request.num_preemptions for request in self._requests)

    def _count(self) -> dict[str, float]:
        return {"evictions": 0.0, "compaction_seconds": 0.0} if self._counters is None else self._counters.read()


@contextmanager
def engines(
    policies: Sequence[str], model: Path, sizes: Sizes, blocks: int, dtype: str, device: str, *, weights: bool
) -> Generator[list[Engine]]:
    """Make an engine with the full cache and one for each policy, warm; all end together, as vLLM's groups do."""
    from vllm.distributed import cleanup_dist_env_and_memory

    made = [Engine(model, sizes, blocks, dtype, device, policy=policy, weights=weights) for policy in (None, *policies)]
    warm = replace(sizes, requests=2, prompt=sizes.budget, output=2 * sizes.interval + 8)
    for engine in made:
        engine.begin(warm)
        while engine.busy:
            engine.step()
    try:
        yield made
    finally:
        made.clear()
        gc.collect()
        cleanup_dist_env_and_memory()


def _bytes(model: Path, sizes: Sizes, blocks: int, dtype: str) -> int:
    """Return the bytes of a cache: with two engines in one process, neither may take what vLLM takes by default."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 4 if dtype == "float32" else 2
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * width * size * sizes.block * blocks)
