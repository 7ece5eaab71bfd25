"""The same greedy answers alone or in a batch, split, ahead of results, compiled, over processes.

Sums of float32 differ in their last bits between these ways. The prompts are such that the likeliest token leads by
more than that at every step, which is checked; a slot kept in one way and not in another moves logits by far more.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import sharpen
from tests.vllm.runner import run

pytestmark = pytest.mark.vllm

BUDGET, INTERVAL, TOKENS = 48, 16, 40
POLICIES = {
    "vase": f"vase({BUDGET}, interval={INTERVAL}, recent=8)",  # ends with Stochastic >> TopK
    "tova": f"tova({BUDGET}, interval={INTERVAL})",  # LastQuery: one set for all heads, so for all ranks
    # Not a norm: the keys of one token have the same one in the first layer, up to the rounding of their rotation.
    "snapkv": f"Policy(Attention(window=16, over='all') >> TopK({BUDGET}), interval={INTERVAL}, recent=8)",
}
LENGTHS = (5, 31, 32, 33, 64, 70, 97, 130, 150, 200)  # around blocks of 32, and beyond a step of 64
SEED = 17  # of prompts
LEAD = 5e-4  # of the likeliest token


def requests(vocabulary: int, *, off: bool = False, seed: int = SEED) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    names = list(POLICIES)
    return [
        {
            "prompt": torch.randint(2, vocabulary, (length,), generator=generator).tolist(),
            "params": {
                "max_tokens": TOKENS,
                "extra_args": {
                    "kvpolicy": "off" if off else {"policy": POLICIES[names[n % len(names)]], "seed": n},
                },
            },
        }
        for n, length in enumerate(LENGTHS)
    ]


def asked(model: str, **engine: Any) -> dict[str, Any]:
    sizes = {"max_model_len": 512, "max_num_seqs": 10, "max_num_batched_tokens": 64, "block_size": 32}
    return {
        "engine": {
            "model": model,
            "additional_config": {"kvpolicy": {"policy": POLICIES["vase"]}},
            **sizes,
            **engine,
        }
    }


def compare(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Tokens are equal, and numbers differ by so little that no other token could have been the likeliest."""
    assert [one["tokens"] for one in found] == [one["tokens"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert max(abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=True)) < LEAD / 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=192,
        hidden_size=288,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,  # one for each of three ranks
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    sharpen(LlamaForCausalLM(config)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def plain(model: str) -> dict[str, Any]:
    """In this way every answer is made three times: each request alone, all in a batch, and without a policy."""
    alone = [[one] for one in requests(192)]
    (found,) = run([{**asked(model), "rounds": [*alone, requests(192), requests(192, off=True)]}])
    assert found["facts"] == {"async": False, "ranks": 1, "compiled": False, "core": "InprocClient"}
    *one_by_one, batch, off = found["rounds"]
    return {"alone": [one for (one,) in one_by_one], "batch": batch, "off": off}


def test_no_answer_hangs_on_the_last_bits(plain: dict[str, Any]) -> None:
    assert min(one["lead"] for one in plain["alone"]) > LEAD


def test_each_policy_changes_answers(plain: dict[str, Any]) -> None:
    """Else a way to run that evicts nothing would pass for one that evicts the same."""
    changed = {
        list(POLICIES)[n % len(POLICIES)]
        for n, (one, off) in enumerate(zip(plain["alone"], plain["off"], strict=True))
        if one["tokens"] != off["tokens"]
    }
    assert changed == set(POLICIES)


def test_in_a_batch_as_alone(plain: dict[str, Any]) -> None:
    compare(plain["batch"], plain["alone"])


WAYS: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, Any]]] = {
    "processes": ({}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, {"core": "SyncMPClient"}),
    "ahead": ({}, {}, {"async": True}),
    "compiled": ({"enforce_eager": False}, {}, {"compiled": True}),
    "split": ({"tensor_parallel_size": 3}, {}, {"ranks": 3}),
}


#: These take a minute each: a compiler, and three processes that share two cores.
LONG = pytest.mark.skipif("KVPOLICY_EVERY_WAY" not in os.environ, reason="long: KVPOLICY_EVERY_WAY=1 make test-vllm")


@pytest.mark.parametrize("way", [pytest.param(way, marks=LONG if way in ("compiled", "split") else ()) for way in WAYS])
def test_same_answers(way: str, model: str, plain: dict[str, Any], tmp_path: Path) -> None:
    engine, changes, facts = WAYS[way]
    one = {**asked(model, **engine), "rounds": [requests(192)], "async": facts.get("async", False)}
    (found,) = run([one], VLLM_CACHE_ROOT=str(tmp_path), **changes)
    assert found["facts"].items() >= facts.items()
    compare(found["rounds"][0], plain["alone"])
