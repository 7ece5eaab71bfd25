"""What transformers' own tests say of inputs and of caches that go on: embeddings, padding, chunks, fixed shapes.

Each test has the name that it has there; ``docs/transformers-tests.md`` lists them all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

from kvpolicy import UsageError
from kvpolicy.adapters.hf import EvictionCache
from tests.hf.plain import NEW, PLENTY, PROMPT, SIX, TIGHT, both, loop, ours, tokens
from tests.models import tiny

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
FULL_ONLY = [family for family in SIX if family not in ("gemma3", "gpt_oss")]

families = pytest.mark.parametrize("family", SIX)


def ones(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a mask that says of each token that it is none of the pads."""
    return {"attention_mask": torch.ones(ids.shape[:2], dtype=torch.long)}


# Embeddings


@families
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_from_inputs_embeds(family: str, num_beams: int) -> None:
    model, ids = tiny(family), tokens(2, PROMPT)
    embedded, options = model.get_input_embeddings()(ids), {**GREEDY, "num_beams": num_beams}
    expected, found = both(model, inputs_embeds=embedded, **options)
    assert torch.equal(found, expected)
    evicting = ours(model, ids, **options)
    assert torch.equal(ours(model, inputs_embeds=embedded, **options), evicting[:, PROMPT:])
    assert torch.equal(ours(model, ids, inputs_embeds=embedded, **options), evicting)
    other = torch.rand(embedded.shape, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(ours(model, inputs_embeds=other, **options), evicting[:, PROMPT:])


@pytest.mark.parametrize("family", FULL_ONLY)
def test_generate_from_inputs_embeds_with_static_cache(family: str) -> None:
    model, ids = tiny(family), tokens(2, PROMPT)
    embedded = model.get_input_embeddings()(ids)
    found = ours(model, inputs_embeds=embedded, **GREEDY, static=True)
    assert torch.equal(found, loop(model, ids)[0][:, PROMPT:])


# Going on


@families
@pytest.mark.parametrize("policy", [PLENTY, TIGHT])
def test_generate_continue_from_past_key_values(family: str, policy: Any) -> None:
    """Two calls give the tokens, and leave the slots, that one gives."""
    model, ids, options = tiny(family), tokens(2, PROMPT), {"do_sample": False, "return_dict_in_generate": True}
    with EvictionCache(model, policy) as cache, EvictionCache(model, policy) as other:
        whole = model.generate(ids, **ones(ids), **options, max_new_tokens=NEW, past_key_values=other)
        part = model.generate(ids, **ones(ids), **options, max_new_tokens=NEW - 5, past_key_values=cache)
        said = part.sequences
        rest = model.generate(said, **ones(said), **options, max_new_tokens=5, past_key_values=part.past_key_values)
        assert torch.equal(rest.sequences, whole.sequences)
        assert rest.past_key_values is cache
        one, two = cache.receipt(), other.receipt()
        assert one.evictions == two.evictions
        for layer in one.layers:
            assert torch.equal(one.positions(layer), two.positions(layer))
    if policy is PLENTY:
        assert torch.equal(whole.sequences, model.generate(ids, **ones(ids), **GREEDY))


@families
@pytest.mark.parametrize("policy", [PLENTY, TIGHT])
def test_generate_continue_from_inputs_embeds(family: str, policy: Any) -> None:
    model, ids = tiny(family), tokens(2, PROMPT)
    embed = model.get_input_embeddings()
    expected = ours(model, ids, **GREEDY) if policy is TIGHT else model.generate(ids, **GREEDY)
    with EvictionCache(model, policy) as cache:
        first = model.generate(inputs_embeds=embed(ids), do_sample=False, max_new_tokens=NEW - 5, past_key_values=cache)
        whole = embed(torch.cat([ids, first], 1))
        rest = model.generate(inputs_embeds=whole, do_sample=False, max_new_tokens=5, past_key_values=cache)
    assert torch.equal(torch.cat([ids, first, rest], 1), expected)


@families
def test_cache_copy(family: str) -> None:
    """One prompt is read once; each question goes on from a copy of its cache."""
    model, prompt = tiny(family, torch.float64), tokens(1, PROMPT)
    questions = [torch.cat([prompt, tokens(1, 6, seed)], 1) for seed in (1, 2)]
    expected = []
    for question in questions:
        with EvictionCache(model, TIGHT) as cache:
            model(prompt, past_key_values=cache)
            expected.append(model.generate(question, **ones(question), **GREEDY, past_key_values=cache))
    with EvictionCache(model, TIGHT) as cache:
        model(prompt, past_key_values=cache)
        for question, answer in zip(questions, expected, strict=True):
            with copy.deepcopy(cache) as own:
                assert torch.equal(model.generate(question, **ones(question), **GREEDY, past_key_values=own), answer)
        assert cache.receipt().seen == (PROMPT,)


@families
def test_prefill_in_chunks(family: str) -> None:
    """Cut at every chunk, the prompt gives what the chunks give one after the other."""
    model, ids = tiny(family), tokens(2, 40)
    expected, found = both(model, ids, **GREEDY, prefill_chunk_size=10)
    assert torch.equal(found, expected)
    evicting = ours(model, ids, **GREEDY, prefill_chunk_size=10)
    with EvictionCache(model, TIGHT) as cache:
        for chunk in ids[:, :-10].split(10, 1):
            model(chunk, past_key_values=cache)
        assert torch.equal(model.generate(ids, **GREEDY, past_key_values=cache), evicting)


# Padding, positions, masks


@families
def test_left_padding_compatibility(family: str) -> None:
    model, ids, pads = tiny(family, torch.float64), tokens(2, PROMPT), 7
    padded = torch.nn.functional.pad(ids, (pads, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (pads, 0))
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    for generate in (lambda *a, **k: both(*a, **k)[1], ours):
        expected, found = generate(model, ids, **options), generate(model, padded, attention_mask=mask, **options)
        assert torch.equal(found.sequences[:, pads:], expected.sequences)
        for one, other in zip(found.logits, expected.logits, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


@families
def test_generate_with_and_without_position_ids(family: str) -> None:
    model, ids = tiny(family), tokens(2, PROMPT)
    positions = torch.arange(PROMPT).expand(2, -1)
    for generate in (lambda *a, **k: both(*a, **k)[1], ours):
        assert torch.equal(generate(model, ids, **GREEDY, position_ids=positions), generate(model, ids, **GREEDY))


def test_custom_4d_attention_mask() -> None:
    """Rows of one sequence that share a beginning: slots without order cannot tell which token a column hides."""
    model, ids = tiny("llama"), tokens(1, 12)
    mask = torch.ones(12, 12).tril()
    mask[8:, 4:8] = 0
    with EvictionCache(model, TIGHT) as cache, pytest.raises(UsageError, match="takes a causal one"):
        model(ids, attention_mask=(1 - mask)[None, None] * torch.finfo(torch.float32).min, past_key_values=cache)


@pytest.mark.parametrize("family", [family for family in SIX if family != "gpt_oss"])  # which has no sdpa
def test_eager_matches_sdpa_generate(family: str) -> None:
    model, ids, found = tiny(family), tokens(2, PROMPT), []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        found.append(ours(model, ids, **GREEDY))
    assert torch.equal(*found)


def test_inference_mode() -> None:
    model, ids = tiny("llama"), tokens(2, PROMPT)
    expected = loop(model, ids)[0]
    with torch.inference_mode():
        assert torch.equal(ours(model, ids, **GREEDY), expected)


# The form of the cache


@families
def test_past_key_values_format(family: str) -> None:
    """There is a layer for each layer, and each slot has the shape of a key: but no more than fit are held."""
    model, ids = tiny(family), tokens(2, PROMPT)
    with EvictionCache(model, TIGHT) as cache:
        out = model(ids, past_key_values=cache)
        assert out.past_key_values is cache
        assert len(cache) == model.config.num_hidden_layers
        assert cache.get_seq_length() == PROMPT
        heads, dim = model.config.num_key_value_heads, model.config.head_dim
        for group in cache.groups:
            assert group.store is not None
            shape = (len(group.layers), 2, heads, 24 + 8, dim)
            assert group.store.keys.shape == group.store.values.shape == shape


@families
def test_hybrid_cache(family: str) -> None:
    """Layers that do not evict hold what they hold in the stock cache, whatever the others forget."""
    model, ids, stock = tiny(family, torch.float64), tokens(2, PROMPT), DynamicCache(config=tiny(family).config)
    model(ids, past_key_values=stock)
    with EvictionCache(model, PLENTY) as cache:
        model(ids, past_key_values=cache)
        for i in cache.receipt().skipped:
            for name, held in vars(stock.layers[i]).items():
                if isinstance(held, torch.Tensor):
                    assert torch.allclose(getattr(cache.layers[i], name).to(held), held), name
        for group in cache.groups:
            assert group.store is not None
            for index, layer in enumerate(group.layers):  # nothing was evicted: slots are in order
                assert torch.allclose(group.store.keys[index, :, :, :PROMPT], stock.layers[layer].keys)
                assert torch.allclose(group.store.values[index, :, :, :PROMPT], stock.layers[layer].values)


def test_reorder_cache() -> None:
    model, ids, order = tiny("llama", torch.float64), tokens(4, PROMPT), torch.tensor([2, 2, 0, 3])
    with EvictionCache(model, TIGHT) as cache, EvictionCache(model, TIGHT) as other:
        model(ids, past_key_values=cache)
        cache.reorder_cache(order)
        model(ids[order], past_key_values=other)
        assert torch.equal(cache.receipt().positions(0), other.receipt().positions(0))
        new = tokens(4, 1, 5)
        one, two = (model(new, past_key_values=each).logits for each in (cache, other))
        assert torch.allclose(one, two, atol=1e-9)


@pytest.mark.parametrize("implementation", ["static", "quantized", "dynamic"])
def test_generate_with_quant_cache(implementation: str) -> None:
    """``generate()`` itself refuses to make another cache beside the one that it is given."""
    model, ids = tiny("llama"), tokens(2, PROMPT)
    with EvictionCache(model, TIGHT) as cache, pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, **GREEDY, past_key_values=cache, cache_implementation=implementation)


# Fixed shapes


@pytest.fixture
def compiled() -> Iterator[dict[str, Any]]:
    """Return the option that lets ``generate()`` compile on a CPU, too, into one graph."""
    torch._dynamo.reset()
    counters.clear()
    config: Any = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True
    yield {"compile_config": config}
    torch._dynamo.reset()


@families
def test_generate_with_static_cache(family: str) -> None:
    model, ids = tiny(family), tokens(2, PROMPT)
    assert torch.equal(ours(model, ids, **GREEDY, static=True), loop(model, ids)[0])
    with EvictionCache(model, PLENTY, static=True) as cache:
        found = model.generate(ids, **GREEDY, past_key_values=cache)
    assert torch.equal(found, model.generate(ids, **GREEDY))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generate_compile_model_forward_fullgraph(family: str, compiled: dict[str, Any]) -> None:
    """Two batches of one shape, one after the other: one graph, and the tokens of a loop."""
    model = tiny(family)
    with EvictionCache(model, TIGHT, static=True) as cache:
        for seed in (1, 2):
            ids = tokens(2, PROMPT, seed)
            found = model.generate(ids, **ones(ids), **GREEDY, **compiled, past_key_values=cache)
            assert counters["stats"]["unique_graphs"] == 1
            assert torch.equal(found, loop(model, ids)[0])
            cache.reset()


def test_generate_compilation_all_outputs(compiled: dict[str, Any]) -> None:
    model, ids = tiny("llama"), tokens(2, PROMPT)
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    expected, found = ours(model, ids, **options), ours(model, ids, **options, **compiled, static=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    for step, other_step in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(step, other_step, strict=True))
