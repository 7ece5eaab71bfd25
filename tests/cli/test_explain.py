"""`kvpolicy explain`: the chain in words, what engines say, memory to the byte, and what an eviction costs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpolicy import Allocator, BindError, BudgetError, Policy, Recency, TopK, UnsupportedError, catalog
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.vllm import Config
from kvpolicy.adapters.vllm.config import planned
from kvpolicy.cli import default_model
from kvpolicy.cli.costs import costs_of
from kvpolicy.cli.shapes import read_shape
from kvpolicy.explanation import explain
from kvpolicy.footprint import footprint
from tests.cli.tools import Command
from tests.models import tiny as tiny_model


def test_a_policy_in_words(kvpolicy: Command) -> None:
    result = kvpolicy("explain", "vase(1024)")
    assert result.code == 0, result.err
    out = result.out
    assert "interval=64, recent=64)" in out
    assert "Attention  scorer: Score a token by the attention that the newest queries pay it." in out
    assert "pool=5" in out
    assert "width of the average over neighbouring positions" in out
    assert "Cut to 1,024 slots per KV head at the end of the prompt" in out
    assert "every 64 decoded tokens, where it holds more; never more than 1,088 slots" in out
    assert "that is 320 at most: they always fit." in out
    assert "newest 64 queries, 4 bytes more a slot" in out
    assert out.count("follows it") == 3
    assert "memory" not in out
    assert "--model NAME|FOLDER tells memory" in result.err


def test_every_recipe_is_explained(kvpolicy: Command) -> None:
    for one in catalog.policies():
        text = f"{one.name}(1024)"
        if one.name == "duo_attention":  # names the heads of every layer, of which a model that is not told has 32
            text = f"duo_attention(1024, {((True, False),) * 32})"
        result = kvpolicy("explain", text, "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out)
        assert Policy.parse(found["policy"]) == Policy.parse(text)
        assert all(stage["sentence"] for stage in found["stages"])
        assert all(parameter["meaning"] for stage in found["stages"] for parameter in stage["parameters"])


def test_what_is_mixed_stands_below_what_mixes_it() -> None:
    text = "0.5 * (KeyNorm() >> Normalize('z')) + Recency() >> Sinks(2) >> TopK(Pyramid(512, 5))"
    told = explain(Policy.parse(text), num_layers=4)
    depths = {stage.name: (stage.role, stage.depth) for stage in told.stages}
    assert depths == {
        "Sum": ("scorer", 0),
        "Scaled": ("scorer", 1),
        "KeyNorm": ("scorer", 2),
        "Normalize": ("transform", 3),
        "Recency": ("scorer", 1),
        "Sinks": ("transform", 0),
        "TopK": ("selector", 0),
        "Pyramid": ("allocator", 1),
    }
    assert [(one.value, one.default) for one in told.stages[-1].parameters] == [("512", False), ("5", False)]
    assert told.layers[0].budget > told.layers[3].budget


def test_budgets_that_differ_are_told(kvpolicy: Command) -> None:
    out = kvpolicy("explain", "Recency() >> TopK(PerLayer((512, None, 256)))").out
    assert "Cut to 256 to 512 slots per KV head (in 2 of 3 layers, the others are left alone)" in out
    out = kvpolicy("explain", "snapkv(512)").out
    assert "Never while decoding" in out
    assert "over 32 layers, 1,024 on average" in kvpolicy("explain", "pyramidkv(1024)").out
    assert "on average over the heads" in kvpolicy("explain", "Attention(over='all') >> TopK(Adaptive(512))").out
    assert "in the largest head" in kvpolicy("explain", "Recency() >> TopK(PerHead((512, 256)))").out


def test_guards_that_may_overflow_are_told(kvpolicy: Command) -> None:
    out = kvpolicy("explain", "Prompt(0.6) >> ValueGuard(0.6) >> TopK(1000)").out
    assert "warning: together and with the last 64 tokens they may protect 1,260, more than 1,000" in out
    assert "Prompt(share=0.6) protects 600 of 1,000 slots." in out
    assert "guards" not in kvpolicy("explain", "Recency() >> TopK(1000)").out.split()


@pytest.mark.parametrize(
    "text", ["snapkv(256)", "pyramidkv(256, interval=64)", "Attention(over='all') >> TopK(Adaptive(512))"]
)
def test_refusals_are_those_of_the_adapters(text: str) -> None:
    engines = {one.name: one for one in explain(Policy.parse(text)).engines}
    assert engines["transformers"].follows
    assert not engines["vLLM"].follows
    with pytest.raises(BindError) as refused:
        Config(Policy.parse(text).text(full=True))
    assert engines["vLLM"].why == str(refused.value)
    assert ("max_new_tokens" in engines["FlashCache"].why) == (Policy.parse(text).interval is None)


@dataclasses.dataclass(frozen=True, repr=False)
class Listed(Allocator):
    """Be an allocator of another package's, which names its layers."""

    budget: int

    @property
    def layers_named(self) -> int:
        return 5

    def budgets(self, num_layers: int, recent: int) -> tuple[int, ...]:
        if num_layers != self.layers_named:
            raise BudgetError(f"named 5 layers, and the model has {num_layers}")
        return (self.budget,) * num_layers


@pytest.mark.parametrize(
    ("policy", "layers"),
    [
        (Policy.parse("cake(1024, preferences=(2.0, 1.0, 1.0))"), 3),
        (Policy.parse("duo_attention(2048, ((True, False), (False, False)))"), 2),
        (Policy.parse("Recency() >> TopK(PerHead((512, 256)))"), 32),
        (Policy(Recency() >> TopK(Listed(512))), 5),
    ],
)
def test_a_policy_that_names_layers_is_explained_for_as_many(policy: Policy, layers: int) -> None:
    assert len(explain(policy).layers) == layers
    with pytest.raises(UnsupportedError, match="budgets of their own"):
        planned(policy, repr(policy))


def test_transformers_is_said_to_follow_what_it_binds() -> None:
    model = tiny_model("llama")
    for one in catalog.policies():
        text = f"{one.name}(1024)" if one.name != "duo_attention" else f"duo_attention(1024, {((True, False),) * 3})"
        policy = Policy.parse(text)
        with EvictionCache(model, policy, max_new_tokens=8):
            pass
        engines = {engine.name: engine for engine in explain(policy, num_layers=3, num_heads=2).engines}
        assert engines["transformers"].follows, engines["transformers"].why
        reads_weights = policy.needs & {"output_projection", "rotary"}
        assert not (reads_weights and (engines["vLLM"].follows or engines["FlashCache"].follows))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "minicpm3"])
def test_a_model_without_weights_is_refused_as_with_them(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    for text in ("criticalkv(256)", "expected_attention(256)"):
        said = shape.refusal(Policy.parse(text), 8)
        assert said == dataclasses.replace(shape, model=model).refusal(Policy.parse(text), 8)
        assert (said is None) == (family != "minicpm3")
        if said is None:
            costs = costs_of(Policy.parse(text), shape, batch=1, tokens=1000, max_new_tokens=8)
            assert costs.eviction.flops > 0


def test_what_no_engine_can_give_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy.parse("knorm(256)")
    monkeypatch.setattr(type(policy.chain.scorer), "needs", frozenset({"telepathy"}))
    for one in explain(policy).engines:
        assert not one.follows
        assert "needs telepathy (KeyNorm), which the " in one.why
        assert one.why.endswith("cannot give; score without KeyNorm")


# Memory


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("llama", "vase(24, interval=8, recent=8)"),
        ("gemma3", "recommended(24, interval=8)"),
        ("minicpm3", "vase(24, interval=8, recent=8)"),
        ("qwen3_moe", "recommended(24, interval=8)"),
    ],
)
def test_memory_is_what_a_cache_holds(family: str, text: str, tmp_path: Path) -> None:
    model, policy = tiny_model(family), Policy.parse(text)
    model.config.save_pretrained(tmp_path)  # and no weights
    shape = read_shape(str(tmp_path), model.dtype)
    found = footprint(policy, shape.layers, batch=2, tokens=100)
    with torch.no_grad(), EvictionCache(model, policy) as cache:
        model(torch.arange(2, 12).expand(2, -1), past_key_values=cache)
        receipt = cache.receipt()
    assert (found.total, found.window) == (receipt.nbytes, receipt.window_nbytes)
    assert set(shape.skipped) == set(receipt.skipped)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_memory_and_cost_of_a_model(kvpolicy: Command, tiny: Path) -> None:
    wanted = ["explain", "vase(64, recent=16)", "--model", tiny, "--batch", 2, "--tokens", 1000]
    result = kvpolicy(*wanted, "--bandwidth", 100, "--flops", 1)
    assert result.code == 0, result.err
    found = json.loads(kvpolicy(*wanted, "--bandwidth", 100, "--flops", 1, "--json").out)["model"]
    for count in (found["memory"]["total"], found["memory"]["full"], found["eviction"]["read"]):
        assert f"{count:,} B" in result.out
    assert found["memory"]["full"] == 2 * 2 * 1000 * 2 * 2 * 8 * 4
    touched = found["eviction"]["read"] + found["eviction"]["written"]
    assert found["eviction_seconds"] == max(touched / 100e9, found["eviction"]["flops"] / 1e12)
    assert found["share"] == pytest.approx(
        found["eviction_seconds"] / (found["eviction_seconds"] + 64 * found["step_seconds"])
    )
    assert "of decoding, with an eviction every 64 tokens" in result.out
    untimed = kvpolicy(*wanted)
    assert "at the speeds given" not in untimed.out
    assert "--bandwidth GB/s tells the time" in untimed.err
    halves = json.loads(kvpolicy(*wanted, "--dtype", "bfloat16", "--json").out)["model"]["memory"]
    assert 2 * halves["pairs"] == found["memory"]["pairs"]


def test_without_an_interval_there_is_no_share(kvpolicy: Command, tiny: Path) -> None:
    wanted = ["explain", "snapkv(128)", "--model", tiny, "--bandwidth", 100, "--json", "--max-new-tokens"]
    few, many = (json.loads(kvpolicy(*wanted, count).out)["model"] for count in (10, 300))
    assert few["share"] is None
    assert few["eviction_seconds"] > 0
    assert many["memory"]["pairs"] - few["memory"]["pairs"] == 290 * 2 * 2 * 2 * 8 * 4


def test_memory_that_nothing_saves(kvpolicy: Command, tiny: Path) -> None:
    assert "nothing is saved at this length" in kvpolicy("explain", "knorm(256)", "--model", tiny, "--tokens", 100).out


def test_the_default_model_is_not_fetched(kvpolicy: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr(default_model, "default_model", fetch)
    assert "memory of" not in kvpolicy("explain", "vase(1024)").out
    folder = default_model.cache_folder() / default_model.FOLDER
    shutil.copytree(tiny, folder)
    monkeypatch.setattr(default_model, "is_complete", lambda path: path == folder)
    out = kvpolicy("explain", "vase(1024)").out
    assert "memory of SmolLM2-135M-Instruct, float32, batch 1" in out
    assert "of 2,048 tokens a request" in out


def test_a_policy_for_another_model_than_the_default_one(
    kvpolicy: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_model, "is_complete", lambda _: True)
    monkeypatch.setattr(default_model, "cache_folder", lambda: tiny.parent)
    monkeypatch.setattr(default_model, "FOLDER", tiny.name)
    text = "Recency() >> TopK(PerLayer((512, None, 256)))"
    result = kvpolicy("explain", text)
    assert result.code == 0
    assert "memory of" not in result.out
    assert "names 3 layers, and the model has 2" in kvpolicy("explain", text, "--model", tiny).error


def test_a_model_that_cannot_be_bound_is_told(kvpolicy: Command, tmp_path: Path) -> None:
    tiny_model("minicpm3").config.save_pretrained(tmp_path)
    result = kvpolicy("explain", "Attention(over='all') >> TopK(Adaptive(512))", "--model", tmp_path)
    assert "latent attention, which caches one head" in result.out
    assert "memory and cost are not told" in result.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch", 0], "--batch 0: it is at least 1"),
        (["--tokens", 0], "--tokens 0"),
        (["--bandwidth", 0], "--bandwidth 0.0: it is a number above 0"),
        (["--bandwidth", "inf"], "above 0"),
        (["--flops", 3], "give --bandwidth, too"),
        (["--dtype", "float23"], "float32"),
        (["--model", "/no/such/folder"], "there is no folder"),
    ],
)
def test_bad_options(kvpolicy: Command, options: list[Any], said: str) -> None:
    result = kvpolicy("explain", "vase(1024)", *options)
    assert result.code == 2
    assert said in result.error


@pytest.mark.parametrize(
    ("text", "said"), [("vase", "with brackets"), ("vase(64)", "is not larger than recent=64"), ("nobody(1)", "nobody")]
)
def test_bad_policies(kvpolicy: Command, text: str, said: str) -> None:
    result = kvpolicy("explain", text)
    assert result.code == 2
    assert said in result.error


def test_a_configuration_that_tells_nothing(kvpolicy: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    result = kvpolicy("explain", "vase(1024)", "--model", tmp_path)
    assert result.code == 2
    assert "does not tell what its layers cache" in result.error
