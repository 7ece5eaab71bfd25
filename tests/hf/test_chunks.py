"""Prompts in chunks, with evictions between them, and how much memory that takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpolicy import UsageError
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.hf.compat import VERSION
from tests.hf.zoo import zoo
from tests.models import tiny
from tests.oracle import Oracle


def tokens(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 97, (rows, width), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["vase", "h2o", "snapkv", "random_eviction", "tova"])
def test_a_prompt_in_chunks_equals_the_oracle(name: str) -> None:
    model, policy, ids = tiny("llama", torch.float64), zoo(24)[name], tokens(2, 100)
    oracle = Oracle(model, policy)
    with EvictionCache(model, policy) as cache:
        for chunk in ids.split(16, 1):
            expected = oracle.forward(chunk)
            found = model(chunk, past_key_values=cache).logits[:, -1]
            assert (found - expected).abs().max() <= 1e-9
            assert torch.equal(cache.receipt().positions(0), oracle.kept(0))
        assert cache.receipt().evictions == (6, 6)
        assert cache.groups[0].store is not None
        assert cache.groups[0].store.rows[0].prompt == 100


def test_generate_in_chunks_is_the_stock_where_nothing_is_evicted() -> None:
    model, ids = tiny("llama", torch.float64), tokens(2, 50)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    with EvictionCache(model, zoo(200)["vase"]) as cache:
        found = model.generate(ids, max_new_tokens=20, do_sample=False, prefill_chunk_size=16, past_key_values=cache)
    assert torch.equal(found, expected)


@pytest.mark.skipif(VERSION[0] == "4", reason="transformers 4 decodes the last token of a chunked prompt")
def test_generate_in_chunks_evicts_between_them() -> None:
    model, ids, policy = tiny("llama", torch.float64), tokens(2, 100), zoo(24)["vase"]
    with EvictionCache(model, policy) as cache:
        logits = [model(chunk, past_key_values=cache).logits[:, -1] for chunk in ids.split(16, 1)]
        expected = [logits[-1].argmax(-1)]
        for _ in range(19):
            expected.append(model(expected[-1][:, None], past_key_values=cache).logits[:, -1].argmax(-1))
        receipt = cache.receipt()
    with EvictionCache(model, policy) as cache:
        found = model.generate(ids, max_new_tokens=20, do_sample=False, prefill_chunk_size=16, past_key_values=cache)
        assert torch.equal(found[:, 100:], torch.stack(expected, 1))
        assert torch.equal(cache.receipt().positions(0), receipt.positions(0))


def test_a_last_chunk_of_one_token_is_prompt_where_its_length_is_named() -> None:
    model, ids, policy = tiny("llama", torch.float64), tokens(1, 65), zoo(24)["random_eviction"]

    def prompt_of(**options: Any) -> int:
        with EvictionCache(model, policy, **options) as cache:
            for chunk in ids.split(16, 1):
                model(chunk, past_key_values=cache)
            store = cache.groups[0].store
            assert store is not None
            assert store.rows[0].prompt + store.rows[0].decoded == 65
            assert store.rows[0].length == (24 if options else 25)
            return store.rows[0].prompt

    assert prompt_of() == 64
    assert prompt_of(prompt_length=65) == 65


def test_chunks_must_end_where_the_prompt_ends_and_at_evictions() -> None:
    model, ids = tiny("llama"), tokens(1, 60)
    with EvictionCache(model, zoo(24)["vase"], prompt_length=30) as cache:
        with pytest.raises(UsageError, match="prompt_length=30, and this forward pass has columns 0 to 31"):
            model(ids[:, :31], past_key_values=cache)
        model(ids[:, :30], past_key_values=cache)
        with pytest.raises(UsageError, match="9 tokens behind the prompt, and an eviction is due after 8"):
            model(ids[:, 30:39], past_key_values=cache)
        model(ids[:, 30:35], past_key_values=cache)
        assert cache.until_eviction() == 3
        model(ids[:, 35:38], past_key_values=cache)
        assert cache.receipt().evictions == (2,)


def test_the_peak_is_the_capacity_and_one_chunk_of_one_layer() -> None:
    model, ids, policy = tiny("llama", torch.float64), tokens(1, 512), zoo(24)["vase"]
    bytes_of_a_token = 2 * (8 + 8) * 8  # two heads, keys and values of eight float64
    with EvictionCache(model, policy) as cache:
        model(ids, past_key_values=cache)
        whole = cache.receipt()
    with EvictionCache(model, policy) as cache:
        for chunk in ids.split(32, 1):
            model(chunk, past_key_values=cache)
        chunks = cache.receipt()
    assert whole.turn_nbytes == 512 * bytes_of_a_token
    assert chunks.turn_nbytes == (24 + 32) * bytes_of_a_token
    assert chunks.peak_nbytes == chunks.nbytes + chunks.turn_nbytes
    assert chunks.nbytes == whole.nbytes
    assert "besides during the largest turn" in str(chunks)
