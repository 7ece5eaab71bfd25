"""The same tokens as transformers gives under the same policy, and as a full cache with a mask does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM
from vllm import LLM

from kvpolicy import Policy
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.vllm import account
from kvpolicy.cli.default_model import default_model
from tests.models import sharpen
from tests.oracle import Oracle
from tests.vllm.engine import CHUNK, agreeing, answers, engine, params, reference, tiny_llama

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


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(default_model(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm() -> LLM:
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
        "just over": tokenizer(rules).input_ids[:140],
    }


@pytest.mark.model
@pytest.mark.slow
def test_six_hundred_tokens(llm: LLM, model: Any, texts: dict[str, list[int]]) -> None:
    (found,) = answers(llm, [texts["short"]], params(600))
    assert found == reference(model, texts["short"], DEFAULT, 600)


@pytest.mark.model
@pytest.mark.slow
def test_ten_requests_at_four_seats_under_eight_policies(llm: LLM, model: Any, texts: dict[str, list[int]]) -> None:
    assert len(texts["long"]) > 900
    names = [*POLICIES, "vase", "h2o"]
    lengths = ["just over", "long", "middle", "edge"]  # each beyond its budget: every policy evicts at least twice
    prompts = [lengths[number % len(lengths)] for number in range(len(names))]
    asked = [params(60, {"policy": POLICIES[name]}) for name in names]
    found = answers(llm, [texts[prompt] for prompt in prompts], asked)
    for name, prompt, tokens in zip(names, prompts, found, strict=True):
        assert account(POLICIES[name], prompt=len(texts[prompt]), output=60).evictions >= 2
        expected = reference(model, texts[prompt], POLICIES[name], 60)
        assert agreeing(tokens, expected) == 60, (name, prompt)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vase", "tova"])
def test_long_prompts_in_chunks_and_the_masked_full_cache(
    llm: LLM, model: Any, texts: dict[str, list[int]], name: str
) -> None:
    (found,) = answers(llm, [texts["long"]], params(80, {"policy": POLICIES[name]}))
    oracle, step, expected = Oracle(model, Policy.parse(POLICIES[name])), torch.tensor([texts["long"]]), []
    with torch.no_grad():
        for _ in range(80):
            step = oracle.forward(step).argmax(-1, keepdim=True)
            expected.append(int(step))
    assert found == expected


@pytest.mark.model
@pytest.mark.slow
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


def gemma2(folder: Path) -> Gemma2ForCausalLM:
    """Return a random model whose attention is capped, of sliding and full layers, and save it."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        attn_logit_softcapping=2.0,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = sharpen(Gemma2ForCausalLM(config)).eval()
    model.set_attn_implementation("eager")  # the default leaves the cap out
    model.save_pretrained(folder)
    return model


TINY = {
    "heads that share keys": lambda folder: sharpened_llama(folder, num_attention_heads=4, num_key_value_heads=2),
    "one head of keys": lambda folder: sharpened_llama(folder, num_attention_heads=4, num_key_value_heads=1),
    "no sharing": lambda folder: sharpened_llama(folder, num_attention_heads=2, num_key_value_heads=2, head_dim=64),
    "capped logits": gemma2,
}


def sharpened_llama(folder: Path, **sizes: Any) -> Any:
    model = sharpen(tiny_llama(folder, **sizes))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", TINY)
def test_tiny_models(kind: str, tmp_path: Path) -> None:
    model = TINY[kind](tmp_path)
    llm = engine(tmp_path, {"policy": DEFAULT})
    generator = torch.Generator().manual_seed(1)
    names = [*POLICIES]
    prompts = [torch.randint(512, (n,), generator=generator).tolist() for n in (1, 40, 127, 129, 256, 257, 300, 520)]
    found = answers(llm, prompts, [params(100, {"policy": POLICIES[name]}) for name in names])
    whole = answers(llm, prompts, params(100, "off"))
    assert found != whole
    for name, tokens, prompt in zip(names, found, prompts, strict=True):
        assert tokens == reference(model, prompt, POLICIES[name], 100), name
