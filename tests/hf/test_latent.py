"""Latent attention: what a policy sees scores as the model attends, and takes the memory of one head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kvpolicy import UnsupportedError
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.hf.latent import Latent, latents_of
from tests.families import DEEPSEEK, LINEAR, SMALL
from tests.hf.test_oracle import padded, run
from tests.hf.zoo import zoo
from tests.models import sharpen, tiny
from tests.oracle import Oracle

LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "longcat_flash")


def held(family: str) -> tuple[Any, EvictionCache, Any]:
    """Return a model, a cache that has seen 40 tokens and evicted, and its store."""
    model = tiny(family, torch.float64)
    cache = EvictionCache(model, zoo(24)["vase"])
    model(torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(1)), past_key_values=cache)
    store = cache.groups[0].store
    assert store is not None
    return model, cache, store


@pytest.mark.parametrize("family", LATENT)
def test_scores_equal_those_of_the_expanded_keys(family: str) -> None:
    model, _, store = held(family)
    for layer, latent in latents_of(model).items():
        keys, queries = store.keys[layer, :, :, :24], store.window.queries[layer]
        module = latent.module
        expanded, values = module.expand_kv(*latent.parts(keys))
        expected = queries @ expanded.transpose(2, 3)
        found = latent.absorbed(queries) @ keys.transpose(2, 3)
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
        # What attention makes of the latents is what it makes of the expanded values, before the same matrix.
        weight = module.kv_b_proj.weight.view(latent.heads, -1, latent.rank)[:, latent.plain :]
        from_latents = torch.einsum("bsr,hvr->bhsv", store.values[layer, :, 0, :24], weight)
        assert (from_latents - values).abs().max() <= 1e-12


def test_a_layer_takes_the_memory_of_one_head() -> None:
    _, cache, store = held("deepseek_v3")
    capacity, window, rows = 32, 16, 2
    slots = capacity * (12 + 4) * 8  # the latent and the rotated key; a value is a part of them
    order, norms = 8 * capacity, 4 * capacity
    queries = 4 * window * (8 + 4) * 8 + 4 * window  # as the model asks them, not as large as the latents
    assert cache.receipt().nbytes == 3 * rows * (slots + order + norms + queries)
    assert store.values.data_ptr() == store.keys.data_ptr()
    assert (store.spec.num_heads, store.spec.num_query_heads) == (1, 4)


@pytest.mark.parametrize("name", ["vase", "h2o", "mixture", "keydiff"])
def test_several_turns_equal_the_oracle(name: str) -> None:
    model, policy = tiny("deepseek_v3", torch.float64), zoo(24)[name]
    oracle = Oracle(model, policy)
    with EvictionCache(model, policy) as cache:
        for width in (30, 1, 1, 7, 1, 40, 3, *[1] * 20):
            ids = torch.randint(2, 97, (2, width), generator=torch.Generator().manual_seed(width))
            expected = oracle.forward(ids)
            assert (model(ids, past_key_values=cache).logits[:, -1] - expected).abs().max() <= 1e-9
            for layer in (0, 1, 2):
                assert torch.equal(cache.receipt().positions(layer), oracle.kept(layer))


@pytest.mark.parametrize("name", ["vase", "h2o"])
def test_layers_in_one_view_or_many(name: str) -> None:
    model, kept = tiny("deepseek_v3", torch.float64), []
    ids = torch.randint(2, 97, (2, 60), generator=torch.Generator().manual_seed(3))
    for workspace in (2**28, 2**17, 2**13):  # all rows at once, some, one by one
        with EvictionCache(model, zoo(24)[name], workspace=workspace) as cache:
            model(ids[:, :30], past_key_values=cache)
            logits = [model(one, past_key_values=cache).logits for one in ids[:, 30:].split(1, 1)]
            kept.append((torch.cat(logits, 1), *(cache.receipt().positions(layer) for layer in range(3))))
    for other in kept[1:]:
        for a, b in zip(kept[0], other, strict=True):
            assert torch.equal(a, b) if a.dtype == torch.int64 else (a - b).abs().max() <= 1e-12


def test_rows_are_reordered_once() -> None:
    model = tiny("deepseek_v3", torch.float64)
    ids = torch.randint(2, 97, (3, 50), generator=torch.Generator().manual_seed(3))
    turned = torch.tensor([2, 0, 1])
    found: list[Tensor] = []
    for order in (torch.arange(3), turned):
        with EvictionCache(model, zoo(24)["vase"]) as cache:
            model(ids[:, :40], past_key_values=cache)
            cache.reorder_cache(order)
            found.append(
                torch.cat([model(one[order], past_key_values=cache).logits for one in ids[:, 40:].split(1, 1)], 1)
            )
    assert (found[0][turned] - found[1]).abs().max() <= 1e-12


def test_a_projection_that_is_no_plain_linear_layer() -> None:
    """Quantised weights have shapes of their own; what they make of unit vectors has not."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = tiny("deepseek_v3", torch.float64)
    queries = torch.randn(2, 4, 5, 12, dtype=torch.float64)
    before = {layer: latent.absorbed(queries) for layer, latent in latents_of(model).items()}
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Wrapped(layer.self_attn.kv_b_proj)
    for layer, latent in latents_of(model).items():
        assert (latent.absorbed(queries) - before[layer]).abs().max() <= 1e-12


def test_what_is_no_latent_is_refused() -> None:
    latent = Latent(nn.Identity(), heads=4, rank=12, plain=8)
    for latents, rotated in (
        ((2, 4, 3, 12), (2, 1, 3, 4)),
        ((2, 1, 3, 10), (2, 1, 3, 4)),
        ((2, 1, 3, 12), (2, 4, 3, 4)),
    ):
        with pytest.raises(UnsupportedError, match="layer 5 gives its cache"):
            latent.joined(5, torch.zeros(latents), torch.zeros(rotated))


@pytest.mark.slow
def test_latent_and_linear_layers_in_one_model() -> None:
    torch.manual_seed(0)
    options = {**SMALL, **DEEPSEEK, **LINEAR, "q_lora_rank": None}
    model = sharpen(transformers.KimiLinearForCausalLM(transformers.KimiLinearConfig(**options)))
    model.set_experts_implementation("eager")
    worst, _, evictions = run(model.to(torch.float64).eval(), zoo(24)["vase"], *padded([40, 33], 97), 9)
    assert evictions == 2
    assert worst <= 1e-9
