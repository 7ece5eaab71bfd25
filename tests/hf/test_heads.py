"""Budgets that differ over the heads of a layer: exact, and freed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import (
    AccumulatedAttention,
    Adaptive,
    Allocator,
    Attention,
    BudgetError,
    KeyNorm,
    PerHead,
    Policy,
    Recency,
    Sinks,
    Stochastic,
    TopK,
    Uniform,
    UnsupportedError,
    ValueGuard,
)
from kvpolicy.adapters.flash_attn.backends.reference import Reference
from kvpolicy.adapters.hf import EvictionCache, attention, replay
from kvpolicy.ragged import RaggedStore
from tests.families import FAMILIES
from tests.hf.test_oracle import padded, run
from tests.hf.test_replay import one_by_one
from tests.hf.test_rows import rows_alone
from tests.models import real, tiny, tokenizer


def vase(allocator: Allocator, interval: int = 8) -> Policy:
    chain = Attention(16, over="all") >> ValueGuard(sinks=2) >> Stochastic() >> TopK(allocator)
    return Policy(chain, interval=interval, recent=8)


POLICIES = {
    "vase, adaptive": vase(Adaptive(24)),
    "vase, adaptive, refreshed": vase(Adaptive(24, floor=0.5, refresh=2)),
    "snapkv, adaptive": Policy(Attention(16, over="all") >> TopK(Adaptive(20)), interval=8, recent=8),
    "h2o, adaptive": Policy(AccumulatedAttention(16) >> TopK(Adaptive(20, floor=0.3)), interval=8, recent=8),
    "key norm, adaptive": Policy(KeyNorm() >> TopK(Adaptive(24, floor=0)), interval=8, recent=8),
    "vase, split": vase(PerHead((40, 16))),
    "streaming, split": Policy(Recency() >> Sinks(2) >> TopK(PerHead((200, 16))), interval=8, recent=8),
    "h2o, split": Policy(AccumulatedAttention(16) >> TopK(PerHead((16, 30))), interval=8, recent=8),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_equal_to_the_oracle(family: str, name: str) -> None:
    model = tiny(family, FAMILIES[family].dtype)
    tokens, mask = padded([40, 33, 9], 97)
    worst, scale, evictions = run(model, POLICIES[name], tokens, mask, 90)
    assert evictions >= 5
    assert worst <= FAMILIES[family].tolerance * max(1.0, scale)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("allocator", [Adaptive(56), PerHead((96, 40, 32))])
def test_the_real_model(allocator: Allocator) -> None:
    policy = Policy(Attention(16) >> ValueGuard() >> Stochastic() >> TopK(allocator), interval=8, recent=16)
    text = "The history of the lighthouse begins in Alexandria, where a tower of stone, " * 5
    tokens = tokenizer()(text, return_tensors="pt").input_ids[:, :72]
    worst, scale, evictions = run(real(), policy, tokens, torch.ones_like(tokens), 66)
    assert evictions >= 5
    assert worst <= 2e-5 * scale


def text(rows: int, width: int) -> Tensor:
    return torch.randint(2, 97, (rows, width), generator=torch.Generator().manual_seed(3))


def stores(cache: EvictionCache) -> list[RaggedStore]:
    found = [group.store for group in cache.groups]
    assert all(isinstance(store, RaggedStore) for store in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("allocator", [Adaptive(24), Adaptive(24, floor=0, refresh=1), PerHead((40, 16))])
def test_bytes_are_the_sum_over_heads(allocator: Allocator) -> None:
    """Nothing is hidden in place of being freed: a layer is as large as its heads' budgets and interval."""
    model = tiny("llama", torch.float64)
    policy = Policy(KeyNorm() >> Stochastic() >> TopK(allocator), interval=8, recent=8)
    tokens, mask = padded([40, 33], 97)
    budgets = sum(allocator.heads) if isinstance(allocator, PerHead) else 2 * 24
    before: list[int] = []
    layers, dim, rows = len(model.model.layers), model.config.hidden_size // model.config.num_attention_heads, 2
    lines = layers * rows * (budgets + 2 * 8)
    with EvictionCache(model, policy) as cache:
        for ids in (tokens, *text(2, 40).split(1, 1)):
            more = ids.shape[1] == 1
            mask = torch.cat([mask, torch.ones_like(ids)], 1) if more else mask
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
            receipt = cache.receipt()
            # Keys and values in float64, position and order in int32, KeyNorm's number in float32.
            assert receipt.nbytes == lines * (2 * dim * 8 + 2 * 4 + 4)
            addresses = [t.data_ptr() for store in stores(cache) for t in store.tensors()]
            assert addresses == before or not more
            before = addresses
        for store in stores(cache):
            assert bool((store.budgets.sum(-1) == budgets).all())
            kept = (store.positions >= 0).sum(-1)
            assert bool((kept == store.held.sum(-1)).all())


def test_adaptive_heads_differ_and_totals_are_exact() -> None:
    model = tiny("llama", torch.float64)
    policy = Policy(Attention(16, over="all") >> TopK(Adaptive(24, floor=0.25)), interval=8, recent=8)
    with EvictionCache(model, policy) as cache:
        model(text(2, 60), past_key_values=cache)
        for store in stores(cache):
            assert bool((store.held.sum(-1) == 48).all())
            assert int(store.held.min()) >= 8 + 4
            assert len(store.held.unique()) > 1
        receipt = cache.receipt()
        for layer in receipt.layers:
            assert bool(((receipt.positions(layer) >= 0).sum((1, 2)) == 48).all())


@pytest.mark.parametrize("name", ["vase, adaptive", "vase, adaptive, refreshed", "h2o, adaptive", "streaming, split"])
def test_a_row_of_a_padded_batch_is_its_single_run(name: str) -> None:
    model, (tokens, mask) = tiny("llama", torch.float64), padded([40, 20, 9], 97)
    policy, new = POLICIES[name], text(3, 50)
    alone = rows_alone(model, [policy] * 3, [0] * 3, tokens, mask, new)
    with EvictionCache(model, policy) as cache:
        logits, ids = [], tokens
        for step in range(51):
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            logits.append(model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits[:, -1])
            if step < 50:
                ids, mask = new[:, step : step + 1], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        receipt = cache.receipt()
    for r, (expected, kept, evictions) in enumerate(alone):
        assert (torch.stack(logits, 1)[r] - expected).abs().max() <= 1e-9
        assert receipt.evictions[r] == evictions
        for layer, positions in kept.items():
            assert torch.equal(receipt.positions(layer)[r, :, : positions.shape[1]], positions)


@pytest.mark.parametrize("allocator", [Adaptive(24, floor=1), PerHead((24, 24))])
def test_equal_budgets_are_an_ordinary_cache(allocator: Allocator) -> None:
    """Heads that all keep as many, in a ragged layer, keep what they keep in an ordinary one."""
    model, tokens, new = tiny("llama", torch.float64), text(2, 50), text(2, 40)
    found = []
    for policy in (vase(allocator), vase(Uniform(24))):
        with EvictionCache(model, policy) as cache:
            logits = [model(tokens, past_key_values=cache).logits[:, -1]]
            logits += [model(ids, past_key_values=cache).logits[:, -1] for ids in new.split(1, 1)]
            found.append((torch.stack(logits), cache.receipt()))
    (ours, mine), (theirs, other) = found
    assert (ours - theirs).abs().max() <= 1e-9
    assert all(torch.equal(mine.positions(layer), other.positions(layer)) for layer in mine.layers)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {}])
def test_generate(options: dict[str, Any]) -> None:
    """Rows that are never cut generate what an ordinary cache does, beams among them."""
    model, (tokens, mask) = tiny("llama", torch.float64), padded([30, 20], 97)
    how = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "attention_mask": mask, **options}
    torch.manual_seed(0)
    expected = model.generate(tokens, **how)
    with EvictionCache(model, vase(Adaptive(100))) as cache:
        torch.manual_seed(0)
        assert torch.equal(model.generate(tokens, past_key_values=cache, **how), expected)
    with EvictionCache(model, vase(Adaptive(24))) as cache:
        model.generate(tokens, past_key_values=cache, **how)
        for store in stores(cache):
            store.check_integrity()


def test_replay_a_fork_and_a_second_turn() -> None:
    model, tokens, policy = tiny("llama", torch.float64), text(2, 120), POLICIES["vase, adaptive"]
    expected, kept = one_by_one(model, policy, tokens, torch.ones_like(tokens), 50)
    assert min(kept.evictions) >= 5
    found = replay(model, policy, tokens, 50)
    assert (found.log_probs - expected).abs().max() <= 1e-9
    for layer in kept.layers:
        assert torch.equal(found.receipt.positions(layer), kept.positions(layer))
    with EvictionCache(model, policy) as cache:
        model(tokens[:, :60], past_key_values=cache)
        with cache.fork([1, 0, 1]) as fork:
            turned = fork.receipt().positions(0)
            assert torch.equal(turned[0], cache.receipt().positions(0)[1])
            for one in (cache, fork):
                named = torch.tensor([1, 0, 1] if one is fork else [0, 1])
                more = tokens[named, 60:90]
                one.last_logits = model(more, past_key_values=one).logits[:, -1]  # type: ignore[attr-defined]
                for store in stores(one):
                    store.check_integrity()
            assert (fork.last_logits - cache.last_logits[torch.tensor([1, 0, 1])]).abs().max() <= 1e-9  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["vase, adaptive", "vase, split"])
@pytest.mark.parametrize("decoded", [5, 10])
def test_tokens_taken_back_were_never_there(name: str, decoded: int) -> None:
    """Before the first eviction of decoded tokens, and behind it."""
    model, tokens, new, policy = tiny("llama", torch.float64), text(1, 50), text(1, 40), POLICIES[name]
    found = []
    for taken in (2, 0):
        with EvictionCache(model, policy) as cache:
            model(tokens, past_key_values=cache)
            for ids in new[:, : decoded + taken].split(1, 1):
                model(ids, past_key_values=cache)
            if taken:
                cache.crop(-taken)
            logits = [model(ids, past_key_values=cache).logits for ids in new[:, decoded : decoded + 5].split(1, 1)]
            for store in stores(cache):
                store.check_integrity()
            found.append((torch.cat(logits), cache.receipt()))
    assert found[0][1].seen == found[1][1].seen
    assert (found[0][0] - found[1][0]).abs().max() <= 1e-9
    for layer in found[0][1].layers:
        assert torch.equal(found[0][1].positions(layer), found[1][1].positions(layer))


def test_tokens_that_were_there_at_an_eviction_are_taken_back() -> None:
    model, tokens, new = tiny("llama", torch.float64), text(1, 50), text(1, 20)
    with EvictionCache(model, POLICIES["vase, adaptive"]) as cache:
        model(tokens, past_key_values=cache)
        for ids in new[:, :9].split(1, 1):  # evicted after the eighth
            model(ids, past_key_values=cache)
        held = [store.held.clone() for store in stores(cache)]
        cache.crop(-3)
        for store, before in zip(stores(cache), held, strict=True):
            store.check_integrity()
            assert bool((store.held == before - 3).all())
            assert int(store.positions.max()) == 50 + 9 - 3 - 1
        model(new[:, 9:10], past_key_values=cache)
        for store in stores(cache):
            store.check_integrity()


def test_a_kernel_for_all_heads_gives_what_a_call_a_head_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU all heads are one call: here by the reference, which has the kernel's signature."""
    model, tokens, new = tiny("llama", torch.float64), text(2, 50), text(2, 40)
    found, calls = [], []

    def kernel(*known: Any) -> Reference:
        calls.append(known)
        return Reference()

    for _ in range(2):
        with EvictionCache(model, POLICIES["vase, adaptive"]) as cache:
            logits = [model(tokens, past_key_values=cache).logits[:, -1]]
            logits += [model(ids, past_key_values=cache).logits[:, -1] for ids in new.split(1, 1)]
            found.append(torch.stack(logits))
        monkeypatch.setattr(attention, "_kernel", kernel)
    assert len(calls) == 40 * len(model.model.layers)
    assert (found[0] - found[1]).abs().max() <= 1e-9


REFUSED: dict[str, tuple[type[Exception], str, Any, dict[str, Any]]] = {
    "three heads": (BudgetError, "names 3 heads, and the model has 2 KV heads", PerHead((30, 20, 20)), {}),
    "another number of layers": (BudgetError, "names 2 layers", PerHead(((30, 20), (20, 20))), {}),
    "no room": (BudgetError, "a budget of 8 is not larger than recent=8|protects", PerHead((30, 8)), {}),
    "static": (UnsupportedError, "static=True", Adaptive(24), {"static": True}),
    "drafts": (UnsupportedError, "max_draft_tokens", Adaptive(24), {"max_draft_tokens": 4}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_when_bound(what: str) -> None:
    error, message, allocator, options = REFUSED[what]
    with pytest.raises(error, match=message):
        EvictionCache(tiny("llama"), vase(allocator), **options)


def test_rows_of_several_policies_and_saving_are_refused() -> None:
    model, tokens = tiny("llama"), text(2, 40)
    with pytest.raises(UnsupportedError, match="a policy for each row"):
        EvictionCache(model, [vase(Adaptive(24)), vase(Adaptive(25))])
    with EvictionCache(model, vase(Adaptive(24))) as cache:
        model(tokens, past_key_values=cache)
        with pytest.raises(UnsupportedError, match=r"save\(\)"):
            cache.save("never.safetensors")


@pytest.mark.parametrize("name", ["vase, adaptive, refreshed", "h2o, adaptive", "streaming, split"])
def test_a_small_workspace_shows_fewer_rows_at_once(name: str) -> None:
    model, (tokens, mask), new = tiny("llama", torch.float64), padded([40, 33, 9], 97), text(3, 30)
    found = []
    for workspace in (2**28, 1):
        with EvictionCache(model, POLICIES[name], workspace=workspace) as cache:
            ids, more, out = tokens, mask, torch.zeros(0)
            for step in range(31):
                places = (more.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                out = model(ids, attention_mask=more, position_ids=places, past_key_values=cache).logits[:, -1]
                ids, more = new[:, step : step + 1], torch.cat([more, torch.ones_like(more[:, :1])], 1)
            found.append((out, cache.receipt()))
    assert (found[0][0] - found[1][0]).abs().max() <= 1e-9
    assert all(torch.equal(found[0][1].positions(i), found[1][1].positions(i)) for i in found[0][1].layers)
