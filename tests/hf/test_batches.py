"""A row of a batch equals its single run, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpolicy import Policy
from kvpolicy.adapters.hf import EvictionCache
from tests.hf.test_oracle import padded
from tests.hf.zoo import zoo
from tests.models import FAMILIES, real, tiny, tokenizer

ZOO = zoo(24)


def logits_of(model: object, policy: Policy, tokens: Tensor, mask: Tensor, later: Tensor) -> Tensor:
    """Return the logits of every step: a prompt, then given tokens one by one."""
    with EvictionCache(model, policy) as cache:
        found = []
        for step in [tokens, *later.split(1, 1)]:
            mask = mask if step is tokens else torch.cat([mask, torch.ones_like(step)], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
            out = model(step, attention_mask=mask, position_ids=positions, past_key_values=cache)
            found.append(out.logits[:, -1])
        assert min(cache.receipt().evictions) >= 3
        return torch.stack(found, 1)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_a_row_of_a_padded_batch_equals_its_single_run(family: str, name: str) -> None:
    model, policy, lengths = tiny(family, torch.float64), ZOO[name], [40, 31, 17, 1]
    tokens, mask = padded(lengths, 97)
    later = torch.randint(2, 97, (4, 60), generator=torch.Generator().manual_seed(3))
    together = logits_of(model, policy, tokens, mask, later)
    for r, length in enumerate(lengths):
        own = tokens[r : r + 1, -length:]
        alone = logits_of(model, policy, own, torch.ones_like(own), later[r : r + 1])
        assert (together[r] - alone[0]).abs().max() <= 1e-9, f"row {r}"


def test_the_order_of_rows_changes_nothing() -> None:
    model, tokens = tiny("llama", torch.float64), padded([40, 31, 17], 97)
    later = torch.randint(2, 97, (3, 40), generator=torch.Generator().manual_seed(3))
    turned = torch.tensor([2, 0, 1])
    straight = logits_of(model, ZOO["vase"], *tokens, later)
    other = logits_of(model, ZOO["vase"], tokens[0][turned], tokens[1][turned], later[turned])
    assert (straight[turned] - other).abs().max() <= 1e-9


def test_seeds_and_requests_make_rows_differ_and_nothing_else_does() -> None:
    model, policy = tiny("llama"), zoo(24)["random_kept_noise"]
    tokens = torch.randint(2, 97, (1, 40)).repeat(3, 1)

    def kept(**options: list[int]) -> list[Tensor]:
        with EvictionCache(model, policy, **options) as cache:
            model(tokens, past_key_values=cache)
            return list(cache.receipt().positions(0))

    a, b, c = kept()
    assert torch.equal(a, b)
    assert torch.equal(b, c)
    seeded = kept(seeds=[0, 1, 0], requests=[0, 0, 7])
    assert torch.equal(seeded[0], a)
    assert not torch.equal(seeded[1], a)
    assert not torch.equal(seeded[2], a)
    assert not torch.equal(seeded[2], seeded[1])


@pytest.mark.model
@pytest.mark.slow
def test_four_padded_prompts_equal_four_single_runs_on_the_real_model() -> None:
    model, words = real(), tokenizer()
    policy = zoo(48, interval=16, recent=16, window=16)["vase"]
    prompts = [
        "Rivers",
        "The capital of France is a city on the Seine. Its most visited monument is",
        "Once upon a time there was a fox who lived at the edge of a forest. Every morning it",
        "To bake bread one needs flour, water, salt and yeast. First mix the flour with the water, then add " * 3,
    ]
    words.padding_side = "left"
    options = {"max_new_tokens": 100, "min_new_tokens": 100, "do_sample": False}
    batch = words(prompts, return_tensors="pt", padding=True)
    with EvictionCache(model, policy) as cache:
        together = model.generate(**batch, **options, past_key_values=cache)[:, batch.input_ids.shape[1] :]
        assert min(cache.receipt().evictions) >= 3
    for r, prompt in enumerate(prompts):
        inputs = words(prompt, return_tensors="pt")
        with EvictionCache(model, policy) as cache:
            alone = model.generate(**inputs, **options, past_key_values=cache)[:, inputs.input_ids.shape[1] :]
        assert torch.equal(together[r], alone[0]), prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_on_a_padded_batch(family: str) -> None:
    # A router's near tie is decided by a rounding, which differs between widths.
    model = tiny(family, torch.float64 if "moe" in family else torch.float32)
    tokens, mask = padded([40, 31, 17], 97)
    options = {"max_new_tokens": 40, "do_sample": False}
    with EvictionCache(model, ZOO["vase"]) as cache:
        together = model.generate(tokens, attention_mask=mask, **options, past_key_values=cache)
        assert cache.receipt().seen == (79, 70, 56)
    for r, length in enumerate([40, 31, 17]):
        with EvictionCache(model, ZOO["vase"]) as cache:
            alone = model.generate(tokens[r : r + 1, -length:], **options, past_key_values=cache)
        assert torch.equal(together[r, 40:], alone[0, length:])
