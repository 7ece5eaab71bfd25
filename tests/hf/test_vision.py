"""Models that read images: text and images in the prompt, the text layers evict, the tower is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import UsageError
from kvpolicy.adapters.hf import EvictionCache
from tests.hf.zoo import zoo
from tests.oracle import Oracle
from tests.vision import VISION, prompt, seeing

SMALL = zoo(24)["vase"]


def text_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the prompt without its image."""
    return {"input_ids": inputs["input_ids"].clamp(max=80), "attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("name", VISION)
def test_a_budget_beyond_the_length_gives_the_stock_tokens(name: str, with_image: bool) -> None:
    model = seeing(name)
    inputs = prompt(name, model, [9, 4], 20)
    inputs = inputs if with_image else text_of(inputs)
    options = {"max_new_tokens": 30, "do_sample": False}
    expected = model.generate(**inputs, **options)
    towers = model.config.vision_config._attn_implementation
    for policy in ("vase", "h2o"):
        with EvictionCache(model, zoo(128)[policy]) as cache:
            assert model.config.vision_config._attn_implementation == towers  # the tower is left alone
            assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), expected)
            assert torch.equal(model.generate(**inputs, **options), expected)  # an ordinary cache
    assert model.get_decoder().config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(**inputs, **options), expected)


def places(name: str, model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Return positions as generate() makes them, for a model that makes none for one token and a mask."""
    if name != "qwen2_vl":
        return {}
    text = mask.sum(1)[None, :, None] - 1
    return {"position_ids": torch.cat([text, (text + model.model.rope_deltas).expand(3, -1, -1)])}


def run(model: Any, name: str, policy: Any, oracle: Oracle) -> float:
    """Decode greedily by the oracle from a padded prompt with an image; return the largest difference of logits."""
    inputs = prompt(name, model, [9, 4], 20)
    tokens, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    worst = 0.0
    with EvictionCache(model, policy) as cache:
        for step in range(60):
            image = places(name, model, mask) if step else inputs
            expected = oracle.forward(tokens, mask, **image)
            logits = model(tokens, attention_mask=mask, past_key_values=cache, **image).logits[:, -1]
            worst = max(worst, (logits - expected).abs().max().item())
            tokens = expected.argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        receipt = cache.receipt()
        assert min(receipt.evictions) >= 7
        if worst <= 1e-9:
            for layer in receipt.layers:
                assert torch.equal(receipt.positions(layer), oracle.kept(layer))
    return worst


@pytest.mark.parametrize("policy", ["vase", "h2o", "keydiff"])
@pytest.mark.parametrize("name", VISION)
def test_an_image_in_the_prompt_is_evicted_as_the_oracle_evicts(name: str, policy: str) -> None:
    model = seeing(name, torch.float64)
    assert run(model, name, zoo(24)[policy], Oracle(model, zoo(24)[policy])) <= 1e-9


def test_the_pieces_of_an_image_see_each_other_where_the_model_says_so() -> None:
    class Causal(Oracle):
        def attend(self, *args: Any, **kwargs: Any) -> Tensor:
            self.together = None
            return super().attend(*args, **kwargs)

    model = seeing("gemma3_vl", torch.float64)
    assert run(model, "gemma3_vl", SMALL, Causal(model, SMALL)) > 1e-6


def test_a_used_cache_refuses_a_new_prompt_whose_positions_begin_again() -> None:
    model = seeing("qwen2_vl")
    inputs = prompt("qwen2_vl", model, [9], 20)
    text = torch.arange(inputs["input_ids"].shape[1])[None]
    positions = text.expand(4, 1, -1)
    with EvictionCache(model, SMALL) as cache:
        model(inputs["input_ids"].clamp(max=80), position_ids=positions, past_key_values=cache)
        with pytest.raises(UsageError, match="new prompt"):
            model(inputs["input_ids"].clamp(max=80), position_ids=positions, past_key_values=cache)


def test_a_mask_that_cannot_be_read_is_refused() -> None:
    model = seeing("gemma3_vl")
    tokens = torch.arange(2, 40)[None]
    masks = {
        kind: torch.ones(1, 1, 38, 38, dtype=torch.bool).tril() for kind in set(model.config.text_config.layer_types)
    }
    with EvictionCache(model, SMALL) as cache, pytest.raises(UsageError, match="two-dimensional"):
        model.get_decoder()(tokens, attention_mask=masks, past_key_values=cache)
