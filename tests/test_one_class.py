"""A policy in one class, without the algebra, is followed by every adapter as one of stages is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy import (
    BindError,
    BudgetError,
    CompositionError,
    EvictionPolicy,
    KVPolicyError,
    LayerPlan,
    ParseError,
    Policy,
    UnsupportedError,
    parse_policy,
)
from kvpolicy.adapters.flash_attn import EvictionState, FlashCache, evict_
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.vllm import Config, Settings
from kvpolicy.adapters.vllm.accounts import account
from kvpolicy.cli.app import run
from kvpolicy.evaluation.templates import fill
from kvpolicy.grammar import text_of
from kvpolicy.policies import knorm
from kvpolicy.testing import check_policy
from tests.cli.tools import save_tiny
from tests.one_class import ShortKeys, register

SMALL = {"interval": 4, "recent": 3}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    options: dict[str, Any] = {"vocab_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **options, eos_token_id=None)).eval()


def asked(given: Any) -> Any:
    return SimpleNamespace(extra_args={"kvpolicy": given}, seed=None)


def test_it_keeps_every_invariant() -> None:
    before = settings.get_current_profile_name()
    settings.register_profile("one class", max_examples=5, database=None, derandomize=True)
    settings.load_profile("one class")
    try:
        check_policy(ShortKeys(8, **SMALL))
    finally:
        settings.load_profile(before)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"budget": 32, "recent": 64}, "^a budget of 32 is not larger than recent=64: .*lower recent, to 8 say$"),
        (
            {"heads": (128, 16), "recent": 16},
            "^the KV head with the fewest slots: a budget of 16 is not larger",
        ),
        (
            {"capacity": 159},
            r"^a capacity of 159 does not hold a budget of 128 and interval=32; .*capacity=160\)",
        ),
        ({"capacity": 128, "interval": None}, "a budget of 128 and one more token; write .*capacity=129"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, Any], message: str) -> None:
    given = {"budget": 128, "capacity": 160, "interval": 32, "recent": 4, "window": 0}
    LayerPlan(**given)
    with pytest.raises(BudgetError, match=message):
        LayerPlan(**(given | sizes))


# transformers


def kept(model: Any, policy: EvictionPolicy, path: Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    prompt = torch.arange(1, 31)[None]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False}
    with EvictionCache(model, policy) as cache:
        tokens = model.generate(prompt, past_key_values=cache, **options)
        if path is not None:
            cache.save(path)
        assert cache.receipt().evictions == (5,)
        return tokens, cache.receipt().positions(1)


def test_transformers(model: Any, tmp_path: Path) -> None:
    tokens, positions = kept(model, knorm(12, **SMALL))
    again, same = kept(model, ShortKeys(12, **SMALL), tmp_path / "cache")
    assert torch.equal(tokens, again)
    assert torch.equal(positions, same)
    with EvictionCache.load(tmp_path / "cache", model) as cache:  # by its repr, since the recipe is registered
        assert torch.equal(cache.receipt().positions(1), positions)
        assert isinstance(cache.policies[0], ShortKeys)
        assert "short_keys(12, interval=4, recent=3)" in str(cache.receipt())


# FlashAttention's layouts


def test_flash_cache() -> None:
    found = []
    for policy in (knorm(12, **SMALL), ShortKeys(12, **SMALL)):
        torch.manual_seed(1)
        cache = FlashCache(policy, num_layers=1, num_heads=2, num_query_heads=4, head_dim=8, dtype=torch.float32)
        for count in (30, *[1] * 9):
            q, k, v = torch.randn(1, count, 4, 8), torch.randn(1, count, 2, 8), torch.randn(1, count, 2, 8)
            cache.attend(0, q, k, v)
            cache.step()
        found.append(cache.receipt().positions(0))
    assert found[0].shape == (1, 2, 13)
    assert torch.equal(*found)


def test_evict_in_place() -> None:
    found = []
    for policy in (knorm(12, **SMALL), ShortKeys(12, **SMALL)):
        torch.manual_seed(1)
        k, v, lengths = torch.randn(1, 16, 2, 8), torch.randn(1, 16, 2, 8), torch.tensor([16], dtype=torch.int32)
        state = EvictionState(policy, slots=16, num_layers=1, num_heads=2, num_query_heads=4, head_dim=8,
                              dtype=torch.float32)  # fmt: skip
        evict_(k, v, lengths, policy, state, tokens=16)
        assert lengths.tolist() == [12]
        found.append(torch.cat([k, v])[:, :12])
    assert torch.equal(*found)


# Texts, and vLLM, which is configured by them


def test_a_text_is_read_by_parse_policy() -> None:
    policy = parse_policy(" short_keys(96, recent=8) ")
    assert isinstance(policy, ShortKeys)
    assert (policy.layer.budget, policy.layer.interval, policy.layer.recent) == (96, 64, 8)
    assert repr(parse_policy(repr(policy))) == repr(policy)
    assert parse_policy("knorm(96)") == Policy.parse("knorm(96)")
    with pytest.raises(ParseError, match=r"of the class ShortKeys, which is not made of stages; kvpolicy.parse_policy"):
        Policy.parse("short_keys(96)")
    with pytest.raises(ParseError, match="short_keys has no parameter 'bugdet'"):
        parse_policy("short_keys(bugdet=96)")


def test_text_of_is_read_again() -> None:
    for policy in (ShortKeys(96, **SMALL), knorm(96, **SMALL)):
        assert repr(parse_policy(text_of(policy))) == repr(policy)
    with pytest.raises(ParseError, match="<nameless> is no text that makes a Nameless again: let its repr be the call"):
        text_of(parse_policy("Nameless(96)"))
    (filled,) = fill(["short_keys"], [96])
    assert filled.text == "short_keys(96, interval=64, recent=64)"
    assert isinstance(filled.policy, ShortKeys)


def test_only_stages_are_joined() -> None:
    for text in ("short_keys(96) >> 3", "vase(96) >> vase(96)", "3 >> 4"):
        with pytest.raises(ParseError, match="joins stages, and neither side is one"):
            parse_policy(text)
    with pytest.raises(CompositionError, match="only a stage can stand here"):
        parse_policy("short_keys(96) >> TopK(3)")


def test_vllm_settings() -> None:
    engine, stages = Config("short_keys(64, recent=16)", interval=32), Config("knorm(64, recent=16)", interval=32)
    assert isinstance(engine.default[0], ShortKeys)
    assert engine.plan == stages.plan
    assert engine.default[0] is Config("short_keys(64, recent=16)", interval=32).default[0]
    for given in ({"budget": 40}, "short_keys(40, interval=32, recent=16)"):
        found = Settings.of(engine, asked(given))
        assert isinstance(found.policy, ShortKeys)
        assert found.plan == Settings.of(stages, asked({"budget": 40})).plan
    named = Settings.of(Config("vase(256)"), asked("short_keys"))
    assert (named.plan.budget, named.plan.interval) == (256, 64)
    assert Settings.of(engine, asked({"policy": "knorm", "budget": 32})).plan.recent == 16
    counted = account("short_keys(64, interval=32, recent=16)", prompt=300, output=100)
    assert counted == account(ShortKeys(64, interval=32, recent=16), prompt=300, output=100)
    assert counted == account("knorm(64, interval=32, recent=16)", prompt=300, output=100)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"policy": "wary(32)", "interval": 16}, ParseError, "wary has no parameter 'interval'; it has budget"),
        ("layered(32)", UnsupportedError, "layers budgets of their own"),
        ("headed(32)", UnsupportedError, "heads budgets of their own"),
        ("once(32)", UnsupportedError, "write an interval"),
        ("strange(32)", UnsupportedError, "needs tea, which the vLLM adapter cannot give"),
        ("short_keys", ParseError, r"write short_keys\(1024\) with brackets"),
        ({"policy": "wary(32)", "window": 2}, BindError, r"wary\(32\) asks for 4 queries"),
    ],
)
def test_what_vllm_cannot_follow(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Config.of(SimpleNamespace(additional_config={"kvpolicy": given}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "short_keys(80, interval=32, recent=16)"}, "fills 112 slots, and the engine sets 96 aside"),
        ({"budget": 10}, "budget=10 does not fit short_keys"),
        ("wary", "asks 4 queries, and the engine remembers 0"),
    ],
)
def test_what_a_request_cannot_have(given: Any, message: str) -> None:
    with pytest.raises(KVPolicyError) as error:
        Settings.of(Config("short_keys(64, interval=32, recent=16)"), asked(given))
    assert message in str(error.value)


# The command line


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "tiny")
    options = ["--model", str(folder), "--max-new-tokens", "24", "--no-chat", "Once upon a time there was a lighthouse"]
    said = []
    for policy in ("knorm(16, recent=4)", "short_keys(16, recent=4)"):
        assert run(["generate", "--policy", policy, "--interval", "4", "--recent", "3", *options]) == 0
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out
    assert "short_keys(16, interval=4, recent=3)" in said[1].err
    assert run(["generate", "--policy", "wary(16)", "--interval", "4", *options]) == 2
    assert "wary has no parameter 'interval'" in capsys.readouterr().err
    assert run(["list"]) == 0
    assert "short_keys" in capsys.readouterr().out


def test_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path))

    def told(*arguments: str) -> str:
        assert run(["explain", *arguments]) == 0
        return capsys.readouterr().out

    folder = save_tiny(tmp_path / "tiny")
    said = told("short_keys(16, interval=4, recent=3)", "--model", str(folder), "--bandwidth", "100")
    assert "ShortKeys, a class that is not made of stages: Keep short keys and remember how long each is" in said
    assert "Cut to 16 slots per KV head" in said
    assert "after every 4 decoded tokens, where it holds more; never more than 20 slots" in said
    assert "The last 3 tokens always stay" in said
    assert "4 bytes more a slot" in said
    assert said.count("follows it") == 3
    assert "with an eviction every 4 tokens" in said
    assert "newest 4 queries" in told("wary(32)")
    assert "in 2 of 32 layers, the others are left alone" in told("layered(32)")
    assert "Never while decoding" in told("once(32)")
    assert told("strange(32)").count("refuses") == 3
    assert json.loads(told("Nameless(96)", "--json"))["one_class"].startswith("Nameless, a class")
