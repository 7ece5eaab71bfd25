"""Modes that meet: each combination is right, or refused by name, and a refusal changes nothing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import Keep, Policy, State, UnsupportedError, UsageError, View
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.hf.compat import ANNOUNCES_DRAFTS
from kvpolicy.policies import snapkv
from tests.hf.zoo import zoo
from tests.models import tiny

POLICY = zoo(24)["vase"]
static_only = pytest.mark.skipif(not ANNOUNCES_DRAFTS, reason="static=True needs transformers 5.14")


def tokens(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 97, (rows, width), generator=torch.Generator().manual_seed(seed))


def padded_prompt(model: Any, cache: EvictionCache) -> None:
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)


def after(model: Any, what: Any, *, compiled: bool) -> Tensor:
    """Decode, do something to the cache, and return the logits of the tokens after it."""
    torch._dynamo.reset()
    call = torch.compile(model, fullgraph=True, dynamic=False, backend="eager") if compiled else model
    with EvictionCache(model, POLICY, static=compiled) as cache:
        padded_prompt(model, cache)
        position = torch.tensor([[30], [21]])
        mask = torch.ones(2, 30, dtype=torch.long)
        mask[1, :9] = 0
        for step in range(3):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            given = {} if compiled else {"attention_mask": mask}
            call(tokens(2, 1, step), position_ids=position.clone(), past_key_values=cache, **given)
            cache.step()
            position = position + 1
        position, mask = what(cache, position, mask)
        found = []
        for step in range(12):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            given = {} if compiled else {"attention_mask": mask}
            out = call(tokens(2, 1, 50 + step), position_ids=position.clone(), past_key_values=cache, **given)
            cache.step()
            found.append(out.logits[:, -1].clone())
            position = position + 1
        return torch.stack(found, 1)


def cropped(cache: EvictionCache, position: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    cache.crop(-2)
    return position - 2, mask[:, :-2]


def turned(cache: EvictionCache, position: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    cache.reorder_cache(torch.tensor([1, 0]))
    return position.flip(0), mask.flip(0)


@static_only
@pytest.mark.parametrize("what", [cropped, turned])
def test_compiled_code_learns_what_happened_between_its_steps(what: Any) -> None:
    model = tiny("llama", torch.float64)
    expected = after(model, what, compiled=False)
    assert (after(model, what, compiled=True) - expected).abs().max() <= 1e-9


@static_only
def test_compiled_code_after_reset_needs_a_prompt() -> None:
    model = tiny("llama")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with EvictionCache(model, POLICY, static=True) as cache:
        model(tokens(1, 30), past_key_values=cache)
        compiled(tokens(1, 1), past_key_values=cache)
        cache.reset()
        with pytest.raises(Exception, match="give the prompt to the model itself"):
            compiled(tokens(1, 1), past_key_values=cache)


@static_only
def test_compiled_code_says_when_slots_run_out() -> None:
    model = tiny("llama")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with EvictionCache(model, snapkv(24, window=8), max_new_tokens=3, static=True) as cache:
        model(tokens(1, 30), past_key_values=cache)
        for _ in range(3):
            compiled(tokens(1, 1), past_key_values=cache)
            cache.step()
        with pytest.raises(Exception, match="larger max_new_tokens"):
            compiled(tokens(1, 1), past_key_values=cache)


@static_only
def test_a_static_cache_may_outlive_inference_mode() -> None:
    model = tiny("llama")
    with torch.inference_mode():
        cache = EvictionCache(model, POLICY, static=True)
        model(tokens(1, 30), past_key_values=cache)
    model(tokens(1, 1), past_key_values=cache)
    assert cache.receipt().seen == (31,)
    cache.unbind()


@static_only
def test_fixed_shapes_and_drafts_are_refused_together() -> None:
    with pytest.raises(UnsupportedError, match="leave static or max_draft_tokens out"):
        EvictionCache(tiny("llama"), POLICY, static=True, max_draft_tokens=4)


def test_tokens_behind_the_prompt_cannot_be_padded() -> None:
    model = tiny("llama")
    mask = torch.ones(2, 34, dtype=torch.long)
    mask[1, 30:33] = 0
    with EvictionCache(model, POLICY, prompt_length=30) as cache:
        model(tokens(2, 30), past_key_values=cache)
        before = cache.receipt()
        with pytest.raises(UsageError, match="4 columns behind the prompt count as decoded, and a row has only 1"):
            model(tokens(2, 4), attention_mask=mask, past_key_values=cache)
        assert cache.receipt() == before


class Failing:
    """Fails at one of its answers."""

    needs = POLICY.needs

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def plan(self, model: Any) -> Any:
        return POLICY.plan(model)

    def init(self, spec: Any, rows: int) -> State:
        return POLICY.init(spec, rows)

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("out of memory")
        return POLICY.select(view, state)


@pytest.mark.skipif(not ANNOUNCES_DRAFTS, reason="drafts need transformers 5.14")
def test_a_late_eviction_that_fails_is_not_passed_over() -> None:
    model = tiny("llama")
    with EvictionCache(model, Failing(at=5), max_draft_tokens=2, workspace=1) as cache:
        model(tokens(1, 40), past_key_values=cache)
        with pytest.raises(RuntimeError, match="out of memory"):
            [model(tokens(1, 1), past_key_values=cache) for _ in range(9)]
        with pytest.raises(UsageError, match="failed half-way"):
            model(tokens(1, 1), past_key_values=cache)
        cache.reset()
        model(tokens(1, 40), past_key_values=cache)


def test_a_refused_reordering_changes_nothing() -> None:
    model, policies = tiny("gemma3", torch.float64), [POLICY, zoo(30)["vase"]]
    logits = []
    for wrong in (False, True):
        with EvictionCache(model, policies) as cache:
            model(tokens(2, 40), past_key_values=cache)
            if wrong:
                with pytest.raises(UsageError, match="follows the same policy"):
                    cache.reorder_cache(torch.tensor([1, 0]))
            logits.append(model(tokens(2, 1), past_key_values=cache).logits)
    assert torch.equal(*logits)


def test_a_dropped_cache_frees_its_slots_at_once() -> None:
    model = tiny("llama")
    gc.disable()
    try:
        with EvictionCache(model, POLICY) as cache:
            model(tokens(1, 40), past_key_values=cache)
        slots = weakref.ref(cache.groups[0].store.keys)
        del cache
        assert slots() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_no_gradient_enters_a_slot(part: str) -> None:
    model = tiny("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"layers.2.self_attn.{part}" in name)
    with (
        EvictionCache(model, POLICY) as cache,
        torch.enable_grad(),
        pytest.raises(UsageError, match="slots carry no gradients"),
    ):
        model(tokens(1, 40), past_key_values=cache)


def test_positions_may_be_counted_on_in_place() -> None:
    model, position = tiny("llama"), torch.arange(30)[None]
    with EvictionCache(model, POLICY) as cache:
        model(tokens(1, 30), position_ids=position, past_key_values=cache)
        position.add_(30)
        model(tokens(1, 5), position_ids=position[:, :5], past_key_values=cache)
        assert cache.receipt().seen == (35,)


def test_a_batch_of_the_wrong_size_is_refused_before_a_layer_runs() -> None:
    model, policies = tiny("llama"), [POLICY, zoo(30)["vase"]]
    with EvictionCache(model, policies) as cache:
        with pytest.raises(UsageError, match="give one each"):
            model(tokens(3, 20), past_key_values=cache)
        model(tokens(2, 20), past_key_values=cache)


class Nameless(Failing):
    pass


def test_a_policy_without_a_repr_is_known_by_its_class(tmp_path: Any) -> None:
    model = tiny("llama")
    with EvictionCache(model, Nameless(at=-1)) as cache:
        model(tokens(1, 40), past_key_values=cache)
        cache.save(tmp_path / "x")
    EvictionCache.load(tmp_path / "x", model, Nameless(at=-1)).unbind()


def test_a_fork_may_begin_again_with_another_batch() -> None:
    model = tiny("llama")
    with EvictionCache(model, POLICY) as cache:
        model(tokens(1, 40), past_key_values=cache)
        with cache.fork([0, 0]) as fork:
            fork.reset()
            model(tokens(3, 20), past_key_values=fork)
            assert fork.receipt().seen == (20,) * 3


def test_a_policy_is_a_policy() -> None:
    with pytest.raises(Exception, match=r"call it, snapkv\(1024\)"):
        EvictionCache(tiny("llama"), snapkv)
    assert isinstance(POLICY, Policy)
