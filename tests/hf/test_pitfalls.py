"""What other tools got wrong, as docs/pitfalls.md lists it: each test fails if that comes back.

Where another test already is the test of an entry, the page names that one instead.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvpolicy import UnsupportedError
from kvpolicy.adapters.hf import EvictionCache
from tests.hf.test_oracle import padded
from tests.hf.zoo import zoo
from tests.models import tiny

ZOO = zoo(24)


def tokens(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 97, (rows, width), generator=torch.Generator().manual_seed(seed))


def feed(model: Any, cache: Any, ids: Tensor, prompt: int) -> Tensor:
    """Return the logits of each step: a prompt, then one token at a time."""
    steps = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
    return torch.stack([model(step, past_key_values=cache).logits[:, -1] for step in steps], 1)


# What is refused


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_that_cannot_be_stood_in_for_is_refused(name: str) -> None:
    model = tiny("llama")
    model.config._attn_implementation = name  # as a model that was loaded with it has it
    with pytest.raises(UnsupportedError, match=rf"attn_implementation='{name}'; load it with attn_implementation='s"):
        EvictionCache(model, ZOO["vase"])


# Batches and pads


@pytest.mark.parametrize("name", ["knorm", "keydiff", "vase"])
def test_pads_are_never_kept(name: str) -> None:
    model, policy = tiny("llama", torch.float64), zoo(50)[name]
    prompts, mask = padded([100, 20], 97)
    with EvictionCache(model, policy) as cache:
        model.generate(prompts, attention_mask=mask, max_new_tokens=40, do_sample=False, past_key_values=cache)
        receipt = cache.receipt()
    assert receipt.seen == (139, 59)
    with EvictionCache(model, policy) as cache:
        model.generate(prompts[1:, 80:], max_new_tokens=40, do_sample=False, past_key_values=cache)
        alone = cache.receipt()
    for layer in receipt.layers:
        kept = receipt.positions(layer)[1]
        slots = alone.slots[0]
        assert torch.equal(kept[:, :slots], alone.positions(layer)[0])
        assert (kept[:, slots:] == -1).all()


def test_no_row_decides_for_another() -> None:
    model, ids = tiny("llama", torch.float64), torch.cat([tokens(1, 60, seed) for seed in range(3)])
    with EvictionCache(model, ZOO["snapkv"]) as cache:
        feed(model, cache, ids, 40)
        together = cache.receipt().positions(1)
    for r in range(3):
        with EvictionCache(model, ZOO["snapkv"]) as cache:
            feed(model, cache, ids[r : r + 1], 40)
            assert torch.equal(together[r], cache.receipt().positions(1)[0])
    assert not torch.equal(together[0], together[1])  # or rows that share one set would not be noticed


# Beams


@pytest.mark.parametrize("name", ["vase", "h2o", "streaming_llm", "random_eviction"])
def test_a_beam_is_its_own_single_run(name: str) -> None:
    """Reordering moves tokens, positions, queries and sums together."""
    model, ids = tiny("llama", torch.float64), tokens(1, 30)
    with EvictionCache(model, ZOO[name]) as cache:
        histories, moved = Tensor(), 0
        reorder = cache.reorder_cache

        def note_order(order: Any) -> None:
            nonlocal histories, moved
            histories, moved = histories[order], moved + int((order != torch.arange(len(order))).any())
            reorder(order)

        def note_tokens(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal histories
            new = kwargs["input_ids"]
            histories = torch.cat([histories, new], 1) if histories.numel() else new

        cache.reorder_cache = note_order  # type: ignore[method-assign, assignment]
        hook = model.register_forward_pre_hook(note_tokens, with_kwargs=True)
        model.generate(ids, num_beams=4, max_new_tokens=40, do_sample=False, past_key_values=cache)
        hook.remove()
        assert moved >= 5
        logits = model(tokens(1, 1).repeat(4, 1), past_key_values=cache).logits
        receipt = cache.receipt()
    assert len({tuple(row) for row in histories.tolist()}) > 1
    for r in range(4):
        with EvictionCache(model, ZOO[name]) as cache:
            feed(model, cache, histories[r : r + 1], 30)
            assert (model(tokens(1, 1), past_key_values=cache).logits[0] - logits[r]).abs().max() <= 1e-9
            for layer in receipt.layers:
                assert torch.equal(cache.receipt().positions(layer)[0], receipt.positions(layer)[r])


# Randomness


def test_layers_and_heads_draw_apart_and_nothing_global_is_read() -> None:
    model, ids, kept = tiny("llama"), tokens(1, 100), []
    for seed in (1, 2):  # the global generator must not matter
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with EvictionCache(model, ZOO["random_eviction"]) as cache:
            feed(model, cache, ids, 60)
            kept.append(torch.cat([cache.receipt().positions(layer)[0] for layer in range(3)]))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*kept)
    assert len({tuple(head) for head in kept[0].tolist()}) == 6  # three layers of two heads
