"""The same tokens as transformers gives under the same policy, and as a full cache with a mask does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM

from kvpolicy import Policy
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.cli.default_model import default_model
from tests.oracle import Oracle
from tests.vllm.engine import CHUNK, agreeing, answers, engine, params, reference

pytestmark = [pytest.mark.model, pytest.mark.slow]

SIZES = "interval=32, recent=32"
DEFAULT = f"vase(128, {SIZES})"
POLICIES = {
    "vase": DEFAULT,
    "vase_dkv": f"vase_dkv(128, {SIZES})",
    "snapkv": f"Policy(Attention(window=32, over='all') >> TopK(128), {SIZES})",
    "key norm": f"Policy(KeyNorm() >> TopK(128), {SIZES})",
    "random with prompt": f"Policy(Constant() >> Prompt(0.5) >> Stochastic(1.0) >> TopK(128), {SIZES})",
    "h2o": f"Policy(AccumulatedAttention(32) >> TopK(128), {SIZES})",
    "tova": f"Policy(LastQuery() >> TopK(128), {SIZES})",
    "streaming": f"Policy(Recency() >> Sinks(4) >> TopK(128), {SIZES})",
}


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(default_model(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm(in_this_process: None) -> LLM:
    return engine(default_model(), {"policy": DEFAULT})


@pytest.fixture(scope="module")
def texts() -> dict[str, list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    rules = "".join(f"Rule {i}: water row {i * 7 % 13} in week {i}, not in week {i + 3}. " for i in range(44))
    guide = "Write a long guide to growing tomatoes: soil, seeds, watering, pruning, pests, harvest and storage. "
    return {
        "short": tokenizer(guide).input_ids,
        "long": tokenizer(rules).input_ids,
        "middle": tokenizer(rules).input_ids[:333],
        "edge": tokenizer(rules).input_ids[: CHUNK + 1],
    }


def test_six_hundred_tokens(llm: LLM, model: Any, texts: dict[str, list[int]]) -> None:
    (found,) = answers(llm, [texts["short"]], params(600))
    assert found == reference(model, texts["short"], DEFAULT, 600)


def test_ten_requests_at_four_seats_under_eight_policies(llm: LLM, model: Any, texts: dict[str, list[int]]) -> None:
    assert len(texts["long"]) > 900
    names = [*POLICIES, "vase", "h2o"]
    prompts = [list(texts)[number % len(texts)] for number in range(len(names))]
    asked = [params(100, {"policy": POLICIES[name]}) for name in names]
    found = answers(llm, [texts[prompt] for prompt in prompts], asked)
    for name, prompt, tokens in zip(names, prompts, found, strict=True):
        expected = reference(model, texts[prompt], POLICIES[name], 100)
        assert agreeing(tokens, expected) == 100, (name, prompt)


@pytest.mark.parametrize("name", ["vase", "tova"])
def test_long_prompts_in_chunks_and_the_masked_full_cache(
    llm: LLM, model: Any, texts: dict[str, list[int]], name: str
) -> None:
    (found,) = answers(llm, [texts["long"]], params(70, {"policy": POLICIES[name]}))
    oracle, step, expected = Oracle(model, Policy.parse(POLICIES[name])), torch.tensor([texts["long"]]), []
    with torch.no_grad():
        for _ in range(70):
            step = oracle.forward(step).argmax(-1, keepdim=True)
            expected.append(int(step))
    assert found == expected


def test_bounded_prompts_are_cut_chunk_by_chunk(model: Any, texts: dict[str, list[int]]) -> None:
    llm = engine(default_model(), {"policy": DEFAULT, "prefill": "bounded"})
    (found,) = answers(llm, [texts["long"]], params(70))
    cache, tokens = EvictionCache(model, Policy.parse(DEFAULT)), torch.tensor([texts["long"]])
    expected: list[int] = []
    with torch.no_grad():
        out = model(tokens[:, :CHUNK], past_key_values=cache)
        for first in range(CHUNK, tokens.shape[1], CHUNK):
            out = model(tokens[:, first : first + CHUNK], past_key_values=cache)
        for _ in range(70):
            expected.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([expected[-1:]]), past_key_values=cache)
    assert found == expected
