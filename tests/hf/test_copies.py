"""Forks and files: a copy goes on as the cache itself would."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvpolicy import Constant, Keep, Policy, Recency, State, Stochastic, TopK, UsageError, View
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.hf.compat import ANNOUNCES_DRAFTS
from tests.families import KINDS
from tests.hf.test_oracle import padded
from tests.hf.zoo import zoo
from tests.models import real, tiny, tokenizer

ZOO = zoo(24)
CASES = [*(("llama", name) for name in ZOO), *((family, "vase") for family in KINDS if family != "llama")]


def begin(model: Any, cache: EvictionCache, later: int = 12) -> Tensor:
    """Give a ragged prompt and some tokens; return the mask."""
    tokens, mask = padded([40, 33, 9], 97)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return go_on(model, cache, mask, text(3, later))[1]


def go_on(model: Any, cache: EvictionCache, mask: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    logits = []
    for token in new.split(1, 1):
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        positions = (mask.cumsum(1) - 1)[:, -1:]
        logits.append(model(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1])
    return torch.stack(logits, 1), mask


def text(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 97, (rows, width), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_fork_and_a_file_go_on_as_the_cache_does(family: str, name: str, tmp_path: Path) -> None:
    model, policy = tiny(family, torch.float64), ZOO[name]
    with torch.no_grad(), EvictionCache(model, policy, seeds=[0, 5, 0]) as cache:
        mask, new = begin(model, cache), text(3, 30, 9)
        cache.save(tmp_path / "cache.safetensors")
        fork, deep = cache.fork(), copy.deepcopy(cache)
        loaded = EvictionCache.load(tmp_path / "cache.safetensors", model)
        assert loaded.receipt() == cache.receipt() == fork.receipt()
        expected, _ = go_on(model, cache, mask, new)
        for other in (fork, loaded, deep):
            found, _ = go_on(model, other, mask, new)
            assert torch.equal(found, expected)
            for layer in cache.receipt().layers:
                assert torch.equal(other.receipt().positions(layer), cache.receipt().positions(layer))
            other.unbind()


def test_one_prompt_many_questions() -> None:
    model, policy = tiny("llama", torch.float64), ZOO["vase"]
    prompt, questions = text(1, 60), text(4, 7, 3)
    with torch.no_grad(), EvictionCache(model, policy) as cache:
        model(prompt, past_key_values=cache)
        before = cache.receipt()
        forks = cache.fork([0] * 4)
        assert cache.receipt() == before
        assert forks.receipt().seen == (60,) * 4
        assert forks.receipt().nbytes == 4 * before.nbytes
        together = model(questions, past_key_values=forks).logits
        for r in range(4):
            fork = cache.fork()
            alone = model(questions[r : r + 1], past_key_values=fork).logits
            assert (together[r] - alone[0]).abs().max() <= 1e-9
            fork.unbind()
        forks.unbind()
        assert cache.receipt() == before


def test_forks_share_no_memory_and_free_the_model_one_by_one() -> None:
    model, policy = tiny("llama"), ZOO["h2o"]
    with torch.no_grad(), EvictionCache(model, policy) as cache:
        begin(model, cache)
        fork = cache.fork()
        for one, other in zip(cache.groups, fork.groups, strict=True):
            mine = {t.data_ptr() for t in one.store.tensors() if t.numel()}
            assert mine.isdisjoint(t.data_ptr() for t in other.store.tensors() if t.numel())
    assert model.config._attn_implementation == "kvpolicy"
    fork.unbind()
    assert model.config._attn_implementation == "sdpa"


def test_seeds_of_a_fork() -> None:
    model, policy = tiny("llama"), Policy(Constant() >> Stochastic() >> TopK(24), interval=8, recent=8)
    with torch.no_grad(), EvictionCache(model, policy) as cache:
        model(text(1, 60), past_key_values=cache)
        fork = cache.fork([0, 0, 0], seeds=[1, 2, 1])
        for token in text(1, 30).expand(3, -1).split(1, 1):
            model(token, past_key_values=fork)
        kept = fork.receipt().positions(0)
        assert torch.equal(kept[0], kept[2])
        assert not torch.equal(kept[0], kept[1])
        fork.unbind()


def test_policies_of_rows_are_forked_and_saved_with_them(tmp_path: Path) -> None:
    model, policies = tiny("llama", torch.float64), [ZOO["vase"], ZOO["h2o"], ZOO["vase"]]
    with torch.no_grad(), EvictionCache(model, policies) as cache:
        mask, new = begin(model, cache), text(3, 20, 9)
        cache.save(tmp_path / "x")
        turned, loaded = cache.fork([2, 0, 1]), EvictionCache.load(tmp_path / "x", model, policies)
        expected, _ = go_on(model, cache, mask, new)
        found, _ = go_on(model, turned, mask[[2, 0, 1]], new[[2, 0, 1]])
        assert (found - expected[[2, 0, 1]]).abs().max() <= 1e-9
        assert torch.equal(go_on(model, loaded, mask, new)[0], expected)
        for other in (turned, loaded):
            other.unbind()


@pytest.mark.skipif(not ANNOUNCES_DRAFTS, reason="static=True needs transformers 5.14")
def test_a_static_cache_forks_and_loads(tmp_path: Path) -> None:
    model = tiny("gemma3")
    with torch.no_grad(), EvictionCache(model, ZOO["vase"], static=True) as cache:
        mask, new = begin(model, cache), text(3, 20, 9)
        cache.save(tmp_path / "x")
        fork, loaded = cache.fork(), EvictionCache.load(tmp_path / "x", model)
        expected, _ = go_on(model, cache, mask, new)
        for other in (fork, loaded):
            assert other.is_compileable
            assert torch.equal(go_on(model, other, mask, new)[0], expected)
            other.unbind()


class Mine:
    """Another's policy, whose text nobody can read."""

    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.inner = Policy(Recency() >> TopK(24), interval=8, recent=8)

    def plan(self, model: Any) -> Any:
        return self.inner.plan(model)

    def init(self, spec: Any, rows: int) -> State:
        return self.inner.init(spec, rows)

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        return self.inner.select(view, state)

    def __repr__(self) -> str:
        return "Mine!"


def test_a_policy_that_cannot_be_read_must_be_given(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad(), EvictionCache(model, Mine()) as cache:
        begin(model, cache)
        cache.save(tmp_path / "x")
    with pytest.raises(UsageError, match=r"saved under Mine!; give that as policy=\.\.\."):
        EvictionCache.load(tmp_path / "x", model)
    with pytest.raises(UsageError, match="saved under Mine!, and policy is Policy"):
        EvictionCache.load(tmp_path / "x", model, ZOO["vase"])
    assert model.config._attn_implementation == "sdpa"
    EvictionCache.load(tmp_path / "x", model, Mine()).unbind()


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, other = tiny("llama"), tiny("llama")
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    with torch.no_grad(), EvictionCache(model, ZOO["vase"]) as cache:
        begin(model, cache)
        cache.save(tmp_path / "x")
    for wrong, what in (
        (other, "weights"), (tiny("llama", torch.float64), "dtype"), (tiny("qwen3"), "class"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"saved with another model: its {what}"):
            EvictionCache.load(tmp_path / "x", wrong)


def test_files_that_are_no_cache(tmp_path: Path) -> None:
    model = tiny("llama")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(UsageError, match="is no cache"):
        EvictionCache.load(tmp_path / "other", model)
    with torch.no_grad(), EvictionCache(model, ZOO["vase"]) as cache:
        with pytest.raises(UsageError, match="nothing to save"):
            cache.save(tmp_path / "x")
        begin(model, cache)
        cache.save(tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="not a whole safetensors file"):
        EvictionCache.load(tmp_path / "half", model)
    (tmp_path / "new").write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(UsageError, match="format 9, and this version"):
        EvictionCache.load(tmp_path / "new", model)
    assert [path.name for path in tmp_path.glob("*.part")] == []


def test_pickles_and_shallow_copies_are_refused() -> None:
    with EvictionCache(tiny("llama"), ZOO["vase"]) as cache:
        for make in (copy.copy, pickle.dumps):
            with pytest.raises(UsageError, match=r"write cache.fork\(\), or cache.save\(path\)"):
                make(cache)


def test_what_cannot_be_forked() -> None:
    model = tiny("llama")
    with torch.no_grad(), EvictionCache(model, ZOO["vase"]) as cache:
        with pytest.raises(UsageError, match="nothing to fork"):
            cache.fork()
        begin(model, cache)
        for named in ([], [3], [-1], [0.5], 0):
            with pytest.raises(UsageError, match="name some of them, as fork"):
                cache.fork(named)
        with pytest.raises(UsageError, match="seeds names 2 requests, and the fork has 3 rows"):
            cache.fork([0, 1, 2], seeds=[1, 2])
    with pytest.raises(UsageError, match="fork it before its with block ends"):
        cache.fork()


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    model, policy = real(), zoo(64, interval=16, recent=16)["vase"]
    ids = tokenizer()("The tide rose, and the tide fell. " * 20, return_tensors="pt").input_ids
    with torch.no_grad(), EvictionCache(model, policy) as cache:
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "x")
        forks, loaded = cache.fork([0, 0]), EvictionCache.load(tmp_path / "x", model)
        token = torch.tensor([[504]])
        expected = [model(token + step, past_key_values=cache).logits for step in range(20)]
        again = [model(token + step, past_key_values=loaded).logits for step in range(20)]
        twice = [model((token + step).expand(2, 1), past_key_values=forks).logits for step in range(20)]
        assert torch.equal(torch.cat(again), torch.cat(expected))
        for one, two in zip(expected, twice, strict=True):
            assert (two - one).abs().max() <= 1e-4 * one.abs().max()
        for other in (forks, loaded):
            other.unbind()
