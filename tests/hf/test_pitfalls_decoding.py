"""What went wrong elsewhere while decoding, as docs/pitfalls.md lists it: positions, rotation, ties, state."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvpolicy import (
    Attention,
    Constant,
    KeyDifference,
    KeyNorm,
    LastQuery,
    LayerSpec,
    Leverage,
    Policy,
    Recency,
    Scorer,
    Scores,
    Sinks,
    TopK,
    ValueNorm,
    View,
)
from kvpolicy.adapters.hf import EvictionCache, replay
from kvpolicy.policies import snapkv
from tests.hf.probe import Probe, asked, probed
from tests.hf.test_oracle import padded
from tests.hf.test_pitfalls import feed, tokens
from tests.hf.zoo import zoo
from tests.models import real, tiny, tokenizer
from tests.oracle import Oracle

ZOO = zoo(24)


# Positions, not slots


@dataclass(frozen=True)
class SlotsForPositions(Scorer):
    """Take a slot's place for its position, which is the fault."""

    def score(self, view: View, state: Any) -> Scores:
        slots = torch.arange(view.shape[2]).expand(view.shape)
        return Scores.of(view, torch.where(slots < 4, 10_000, slots), weights=False)


def streaming(chain: Any) -> Policy:
    return Policy(chain >> TopK(64), interval=16, recent=16)


def kept_of_streaming(policy: Policy, ids: Tensor) -> list[list[int]]:
    found = replay(real(), policy, ids, 100)
    assert found.receipt.evictions[0] >= 18
    return found.receipt.positions(0)[0].tolist()


@pytest.mark.model
def test_streaming_llm_keeps_sinks_and_the_newest_after_18_evictions() -> None:
    text = "The tide rose, and the tide fell; the sailor wrote the hour in his book. " * 30
    ids = tokenizer()(text, return_tensors="pt").input_ids[:, :390]
    newest = 389 - (389 - 100) % 16  # tokens seen at the last eviction
    expected = [*range(4), *range(newest - 60, 389)]
    assert all(head == expected for head in kept_of_streaming(streaming(Recency() >> Sinks(4)), ids))
    assert not any(head == expected for head in kept_of_streaming(streaming(SlotsForPositions()), ids))


def test_every_query_keeps_its_own_rotation() -> None:
    model, ids, views = tiny("llama", torch.float64), tokens(1, 120), Probe()
    with EvictionCache(model, probed(views, window=16, budget=24, interval=8)) as cache:
        feed(model, cache, ids, 40)
    expected, _ = rotated(model, ids)
    assert len(views.of_layer(0)) >= 8
    for view in views.of_layer(0):
        queries, (at,) = asked(view)
        assert at.tolist() == list(range(int(view.seen) - 16, int(view.seen)))
        assert (queries[0] - expected[:, at]).abs().max() <= 1e-12
        at_one_angle = rotated(model, ids, torch.full((1, 120), int(view.seen) - 1))[0][:, at]
        assert (queries[0] - at_one_angle).abs().max() > 1e-2  # the fault would be seen


def test_every_slot_holds_the_key_of_its_position() -> None:
    """Nothing is rotated again, and no key is made up to stand for a budget."""
    model, ids, views = tiny("llama", torch.float64), tokens(1, 120), Probe()
    with EvictionCache(model, probed(views, window=16, budget=24, interval=8)) as cache:
        feed(model, cache, ids, 40)
    _, expected = rotated(model, ids)
    values = model.model.layers[0].self_attn.v_proj(first_input(model, ids)).view(1, 120, 2, 8).transpose(1, 2)[0]
    for view in views.of_layer(0):
        for head in range(2):
            at, used = view.positions[0, head].long(), view.valid[0, head]
            assert (view.keys[0, head][used] - expected[head, at[used]]).abs().max() <= 1e-12
            assert (view.values[0, head][used] - values[head, at[used]]).abs().max() <= 1e-12
    assert any((view.positions[0, 0].diff() < 0).any() for view in views.of_layer(0))  # slots are out of order


def first_input(model: Any, ids: Tensor) -> Tensor:
    """Return what the first layer's attention reads, which depends on each token alone."""
    return model.model.layers[0].input_layernorm(model.get_input_embeddings()(ids))


def rotated(model: Any, ids: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the first layer's queries ``[Hq, S, D]`` and keys ``[H, S, D]`` at their positions."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention, states = model.model.layers[0].self_attn, first_input(model, ids)
    positions = torch.arange(ids.shape[1])[None] if positions is None else positions
    split = [p(states).view(1, ids.shape[1], -1, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj)]
    queries, keys = apply_rotary_pos_emb(*split, *model.model.rotary_emb(states, positions))
    return queries[0], keys[0]


def test_a_policy_is_told_where_the_future_begins() -> None:
    """The next position is what was seen, whatever the slots and the window hold, and in each row."""
    model, views = tiny("llama", torch.float64), Probe()
    prompts, mask = padded([40, 29], 97)
    with EvictionCache(model, probed(views, window=4, budget=24, interval=8)) as cache:
        model.generate(prompts, attention_mask=mask, max_new_tokens=41, do_sample=False, past_key_values=cache)
    told = [view.seen.tolist() for view in views.of_layer(1)]
    assert told == [[40 + n, 29 + n] for n in range(0, 41, 8)]
    for view in views.of_layer(1):
        assert torch.equal(asked(view)[1][:, -1] + 1, view.seen)
        assert torch.equal(view.positions.amax((1, 2)).long() + 1, view.seen)


def test_lengths_are_told_in_tokens_seen() -> None:
    """Without positions from the caller, transformers counts on from what the cache says."""
    model, ids = tiny("llama", torch.float64), tokens(1, 80)
    places: list[int] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        places.extend(kwargs.get("position_ids", args[-1]).flatten().tolist())

    hook = model.model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    with EvictionCache(model, ZOO["vase"]) as cache:
        feed(model, cache, ids, 40)
        assert cache.get_seq_length() == 80
        assert cache.receipt().slots[0] < 33
    hook.remove()
    assert places == list(range(80))


# State


def test_an_unrelated_cache_decodes_as_if_nothing_had_been() -> None:
    model, ids = tiny("llama", torch.float64), tokens(1, 80)
    expected = feed(model, DynamicCache(config=model.config), ids, 40)
    kept = {name: set(vars(module)) for name, module in model.named_modules()}
    with EvictionCache(model, ZOO["vase"]) as cache:
        feed(model, cache, ids, 40)
        assert torch.equal(feed(model, DynamicCache(config=model.config), ids, 40), expected)
    assert torch.equal(feed(model, DynamicCache(config=model.config), ids, 40), expected)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == kept


@pytest.mark.parametrize("name", ZOO)
def test_a_policy_is_the_same_value_afterwards(name: str) -> None:
    model, policy = tiny("llama"), zoo(24)[name]
    before = (copy.deepcopy(policy), hash(policy), policy.text(full=True))
    with EvictionCache(model, policy) as cache:
        feed(model, cache, tokens(1, 60), 40)
    assert (policy, hash(policy), policy.text(full=True)) == before
    assert vars(policy) == vars(before[0])


# Windows, ties, short contexts


@pytest.mark.parametrize(("window", "interval"), [(16, 4), (4, 16), (16, 1), (16, 16)])
@pytest.mark.parametrize("over", ["all", "candidates"])
def test_any_interval_goes_with_any_window(window: int, interval: int, over: Any) -> None:
    model, ids = tiny("llama", torch.float64), tokens(1, 80)
    policy = Policy(Attention(window, over=over) >> TopK(24), interval=interval, recent=8)
    oracle = Oracle(model, policy)
    with EvictionCache(model, policy) as cache:
        for step in [ids[:, :30], *ids[:, 30:].split(1, 1)]:
            expected = oracle.forward(step)
            assert (model(step, past_key_values=cache).logits[:, -1] - expected).abs().max() <= 1e-9
        assert cache.receipt().evictions == (1 + 50 // interval,)
        assert torch.equal(cache.receipt().positions(2), oracle.kept(2))


def test_snapkv_decodes_with_an_interval_below_its_window() -> None:
    with EvictionCache(model := tiny("llama"), snapkv(40, window=32, interval=16)) as cache:
        feed(model, cache, tokens(1, 120), 60)
        assert cache.receipt().evictions == (1 + 60 // 16,)


def tied(scores: Tensor) -> float:
    """Return the share of scores that equal another one of their head."""
    heads = scores.flatten(0, -2)
    return sum(1 - len(head.unique()) / len(head) for head in heads) / len(heads)


@pytest.mark.parametrize("scorer", [KeyNorm(), ValueNorm("l2"), KeyDifference(), Leverage(), Attention(), LastQuery()])
def test_scores_of_a_bfloat16_cache_do_not_tie(scorer: Scorer) -> None:
    model, views = tiny("llama", torch.bfloat16), Probe()
    with EvictionCache(model, probed(views, window=64, budget=600, interval=8)) as cache:
        model(tokens(1, 601, seed=2), past_key_values=cache)
    for layer in (1, 2):  # in layer 0 a token's key and value depend on its word alone
        (view,) = views.of_layer(layer)
        assert view.keys.dtype == torch.bfloat16
        spec = LayerSpec(2, 4, 8, 8, view.shape[2], view.keys.dtype, view.keys.device)
        scores = scorer.score(view, scorer.update(view, scorer.init(spec, 1)))
        assert scores.values.dtype == torch.float32
        chosen = scores.values[view.candidates].view(1, 2, -1)
        assert tied(chosen) < 0.03
        assert tied(chosen.to(torch.bfloat16)) > 0.2  # the fault would be seen


def test_equal_scores_leave_the_newest() -> None:
    model, policy = tiny("llama"), Policy(Constant() >> TopK(24), interval=8, recent=8)
    with EvictionCache(model, policy) as cache:
        feed(model, cache, tokens(1, 104), 40)
        kept = cache.receipt().positions(1)
    assert (kept == torch.arange(104 - 24, 104)).all()


@pytest.mark.parametrize("name", ZOO)
def test_short_contexts_keep_everything(name: str) -> None:
    """Down to a prompt of one token, shorter than the window, the sinks and the recent tokens."""
    model, lengths = tiny("llama", torch.float64), [1, 2, 3, 7]
    prompts, mask = padded(lengths, 97)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(prompts, **options)
    with EvictionCache(model, ZOO[name]) as cache:
        assert torch.equal(model.generate(prompts, **options, past_key_values=cache), expected)
        receipt = cache.receipt()
    for r, length in enumerate(lengths):
        kept = receipt.positions(0)[r, 0]
        assert kept[kept >= 0].tolist() == list(range(length + 11))
