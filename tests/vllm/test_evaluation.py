"""An engine of the evaluation answers as transformers does, under each policy that it was started for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpolicy import BudgetError, Policy
from kvpolicy.adapters.vllm import account
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.generation import Generation
from kvpolicy.evaluation.serving import VLLMEngine
from tests.models import default_folder, real, tokenizer
from tests.vllm.engine import agreeing, reference

TIGHT = Policy.parse("vase(48, interval=16, recent=16)")
ROOMY = Policy.parse("snapkv(96, interval=32)")
QUESTIONS = ("What is 17 + 25? Say the number alone.", "Write a story about a fox.", "Name three rivers.")
NEW = 60
A_BLOCK = 32 * 2 * 3 * 64 * 4 * 30  # bytes: tokens, keys and values, heads, head size, float32, layers


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    asked = [[{"role": "user", "content": text}] for text in QUESTIONS]
    return [tokenizer().apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in asked]


@pytest.fixture(scope="module")
def engine() -> VLLMEngine:
    sizes: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 4, "block_size": 32, "enforce_eager": True}
    return VLLMEngine(default_folder(), [TIGHT, ROOMY], dtype="float32", **sizes)


def ended(tokens: list[int]) -> list[int]:
    """Return an answer up to where it ends."""
    end = tokenizer().eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens


def checked(found: list[Generation], prompts: list[list[int]], policy: Policy) -> None:
    for one, prompt in zip(found, prompts, strict=True):
        expected = ended(reference(real(), prompt, policy.text(), NEW))
        # Sums in another order: where two tokens are nearly equal, texts may part late.
        assert agreeing(one.tokens, expected) >= min(len(expected), 30)
        made = len(one.tokens) + (one.finish == "stop")
        known = account(policy, prompt=len(prompt), output=made)
        assert one.evictions == known.evictions
        assert one.finish == ("length" if made == NEW and one.tokens[-1] != tokenizer().eos_token_id else "stop")
        assert 0 < one.compression <= 1


def test_each_policy_answers_as_in_transformers(engine: VLLMEngine, prompts: list[list[int]]) -> None:
    tight = engine.generate(prompts, TIGHT, max_new_tokens=NEW)
    checked(tight, prompts, TIGHT)
    checked(engine.generate(prompts[2:], ROOMY, max_new_tokens=NEW), prompts[2:], ROOMY)
    assert {one.finish for one in tight} == {"stop", "length"}
    longest = max(tight, key=lambda one: len(one.tokens))
    assert longest.evictions > 0
    assert longest.compression < 1
    # Positions, order and one number of vase for each slot of the engine; 64 queries, and a line for others.
    beside = 12 * 3 * 128 + 65 * 9 * 64 * 4
    assert {one.peak_nbytes for one in tight} == {2 * A_BLOCK + 30 * beside}


def test_without_a_policy_everything_is_kept(engine: VLLMEngine, prompts: list[list[int]]) -> None:
    for one, prompt in zip(engine.generate(prompts, None, max_new_tokens=NEW), prompts, strict=True):
        with torch.no_grad():
            whole = real()(torch.tensor([[*prompt, *one.tokens]])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        assert agreeing(one.tokens, whole) >= min(len(one.tokens), 30)
        assert (one.compression, one.evictions) == (1.0, 0)
        blocks = -(-(len(prompt) + len(one.tokens) + (one.finish == "stop") - 1) // 32)
        assert one.peak_nbytes == blocks * A_BLOCK


def test_a_seed_says_what_is_sampled(engine: VLLMEngine, prompts: list[list[int]]) -> None:
    first, again, other = (
        engine.generate(prompts[1:2], TIGHT, max_new_tokens=NEW, temperature=1.0, seeds=[seed])[0].tokens
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_what_the_engine_was_not_started_for_is_refused(engine: VLLMEngine, prompts: list[list[int]]) -> None:
    with pytest.raises(BudgetError, match="ask for at most"):
        engine.generate(prompts, Policy.parse("vase(256)"), max_new_tokens=4)
    with pytest.raises(EvaluationError, match="vLLM refuses a request"):
        engine.generate([prompts[0] * 40], TIGHT, max_new_tokens=4)
    assert len(engine.generate(prompts, TIGHT, max_new_tokens=4)) == 3
