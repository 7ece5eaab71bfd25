"""Turns, reuse, interleaved caches, prompts beyond the capacity, and every misuse by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from kvpolicy import (
    Attention,
    BindError,
    BudgetError,
    KeyNorm,
    Policy,
    Recency,
    Scorer,
    Scores,
    Sinks,
    TopK,
    UnsupportedError,
    UsageError,
    ValueGuard,
)
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.policies import snapkv, streaming_llm, vase
from tests.hf.zoo import zoo
from tests.models import tiny
from tests.oracle import Oracle

SMALL = zoo(24)["vase"]


def tokens(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 97, (rows, width), generator=torch.Generator().manual_seed(seed))


def decode(model: Any, cache: EvictionCache, ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([model(one, past_key_values=cache).logits[:, -1] for one in ids.split(1, 1)], 1)


# What works


@pytest.mark.parametrize("name", zoo(24))
def test_several_turns_equal_the_oracle(name: str) -> None:
    model, policy = tiny("llama", torch.float64), zoo(24)[name]
    oracle = Oracle(model, policy)
    with EvictionCache(model, policy) as cache:
        for width, seed in (
            (30, 1),
            (1, 2),
            (1, 3),
            (7, 4),
            (1, 5),
            (40, 6),
            (3, 7),
            *((1, s) for s in range(20)),
        ):
            ids = tokens(2, width, seed)
            expected = oracle.forward(ids)
            assert (model(ids, past_key_values=cache).logits[:, -1] - expected).abs().max() <= 1e-9
            for layer in (0, 1, 2):
                assert torch.equal(cache.receipt().positions(layer), oracle.kept(layer))
        assert cache.groups[0].store is not None
        assert cache.groups[0].store.rows[0].prompt == 30  # later turns are not prompt


def test_generate_continues_a_conversation() -> None:
    model = tiny("llama", torch.float64)
    first, question = tokens(1, 40), tokens(1, 12, 9)
    with EvictionCache(model, SMALL) as cache:
        said = model.generate(first, max_new_tokens=20, do_sample=False, past_key_values=cache)
        whole = torch.cat([said, question], 1)
        answer = model.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            max_new_tokens=10,
            do_sample=False,
            past_key_values=cache,
        )
        assert cache.receipt().seen == (40 + 20 + 12 + 9,)
    oracle = Oracle(model, SMALL)
    logits = oracle.forward(first)
    for one in said[:, 40:-1].split(1, 1):
        logits = oracle.forward(one)
    logits = oracle.forward(whole[:, 59:])
    for one in answer[:, 72:].split(1, 1):
        assert torch.equal(logits.argmax(-1, keepdim=True), one)
        logits = oracle.forward(one)


def test_sampling_is_the_stock_sampling_where_nothing_is_evicted() -> None:
    model, ids = tiny("llama"), tokens(2, 20)
    torch.manual_seed(11)
    expected = model.generate(ids, max_new_tokens=30, do_sample=True, temperature=0.8)
    with EvictionCache(model, zoo(128)["vase"]) as cache:
        torch.manual_seed(11)
        found = model.generate(ids, max_new_tokens=30, do_sample=True, temperature=0.8, past_key_values=cache)
    assert torch.equal(found, expected)


def test_two_interleaved_caches_under_one_policy_never_meet() -> None:
    model, a, b = tiny("llama", torch.float64), tokens(1, 70, 1), tokens(1, 70, 2)
    alone = []
    for ids in (a, b):
        with EvictionCache(model, SMALL) as cache:
            model(ids[:, :30], past_key_values=cache)
            alone.append(decode(model, cache, ids[:, 30:]))
    with EvictionCache(model, SMALL) as one, EvictionCache(model, SMALL) as two:
        model(a[:, :30], past_key_values=one)
        model(b[:, :30], past_key_values=two)
        steps = [
            (
                model(x, past_key_values=one).logits[:, -1],
                model(y, past_key_values=two).logits[:, -1],
            )
            for x, y in zip(a[:, 30:].split(1, 1), b[:, 30:].split(1, 1), strict=True)
        ]
    for expected, found in zip(alone, zip(*steps, strict=True), strict=True):
        assert torch.equal(torch.stack(found, 1), expected)


def test_reset_begins_again_in_the_same_slots() -> None:
    model, ids = tiny("llama", torch.float64), tokens(2, 60)
    for name in ("vase", "h2o", "mixture"):
        with EvictionCache(model, zoo(24)[name]) as cache:
            runs, addresses = [], []
            for _ in range(2):
                model(ids[:, :30], past_key_values=cache)
                runs.append(decode(model, cache, ids[:, 30:]))
                assert cache.groups[0].store is not None
                addresses = [t.data_ptr() for t in cache.groups[0].store.tensors()]
                cache.reset()
            assert torch.equal(*runs)
            assert [t.data_ptr() for t in cache.groups[0].store.tensors()] == addresses


def test_a_prompt_beyond_the_capacity_is_attended_in_full() -> None:
    model, ids = tiny("llama", torch.float64), tokens(1, 200)
    expected = model(ids).logits
    with EvictionCache(model, SMALL) as cache:
        found = model(ids, past_key_values=cache).logits
        assert (found - expected).abs().max() <= 1e-12
        assert cache.receipt().slots == (24,)
        assert cache.receipt().evictions == (1,)


def test_prefill_only_policies_say_how_much_must_be_decoded() -> None:
    model, ids = tiny("llama"), tokens(1, 60)
    policy = snapkv(24, window=8)
    with pytest.raises(BudgetError, match="max_new_tokens"):
        EvictionCache(model, policy)
    with EvictionCache(model, policy, max_new_tokens=10) as cache:
        model(ids, past_key_values=cache)
        decode(model, cache, ids[:, :10])
        assert cache.receipt().slots == (34,)
        with pytest.raises(UsageError, match="max_new_tokens"):
            model(ids[:, :1], past_key_values=cache)


def test_hybrid_models_evict_in_their_full_attention_layers_alone() -> None:
    model = tiny("gemma3")
    with EvictionCache(model, SMALL) as cache:
        model.generate(tokens(1, 60), max_new_tokens=20, do_sample=False, past_key_values=cache)
        receipt = cache.receipt()
        assert receipt.layers == (1, 3)
        assert set(receipt.skipped) == {0, 2}
        assert receipt.other_nbytes > 0
        assert [type(layer).__name__ for layer in cache.layers] == [
            "DynamicSlidingWindowLayer", "EvictionLayer", "DynamicSlidingWindowLayer", "EvictionLayer",
        ]  # fmt: skip
        with pytest.raises(UsageError, match="layer 0 does not evict"):
            receipt.positions(0)


def test_the_receipt_is_a_table() -> None:
    model = tiny("llama")
    with EvictionCache(model, SMALL) as cache:
        with pytest.raises(UsageError, match="no token"):
            cache.receipt()
        model.generate(tokens(2, 40), max_new_tokens=20, do_sample=False, past_key_values=cache)
        receipt = cache.receipt()
    assert receipt.seen == (59, 59)
    assert receipt.evictions == (3, 3)
    text = str(receipt)
    for part in (
        "tau=1.0",
        "share=0.25",
        "redraw=True",
        "interval=8",
        "59",
        "evictions",
        "never grown",
    ):
        assert part in text
    kept = receipt.positions(2)
    assert kept.shape == (2, 2, receipt.slots[0])
    assert (kept.diff(dim=-1) > 0).all()
    assert kept.max() == 58


def test_guards_beyond_the_budget_are_counted_in_the_receipt() -> None:
    model = tiny("llama")
    policy = Policy(KeyNorm() >> ValueGuard(share=0.6, sinks=0) >> Sinks(8) >> TopK(24), interval=8, recent=8)
    with EvictionCache(model, policy) as cache:
        model.generate(tokens(1, 60), max_new_tokens=20, do_sample=False, past_key_values=cache)
        receipt = cache.receipt()
        assert receipt.guards_broken[0] > 0
        assert "had to go" in str(receipt)
        assert (receipt.positions(0)[0, :, :8] == torch.arange(8)).all()  # the higher tier stays


# What is refused


class Ordinary(nn.Module):
    pass


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (ValueGuard() >> TopK(24), BindError, r"write Policy\("),
        (TopK(24), BindError, r"write Policy\("),
        ("vase(24)", BindError, r"Policy\.parse"),
        (vase, BindError, r"call it, vase\(1024\)"),
        (vase(64), BudgetError, "not larger than recent=64"),
        (
            Policy(Sinks(20) >> TopK(24), recent=8),
            BudgetError,
            r"Sinks\(20\) protects 20 slots and recent=8",
        ),
        (Policy(ValueGuard(share=0.9) >> TopK(24), recent=8), BudgetError, "protects 21 slots"),
    ],
)
def test_what_cannot_be_bound(policy: Any, error: type[Exception], message: str) -> None:
    model = tiny("llama")
    with pytest.raises(error, match=message):
        EvictionCache(model, policy)
    assert model.config._attn_implementation == "sdpa"


def test_a_stage_that_needs_what_the_engine_cannot_give() -> None:
    @dataclass(frozen=True)
    class Reader(Scorer):
        needs = frozenset({"hidden_states"})

        def score(self, view: Any, state: Any) -> Scores:
            raise AssertionError

    with pytest.raises(UnsupportedError, match="needs hidden_states"):
        EvictionCache(tiny("llama"), Policy(Reader() >> TopK(128)))


def test_models_that_cannot_be_bound() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sliding = MistralConfig(**small, num_key_value_heads=1, intermediate_size=16, sliding_window=8)
    with pytest.raises(UnsupportedError, match="no full-attention layer"):
        EvictionCache(MistralForCausalLM(sliding), SMALL)
    with pytest.raises(UnsupportedError, match="takes a transformers model, found Ordinary"):
        EvictionCache(Ordinary(), SMALL)
    model = tiny("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedError, match="attn_implementation='sdpa'"):
        EvictionCache(model, SMALL)


def test_misuse_of_a_bound_cache_is_refused_and_loses_nothing() -> None:
    model, other, ids = tiny("llama"), tiny("llama"), tokens(2, 30)
    with EvictionCache(model, SMALL) as cache:
        model(ids, past_key_values=cache)
        before = str(cache.receipt())
        padded = torch.ones(2, 31, dtype=torch.long)
        padded[0, -1] = 0
        short = torch.ones(2, 7, dtype=torch.long)
        hidden = torch.ones(2, 31, dtype=torch.long)
        hidden[1, :4] = 0
        for message, call in {
            "holds 2 requests, and the batch has 3 rows": lambda: model(tokens(3, 1), past_key_values=cache),
            "pad on the left": lambda: model(ids[:, :1], attention_mask=padded, past_key_values=cache),
            "it must cover 2 rows": lambda: model(ids[:, :1], attention_mask=short, past_key_values=cache),
            "cannot be hidden later": lambda: model(ids[:, :1], attention_mask=hidden, past_key_values=cache),
            "output_attentions": lambda: model(ids[:, :1], past_key_values=cache, output_attentions=True),
            "works inside the forward pass of the model": lambda: other(ids[:, :1], past_key_values=cache),
            "two-dimensional": lambda: model(
                ids[:, :1], attention_mask=torch.zeros(2, 1, 1, 31), past_key_values=cache
            ),
        }.items():
            with pytest.raises(UsageError, match=message):
                call()
            assert str(cache.receipt()) == before
        with EvictionCache(other, SMALL), pytest.raises(UsageError, match="bound to another model"):
            other(ids[:, :1], past_key_values=cache)
        with torch.enable_grad(), pytest.raises(UsageError, match="no_grad"):
            model(ids[:, :1], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        assert cache.receipt().seen == (31, 31)
    with pytest.raises(UsageError, match="was unbound, as its with block ended"):
        model(ids[:, :1], past_key_values=cache)


def test_right_padding_is_refused() -> None:
    model, ids = tiny("llama"), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with EvictionCache(model, SMALL) as cache, pytest.raises(UsageError, match="pad on the left"):
        model(ids, attention_mask=mask, past_key_values=cache)


def test_a_mask_is_needed_again_once_rows_were_padded() -> None:
    model, ids = tiny("llama"), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with EvictionCache(model, SMALL) as cache:
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(UsageError, match="pass the attention_mask"):
            model(ids[:, :1], past_key_values=cache)


def test_attention_set_behind_our_back_is_noticed() -> None:
    model, ids = tiny("llama"), tokens(2, 30)
    with EvictionCache(model, SMALL) as cache:
        model.set_attn_implementation("sdpa")
        with pytest.raises(UsageError, match="did not attend through kvpolicy"):
            model(ids, past_key_values=cache)
        with pytest.raises(UsageError, match="failed half-way"):
            model(ids, past_key_values=cache)
        model.set_attn_implementation("kvpolicy")
        cache.reset()
        model(ids, past_key_values=cache)
        assert cache.receipt().seen == (30, 30)


def test_a_failed_step_of_one_token_counts_for_nothing() -> None:
    model, ids = tiny("llama", torch.float64), tokens(1, 60)
    with EvictionCache(model, SMALL) as cache:
        model(ids[:, :30], past_key_values=cache)
        expected = decode(model, cache, ids[:, 30:])
    with EvictionCache(model, SMALL) as cache:
        model(ids[:, :30], past_key_values=cache)
        found = []
        for i, one in enumerate(ids[:, 30:].split(1, 1)):
            if i in (3, 20):
                handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model(one, past_key_values=cache)
                handle.remove()
            found.append(model(one, past_key_values=cache).logits[:, -1])
    assert torch.equal(torch.stack(found, 1), expected)


def test_what_transformers_may_ask_that_we_cannot_do() -> None:
    model, ids = tiny("llama"), tokens(1, 30)
    with EvictionCache(model, SMALL) as cache:
        model(ids, past_key_values=cache)
        with pytest.raises(UnsupportedError):
            cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(UnsupportedError):
            cache.batch_repeat_interleave(2)


@pytest.mark.parametrize("given", [{"seeds": [1, 2, 3]}, {"requests": [1]}])
def test_seeds_must_fit_the_batch(given: dict[str, list[int]]) -> None:
    model = tiny("llama")
    with (
        EvictionCache(model, SMALL, **given) as cache,
        pytest.raises(UsageError, match="the batch has 2 rows"),
    ):
        model(tokens(2, 30), past_key_values=cache)


@pytest.mark.parametrize("given", [[1.5, 2], [True, False], [2**63, 0]])
def test_seeds_are_integers(given: Any) -> None:
    with pytest.raises(BindError, match="64-bit integer"):
        EvictionCache(tiny("llama"), SMALL, seeds=given)


def test_beam_search_reorders_the_slots() -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    options = {"num_beams": 3, "max_new_tokens": 30, "do_sample": False}
    expected = model.generate(ids, **options, past_key_values=DynamicCache(config=model.config))
    with EvictionCache(model, zoo(128)["vase"]) as cache:
        assert torch.equal(model.generate(ids, **options, past_key_values=cache), expected)


def test_a_model_without_attention_scores_needs_no_window() -> None:
    model = tiny("llama")
    with EvictionCache(model, Policy(Recency() >> TopK(24), interval=8, recent=8)) as cache:
        model(tokens(1, 40), past_key_values=cache)
        store = cache.groups[0].store
        assert store is not None
        assert store.window.queries.numel() == 0
    assert streaming_llm(128).needs == frozenset()
    assert Policy(Attention() >> TopK(128)).needs == {"queries"}


@pytest.mark.parametrize("name", zoo(24))
def test_layers_in_one_view_or_many(name: str) -> None:
    """A small workspace cuts an eviction into many views, and blocks of heads: nothing else changes."""
    model, ids, kept = tiny("llama", torch.float64), tokens(2, 60), []
    for workspace in (2**28, 2**13):
        with EvictionCache(model, zoo(24)[name], workspace=workspace) as cache:
            model(ids[:, :30], past_key_values=cache)
            logits = decode(model, cache, ids[:, 30:])
            kept.append((logits, *(cache.receipt().positions(layer) for layer in range(3))))
    for one, many in zip(*kept, strict=True):
        assert torch.equal(one, many)


def test_a_policy_that_fails_leaves_no_cache_that_seems_right() -> None:
    @dataclass(frozen=True)
    class Failing(Scorer):
        def score(self, view: Any, state: Any) -> Scores:
            raise RuntimeError("on purpose")

    model, ids = tiny("llama"), tokens(1, 60)
    with EvictionCache(model, Policy(Failing() >> TopK(24), interval=8, recent=8)) as cache:
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(RuntimeError, match="on purpose"):
            decode(model, cache, ids[:, 20:])
        with pytest.raises(UsageError, match="failed half-way"):
            model(ids[:, :1], past_key_values=cache)
        cache.reset()
        model(ids[:, :20], past_key_values=cache)


def test_a_new_prompt_on_a_used_cache_is_refused() -> None:
    model = tiny("llama")
    with EvictionCache(model, SMALL) as cache:
        model.generate(tokens(2, 30), max_new_tokens=20, do_sample=False, past_key_values=cache)
        # transformers 4 itself fails on a prompt that is shorter than what its cache holds
        with pytest.raises((UsageError, IndexError), match=r"reset\(\) the cache for a new prompt|out of bounds"):
            model.generate(tokens(2, 12), max_new_tokens=5, do_sample=False, past_key_values=cache)
        cache.reset()
        model.generate(tokens(2, 12), max_new_tokens=5, do_sample=False, past_key_values=cache)
        assert cache.receipt().seen == (16, 16)


@pytest.mark.parametrize("name", zoo(24))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_later_turns_may_be_padded_too(family: str, name: str) -> None:
    model, policy = tiny(family, torch.float64), zoo(24)[name]
    oracle, mask = Oracle(model, policy), torch.zeros(3, 0, dtype=torch.long)
    with EvictionCache(model, policy) as cache:
        for step, lengths in enumerate([[30, 22, 9], *[[1, 1, 1]] * 11, [5, 9, 2], *[[1, 1, 1]] * 20, [40, 3, 17]]):
            width = max(lengths)
            ids = tokens(3, width, step)
            new = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
            mask = torch.cat([mask, new], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
            expected = oracle.forward(ids, mask)
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            assert (out.logits[:, -1] - expected).abs().max() <= 1e-9, step
            for layer in cache.receipt().layers:
                assert torch.equal(cache.receipt().positions(layer), oracle.kept(layer))
        assert cache.receipt().seen == (106, 65, 59)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
def test_a_failed_step_of_a_hybrid_cannot_be_retried(family: str) -> None:
    """Sliding and linear layers, which are not ours, have moved on: a retry would be silently wrong."""
    model, ids = tiny(family), tokens(1, 40)
    with EvictionCache(model, SMALL) as cache:
        model(ids[:, :30], past_key_values=cache)
        handle = model.model.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, 30:31], past_key_values=cache)
        handle.remove()
        with pytest.raises(UsageError, match="failed half-way"):
            model(ids[:, 30:31], past_key_values=cache)


def test_unbinding_frees_the_model() -> None:
    import gc
    import weakref

    model = tiny("llama")
    cache = EvictionCache(model, SMALL)
    gone = weakref.ref(model.model)
    cache.unbind()
    del model, cache
    gc.collect()
    assert gone() is None


def test_a_receipt_is_a_copy() -> None:
    model, ids = tiny("llama"), tokens(1, 60)
    with EvictionCache(model, SMALL) as cache:
        model(ids[:, :40], past_key_values=cache)
        receipt = cache.receipt()
        before = receipt.positions(0).clone()
        decode(model, cache, ids[:, 40:])
        assert torch.equal(receipt.positions(0), before)
        assert receipt.seen == (40,)


def test_inference_mode_may_end_between_prompt_and_decoding() -> None:
    model, ids = tiny("llama"), tokens(1, 60)
    with EvictionCache(model, SMALL) as cache:
        with torch.inference_mode():
            model(ids[:, :40], past_key_values=cache)
        decode(model, cache, ids[:, 40:])
        assert cache.receipt().evictions == (3,)


def test_beam_search_goes_on_after_evictions() -> None:
    model, ids = tiny("llama"), tokens(2, 30)
    with EvictionCache(model, SMALL) as cache:
        model.generate(ids, num_beams=3, max_new_tokens=40, do_sample=False, past_key_values=cache)
        store = cache.groups[0].store
        assert store is not None
        store.check_integrity()
        assert cache.receipt().seen == (69,) * 6
        model(tokens(6, 5), past_key_values=cache)  # and another turn


def test_a_policy_beyond_its_budget_is_stopped_before_it_corrupts_slots() -> None:
    from kvpolicy import IntegrityError, Keep, Selector, View, select_top

    @dataclass(frozen=True)
    class KeepsAll(Selector):
        def budgets(self, num_layers: int, recent: int) -> tuple[int | None, ...]:
            return (24,) * num_layers

        def select(self, scores: Scores, view: View) -> Keep:
            return replace(select_top(scores, view, view.budget), mask=view.valid)

    model, ids = tiny("llama"), tokens(1, 60)
    policy = Policy(Recency() >> KeepsAll(), interval=8, recent=8)
    with EvictionCache(model, policy) as cache, pytest.raises(IntegrityError, match="did not keep exactly"):
        model(ids, past_key_values=cache)
    with EvictionCache(model, policy) as cache:
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(IntegrityError, match="did not keep exactly"):
            decode(model, cache, ids[:, 20:])


def test_reset_frees_the_size_of_the_batch() -> None:
    model = tiny("llama")
    with EvictionCache(model, SMALL) as cache:
        model(tokens(1, 40), past_key_values=cache)
        cache.reset()
        model(tokens(3, 40), past_key_values=cache)
        assert cache.receipt().seen == (40, 40, 40)


def test_models_without_grouped_heads() -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2)
    model, ids = GPT2LMHeadModel(config).double().eval(), tokens(1, 40)
    oracle = Oracle(model, SMALL)
    with EvictionCache(model, SMALL) as cache:
        for step in [ids, *tokens(1, 30, 4).split(1, 1)]:
            expected = oracle.forward(step)
            assert (model(step, past_key_values=cache).logits[:, -1] - expected).abs().max() <= 1e-9
    small = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(UnsupportedError, match=r"both directions|AttentionInterface"):
        EvictionCache(BertModel(small), SMALL)


def test_no_token_and_no_cache() -> None:
    model = tiny("llama")
    with EvictionCache(model, SMALL) as cache:
        with pytest.raises(UsageError, match="there is no new token"):
            model(tokens(1, 0), past_key_values=cache)
        with pytest.raises(UsageError, match="use_cache=False"):
            model(tokens(1, 5), past_key_values=cache, use_cache=False)
