"""Budgets that differ over layers, and layers that a policy leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import (
    AccumulatedAttention,
    Allocator,
    Attention,
    BindError,
    BudgetError,
    KeyNorm,
    LayerPlan,
    PerLayer,
    Plan,
    Policy,
    Pyramid,
    Sinks,
    Stochastic,
    TopK,
    UnsupportedError,
    UsageError,
    ValueGuard,
)
from kvpolicy.adapters.hf import EvictionCache, replay
from kvpolicy.adapters.hf.compat import ANNOUNCES_DRAFTS
from kvpolicy.growing import GrowingStore
from tests.families import FAMILIES, KINDS, ROUNDING
from tests.hf.test_drafts import DRAFTS
from tests.hf.test_memory import formula
from tests.hf.test_oracle import padded, run
from tests.hf.test_replay import one_by_one
from tests.hf.test_rows import rows_alone, together
from tests.models import real, tiny, tokenizer
from tests.oracle import Oracle

BEYOND = 500  #: a budget that no text of these tests reaches


def evicting(model: Any) -> int:
    """Return how many layers of a model may evict."""
    return len(Oracle(model, Policy(TopK(24), recent=8)).evicting)


def cycle(count: int, *budgets: int | None) -> PerLayer:
    return PerLayer(tuple(budgets[i % len(budgets)] for i in range(count)))


def vase(allocator: Allocator, interval: int = 8) -> Policy:
    chain = Attention(16) >> ValueGuard(sinks=2) >> Stochastic() >> TopK(allocator)
    return Policy(chain, interval=interval, recent=8)


def h2o(allocator: Allocator) -> Policy:
    return Policy(AccumulatedAttention(16) >> TopK(allocator), interval=8, recent=8)


def policies(count: int) -> dict[str, Policy]:
    """Return policies for so many layers; a layer may have no neighbour that is left alone."""
    return {
        "alone": vase(cycle(count, 24, None, 20)),
        "first alone": vase(PerLayer((None, *(24,) * (count - 1))) if count > 1 else PerLayer((24,))),
        "every query, alone": h2o(cycle(count, 20, None)),
        "per layer": vase(cycle(count, 20, 40, 28)),
        "pyramid": vase(Pyramid(26, 2)),
        "every query, pyramid": h2o(Pyramid(26, 20)),
    }


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llama", name) for name in policies(3)), *((f, n) for f in KINDS[1:] for n in ("alone", "pyramid"))],
)
def test_equal_to_the_oracle(family: str, name: str) -> None:
    model = tiny(family, FAMILIES[family].dtype)
    policy = policies(evicting(model))[name]
    tokens, mask = padded([40, 33, 9], 97)
    worst, scale, evictions = run(model, policy, tokens, mask, 90)
    assert evictions >= 5
    assert worst <= FAMILIES[family].tolerance * max(1.0, scale)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", ["alone", "pyramid"])
def test_the_real_model(name: str) -> None:
    model = real()
    count = evicting(model)
    allocator = {"alone": cycle(count, 48, None, 56), "pyramid": Pyramid(56, 4)}[name]
    policy = Policy(Attention(16) >> ValueGuard() >> Stochastic() >> TopK(allocator), interval=8, recent=16)
    text = "The history of the lighthouse begins in Alexandria, where a tower of stone, " * 5
    tokens = tokenizer()(text, return_tensors="pt").input_ids[:, :72]
    worst, scale, evictions = run(model, policy, tokens, torch.ones_like(tokens), 66)
    assert evictions >= 5
    assert worst <= 2e-5 * scale


def text(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 97, (rows, width), generator=torch.Generator().manual_seed(seed))


def both(family: str = "llama", interval: int = 8) -> tuple[Any, Policy, Policy]:
    """Return a model, a policy that leaves a layer alone, and one whose budget there is never reached."""
    model = tiny(family, torch.float64)
    count = evicting(model)
    return model, vase(cycle(count, 24, None, 20), interval), vase(cycle(count, 24, BEYOND, 20), interval)


HOW: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "prompt in chunks": {"do_sample": False, "prefill_chunk_size": 16},
    "several of a prompt": {"do_sample": True, "num_return_sequences": 3},
}


def same_kept(one: Any, other: Any) -> None:
    """Check that two caches kept the same tokens in the layers in which the first one evicts."""
    assert one.layers
    for layer in one.layers:
        assert torch.equal(one.positions(layer), other.positions(layer)), f"layer {layer}"


@pytest.mark.parametrize("how", HOW)
def test_generate_as_with_a_budget_that_is_never_reached(how: str) -> None:
    model, alone, beyond = both()
    prompt, mask = padded([40, 33], 97)
    found = []
    for policy in (alone, beyond):
        torch.manual_seed(1)
        with EvictionCache(model, policy) as cache:
            options = {"max_new_tokens": 40, "min_new_tokens": 40, "pad_token_id": 0, **HOW[how]}
            out = model.generate(
                prompt, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, output_logits=True,
                **options,
            )  # fmt: skip
            later = out.sequences
            if len(later) == cache.num_requests:  # beams that were dropped have no turn
                again = torch.cat([later, text(len(later), 5, 3)], 1)
                whole = mask.repeat_interleave(len(again) // len(mask), 0)
                whole = torch.cat([whole, torch.ones_like(again[:, mask.shape[1] :])], 1)
                options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
                later = model.generate(again, attention_mask=whole, past_key_values=cache, **options)
            found.append((out.sequences, torch.stack(out.logits), later, cache.receipt()))
            for group in cache.groups:
                assert group.store is not None
                group.store.check_integrity()
    (sequences, logits, later, receipt), (same, close, also, other) = found
    assert torch.equal(sequences, same)
    assert torch.equal(later, also)
    assert (logits - close).abs().max() <= 1e-9
    assert receipt.evictions[0] >= 5
    same_kept(receipt, other)


def test_each_row_of_a_batch_equals_its_single_run() -> None:
    model = tiny("llama", torch.float64)
    prompts, mask = padded([40, 33, 9], 97)
    given = [vase(PerLayer((24, None, 20))), vase(PerLayer((24, None, 20))), h2o(PerLayer((16, None, 32)))]
    seeds, later = [0, 7, 3], text(3, 50, 5)
    logits, receipt = together(model, given, seeds, prompts, mask, later)
    assert receipt.skipped == {1: "left alone by the policy"}
    for r, (expected, kept, _) in enumerate(rows_alone(model, given, seeds, prompts, mask, later)):
        assert (logits[r] - expected).abs().max() <= 1e-9, f"row {r}"
        for layer, positions in kept.items():
            assert torch.equal(receipt.positions(layer)[r][:, : positions.shape[1]], positions), f"row {r}"


def drafted(model: Any, policy: Policy) -> tuple[Tensor, Any]:
    """Draft at random, take some back; return all logits and the receipt."""
    random, logits = torch.Generator().manual_seed(2), []
    with EvictionCache(model, policy, max_draft_tokens=DRAFTS) as cache:
        cache.activate_past_recording()
        width = 40
        for seed in range(40):
            logits.append(model(text(2, width, seed), past_key_values=cache).logits[:, -1])
            cache.crop(-int(torch.randint(0, min(width, DRAFTS + 1), (), generator=random)))
            width = 1 + int(torch.randint(0, DRAFTS + 1, (), generator=random))
        for group in cache.groups:
            assert group.store is not None
            group.store.check_integrity()
        return torch.stack(logits), cache.receipt()


@pytest.mark.skipif(not ANNOUNCES_DRAFTS, reason="transformers before 5.14 does not announce drafts")
def test_drafts_are_taken_back_in_a_layer_left_alone() -> None:
    model, alone, beyond = both()
    logits, receipt = drafted(model, alone)
    expected, other = drafted(model, beyond)
    assert (logits - expected).abs().max() <= 1e-9
    assert receipt.evictions[0] >= 5
    same_kept(receipt, other)


@pytest.mark.parametrize("family", KINDS)
def test_replay_is_decoding(family: str) -> None:
    model, alone, _ = both(family)
    prompts, mask = padded([40, 33, 9], 97)
    ids = torch.cat([prompts, text(3, 61, 5)], 1)
    mask = torch.cat([mask, torch.ones(3, 61, dtype=torch.long)], 1)
    expected, receipt = one_by_one(model, alone, ids, mask, 40)
    found = replay(model, alone, ids, 40, attention_mask=mask)
    assert (found.log_probs - expected).abs().max() <= 10 * ROUNDING.get(family, 1e-10)
    assert found.receipt.evictions == receipt.evictions
    same_kept(found.receipt, receipt)


def decode(model: Any, cache: EvictionCache, ids: Tensor) -> Tensor:
    return torch.stack([model(one, past_key_values=cache).logits[:, -1] for one in ids.split(1, 1)], 1)


@pytest.mark.parametrize("family", KINDS)
def test_a_fork_and_a_file_go_on_as_the_cache_does(family: str, tmp_path: Path) -> None:
    model, alone, _ = both(family)
    with EvictionCache(model, alone) as cache:
        model(text(2, 40), past_key_values=cache)
        decode(model, cache, text(2, 12, 1))
        cache.save(tmp_path / "cache.safetensors")
        forks, turned = cache.fork(), cache.fork([1, 0, 1])
        loaded = EvictionCache.load(tmp_path / "cache.safetensors", model)
        before = cache.receipt()
        for layer in before.layers:
            assert torch.equal(loaded.receipt().positions(layer), before.positions(layer))
        mine = {t.data_ptr() for group in cache.groups for t in group.store.tensors() if t.numel()}
        for group in forks.groups:
            assert mine.isdisjoint(t.data_ptr() for t in group.store.tensors() if t.numel())
        new = text(2, 30, 9)
        expected = decode(model, cache, new)
        for other in (forks, loaded):
            assert torch.equal(decode(model, other, new), expected)
            same_kept(other.receipt(), cache.receipt())
            other.unbind()
        most = ROUNDING.get(family, 1e-9)
        assert (decode(model, turned, new[[1, 0, 1]]) - expected[[1, 0, 1]]).abs().max() <= most
        turned.unbind()


def test_reset_and_another_batch() -> None:
    model, alone, _ = both()
    with EvictionCache(model, alone) as cache:
        first = model(text(2, 40), past_key_values=cache).logits
        decode(model, cache, text(2, 12, 1))
        cache.reset()
        assert torch.equal(model(text(2, 40), past_key_values=cache).logits, first)
        cache.reset()
        model(text(3, 40), past_key_values=cache)
        assert cache.receipt().seen == (40, 40, 40)


@pytest.mark.parametrize("allocator", [PerLayer((24, None, 40)), PerLayer((20, 24, 40)), Pyramid(40, 4)], ids=repr)
def test_bytes_equal_the_formula_layer_by_layer(allocator: Allocator) -> None:
    model = tiny("llama")
    with EvictionCache(model, Policy(Attention(16) >> ValueGuard() >> TopK(allocator), interval=8, recent=8)) as cache:
        model.generate(text(2, 60), max_new_tokens=40, do_sample=False, past_key_values=cache, pad_token_id=0)
        receipt = cache.receipt()
        heads, dim = 2, model.model.layers[0].self_attn.head_dim
        expected = 0
        for budget in allocator.budgets(3, 8):
            if budget is not None:
                slots = budget + 8
                each = heads * slots * (2 * dim) * 4 + 8 * heads * slots + 4 * dim * 16 * 4 + 4 * 16 + 4 * heads * slots
                expected += 2 * each
        assert receipt.nbytes == expected
        stores = [group.store for group in cache.groups if group.evicts]
        assert receipt.nbytes == sum(formula(store, 4, 0) for store in stores if store is not None)
        left = [layer for layer, budget in enumerate(allocator.budgets(3, 8)) if budget is None]
        assert list(receipt.skipped) == left
        held = 64 + 64 // 4 + 64  # it began with 64 slots, and has grown once
        assert receipt.other_nbytes == len(left) * 2 * heads * held * (2 * dim) * 4
        assert receipt.layers == tuple(layer for layer in range(3) if layer not in left)
        for layer in left:
            with pytest.raises(UsageError, match=f"layer {layer} does not evict"):
                receipt.positions(layer)


def test_a_layer_left_alone_grows_by_a_quarter() -> None:
    model = tiny("llama")
    with EvictionCache(model, vase(PerLayer((24, None, 24)))) as cache:
        model(text(1, 40), past_key_values=cache)
        store = cache.groups[-1].store
        assert isinstance(store, GrowingStore)
        sizes = []
        for token in text(1, 400, 1).split(1, 1):
            model(token, past_key_values=cache)
            sizes.append(store.spec.capacity)
        assert list(dict.fromkeys(sizes)) == [64, 144, 244, 369, 525]
        assert store.nbytes() == 525 * 2 * 2 * store.spec.head_dim * 4
        assert cache.receipt().capacity == 32
        assert cache.receipt().slots[0] <= 32


def test_a_layer_of_latents_is_left_alone_as_latents() -> None:
    model = tiny("deepseek_v3", torch.float64)
    policy = vase(cycle(evicting(model), 24, None))
    with EvictionCache(model, policy) as cache:
        model(text(1, 40), past_key_values=cache)
        store = cache.groups[-1].store
        assert isinstance(store, GrowingStore)
        assert store.nbytes() == 64 * store.spec.head_dim * 8  # one tensor


class LeavesAlone:
    """Plans what it is told."""

    needs: frozenset[str] = frozenset()

    def __init__(self, layers: tuple[LayerPlan | None, ...]) -> None:
        self.layers, self.inner = layers, Policy(KeyNorm() >> TopK(24), interval=8, recent=8)

    def plan(self, model: Any) -> Plan:
        return Plan(self.layers)

    def init(self, spec: Any, rows: int) -> Any:
        return self.inner.init(spec, rows)

    def select(self, view: Any, state: Any) -> Any:
        assert all(self.layers[layer] is not None for layer in view.layer.tolist()), "shown a layer left alone"
        return self.inner.select(view, state)


def test_a_policy_is_never_shown_a_layer_that_it_leaves_alone() -> None:
    model, plan = tiny("llama"), LayerPlan(24, 32, 8, 8, 0)
    with EvictionCache(model, LeavesAlone((None, plan, None))) as cache:
        model(text(1, 40), past_key_values=cache)
        decode(model, cache, text(1, 40, 1))
        assert cache.receipt().layers == (1,)
        assert cache.receipt().evictions == (6,)


def test_what_cannot_be_held_is_refused() -> None:
    model, alone = tiny("llama"), vase(PerLayer((24, None, 20)))
    with pytest.raises(BindError, match="leaves every layer alone"):
        EvictionCache(model, LeavesAlone((None, None, None)))
    with pytest.raises(UnsupportedError, match="leaves layer 1 alone, and another one evicts from it"):
        EvictionCache(model, [alone, vase(PerLayer((24, 30, 20)))])
    with pytest.raises(UnsupportedError, match=r"static=True .* leaves layers alone, whose slots grow: 1;"):
        EvictionCache(model, alone, static=True)
    with pytest.raises(BudgetError, match=r"names 2 layers, and the model has 3 that may evict"):
        EvictionCache(model, vase(PerLayer((24, 20))))
    with pytest.raises(
        BudgetError, match=r"layer 2 of the 3 that may evict: a budget of 8 is not larger than recent=8"
    ):
        EvictionCache(model, vase(PerLayer((24, None, 8))))
    with pytest.raises(BudgetError, match=r"layer 1 of the 3 that may evict: Sinks\(16\) protects 16 slots"):
        EvictionCache(model, Policy(Sinks(16) >> TopK(PerLayer((24, 20, None))), recent=8))
    with pytest.raises(
        BudgetError, match=r"layer 2 of the 3 that may evict: a budget of 8 is not larger than recent=8"
    ):
        EvictionCache(model, vase(Pyramid(17)))
    with pytest.raises(BudgetError, match=r"Pyramid\(8\) shares out what the last tokens leave"):
        EvictionCache(model, vase(Pyramid(8)))
    assert model.config._attn_implementation == "sdpa"


def test_static_slots_of_budgets_that_differ() -> None:
    model, policy = tiny("llama", torch.float64), vase(Pyramid(26, 2))
    ids = text(1, 40)
    with EvictionCache(model, policy) as cache, EvictionCache(model, policy, static=True) as static:
        model(ids, past_key_values=cache)
        model(ids, past_key_values=static)
        expected = decode(model, cache, text(1, 40, 1))
        assert (decode(model, static, text(1, 40, 1)) - expected).abs().max() <= 1e-9
        same_kept(static.receipt(), cache.receipt())


def test_a_fork_of_some_rows_is_saved_in_the_groups_that_it_has(tmp_path: Path) -> None:
    model, rows = tiny("llama", torch.float64), [vase(PerLayer((24, 24, None))), vase(PerLayer((24, 40, None)))]
    with EvictionCache(model, rows) as cache:
        model(text(2, 40), past_key_values=cache)
        fork = cache.fork([0])  # its layers 0 and 1 have one plan now
        fork.save(tmp_path / "fork.safetensors")
        loaded = EvictionCache.load(tmp_path / "fork.safetensors", model)
        assert torch.equal(decode(model, loaded, text(1, 30, 9)), decode(model, fork, text(1, 30, 9)))
        same_kept(loaded.receipt(), fork.receipt())
        fork.unbind()
        loaded.unbind()
