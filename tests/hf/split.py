"""One of the processes that share a model: what it finds goes to a file. Also how a test starts them.

``python -m tests.hf.split JOB FOLDER RANK RANKS`` runs one of the jobs below.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, distributed

from kvpolicy import (
    AccumulatedAttention,
    Attention,
    EvictionPolicy,
    LastQuery,
    Leverage,
    Normalize,
    PerLayer,
    Policy,
    Sinks,
    Stochastic,
    TopK,
    ValueGuard,
    ValueNorm,
    maximum,
)
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.errors import KVPolicyError
from tests.docs.pages import ROOT

LIMIT = 120  #: seconds that processes may take, and then fail
Asked: TypeAlias = tuple[str, list[str], torch.dtype, tuple[int, ...]]  # folder, policies, dtype, tokens of each turn

CASES = {
    "vase": Policy(Attention(16) >> ValueGuard(sinks=2) >> Stochastic() >> TopK(24), interval=8, recent=8),
    "vase_dkv": Policy(Leverage() >> Sinks(4) >> TopK(24), interval=8, recent=8),
    "snapkv": Policy(Attention(16, over="all") >> TopK(24), interval=None, recent=8),
    "h2o": Policy(AccumulatedAttention(16) >> TopK(24), interval=8, recent=8),
    "tova": Policy(LastQuery() >> TopK(24), interval=8, recent=8),
    "alone": Policy(Attention(16) >> Stochastic() >> TopK(PerLayer((24, None, 20))), interval=8, recent=8),
    # Heads hold different tokens, and one of them is asked for what all have at its positions.
    "apart": Policy(
        maximum(LastQuery() >> Normalize("z"), ValueNorm("l2") >> Normalize("z")) >> Stochastic() >> TopK(24),
        interval=8,
        recent=8,
    ),
}


def decode(model: Any, policy: EvictionPolicy, turns: tuple[int, ...]) -> dict[str, Any]:
    """Decode so many tokens in each turn, greedily; return the logits of every step and what was kept."""
    tokens, mask = prompts()
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found: list[Tensor] = []
    later = torch.randint(2, 90, (len(tokens), 11), generator=torch.Generator().manual_seed(5))
    with EvictionCache(model, policy, max_new_tokens=60, seeds=range(len(tokens))) as cache:
        for new in turns:
            out: Any = model.generate(
                tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, **options
            )
            found += out.logits
            tokens = torch.cat([out.sequences, later], 1)
            mask = torch.nn.functional.pad(mask, (0, tokens.shape[1] - mask.shape[1]), value=1)
        cache.check_ranks()
        receipt = cache.receipt()
        for group in cache.groups:
            group.store.check_integrity()
    assert min(receipt.evictions) >= 1
    assert max(receipt.evictions) >= 2
    return {"logits": torch.stack(found, 1), "kept": receipt.kept, "nbytes": receipt.nbytes}


def prompts() -> tuple[Tensor, Tensor]:
    """Return a left-padded batch and its mask."""
    tokens = torch.randint(2, 90, (3, 40), generator=torch.Generator().manual_seed(1))
    return tokens, (torch.arange(40) >= 40 - torch.tensor([40, 31, 17])[:, None]).long()


def load(folder: str, dtype: torch.dtype, ranks: int = 1) -> Any:
    """Return the model of a folder, this process's part of it where there are several."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"tp_plan": "auto"} if ranks > 1 else {}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels know no float64
    return model


def in_stages(folder: str, ranks: int) -> Any:
    """Return the model of a folder, some of its layers in each process."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(pp_size=ranks))


# What a process does


def same(asked: list[Asked], rank: int, ranks: int) -> dict[str, Any]:
    """Decode with the model of each folder and each of the policies that are named for it."""
    found = {}
    for where, names, dtype, turns in asked:
        model = load(where, dtype, ranks)
        found[where] = {name: decode(model, CASES[name], turns) for name in names}
    return found


def misuse(folder: str, rank: int, ranks: int) -> dict[str, Any]:
    """Do what is refused; return the messages."""
    model, policy = load(f"{folder}/even", torch.float64, ranks), CASES["tova"]
    tokens, _ = prompts()
    said: dict[str, Any] = {}

    def refused(name: str, call: Callable[[], Any]) -> None:
        with pytest.raises(KVPolicyError) as caught:
            call()
        said[name] = (type(caught.value).__name__, str(caught.value))

    for name in ("uneven", "few"):
        refused(name, lambda name=name: EvictionCache(load(f"{folder}/{name}", torch.float64, ranks), policy))  # type: ignore[misc]
    with EvictionCache(model, policy) as cache:
        refused("prompt", lambda: model(tokens + rank, past_key_values=cache))
        model(tokens, past_key_values=cache)  # nothing was changed
        cache.check_ranks()
        store = cache.groups[0].store
        assert store is not None
        store.rows[0].evictions += rank
        refused("counters", cache.check_ranks)
        store.rows[0].evictions -= rank
        store.positions[1, 0, 0, 3] += rank
        refused("positions", cache.check_ranks)
    with EvictionCache(model, policy, seeds=[rank] * 3) as cache:
        refused("seeds", lambda: model(tokens, past_key_values=cache))
    with EvictionCache(model, CASES["vase"]) as cache:  # heads may differ: positions prove nothing
        model(tokens, past_key_values=cache)
        assert cache.groups[0].store is not None
        cache.groups[0].store.positions[1, 0, 0, 3] += rank
        cache.check_ranks()
    refused("static", lambda: EvictionCache(model, policy, static=True))
    with EvictionCache(model, policy) as cache:
        model(tokens, past_key_values=cache)
        refused("save", lambda: cache.save("nowhere"))
    refused("stages", lambda: EvictionCache(in_stages(f"{folder}/even", ranks), policy))
    whole = load(f"{folder}/even", torch.float64)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallelize_module(whole.model.layers[0].self_attn.k_proj, init_device_mesh("cpu", (ranks,)), ColwiseParallel())
    refused("others", lambda: EvictionCache(whole, policy))
    return said


JOBS: dict[str, Callable[[Any, int, int], dict[str, Any]]] = {"same": same, "misuse": misuse}


# How a test starts processes


def environment() -> dict[str, str]:
    """Return the environment of processes that talk within this machine."""
    network = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {**network, **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(job: str, folder: Path, ranks: int, asked: Any) -> list[dict[str, Any]]:
    """Run a job in several processes; return what each found. None outlives the call."""
    torch.save(asked, folder / "asked.pt")
    logs = [folder / f"{rank}.log" for rank in range(ranks)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", "tests.hf.split", job, str(folder), str(rank), str(ranks)]
            with log.open("wb") as sink:
                started.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=sink, stderr=subprocess.STDOUT)
                )
        end = time.monotonic() + LIMIT
        while any(one.poll() is None for one in started):
            if time.monotonic() > end or any(one.poll() for one in started):
                break
            time.sleep(0.05)
    finally:
        for one in started:
            one.kill()
            one.wait()
    codes = [one.returncode for one in started]
    if any(codes):
        tails = [f"rank {rank} ended with {codes[rank]}:\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs)]
        pytest.fail("\n\n".join(tails))
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def main(job: str, folder: str, rank: str, ranks: str) -> None:
    """Run one process of a job."""
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",  # a file, and no port that somebody else could take
        rank=int(rank),
        world_size=int(ranks),
        timeout=timedelta(seconds=LIMIT // 2),
    )
    with torch.no_grad():
        found = JOBS[job](torch.load(Path(folder) / "asked.pt"), int(rank), int(ranks))
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
