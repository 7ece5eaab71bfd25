"""What differs between versions of transformers, and what happens on a version that nobody tested."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, MiniMaxConfig, MiniMaxForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin

from kvpolicy import UnsupportedError, UntestedVersionWarning, UsageError
from kvpolicy.adapters.hf import EvictionCache, compat
from tests.hf.conftest import SINCE
from tests.hf.zoo import zoo
from tests.models import tiny

SMALL = zoo(24)["vase"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> Any:
    compat._warn_once.cache_clear()
    yield lambda text: monkeypatch.setattr(compat, "VERSION", text)
    compat._warn_once.cache_clear()


# Versions outside the tested range


@pytest.mark.parametrize("text", ["4.56.2", "4.57.0.dev0", "3.0"])
def test_an_older_version_is_refused_when_bound(version: Any, text: str) -> None:
    version(text)
    model = tiny("llama")
    with pytest.raises(UnsupportedError, match=rf"needs transformers 4\.57 or later, and this is {text}.*install"):
        EvictionCache(model, SMALL)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("text", ["5.24.1", "5.25.0.dev0", "6.0"])
def test_a_newer_version_warns_once_and_says_what_was_tested(version: Any, text: str) -> None:
    version(text)
    assert Version(text) > Version(compat.TESTED[-1]), "write newer versions here"
    model = tiny("llama")
    with pytest.warns(UntestedVersionWarning) as found:
        EvictionCache(model, SMALL).unbind()
    assert len(found) == 1
    assert found[0].filename == __file__
    assert f"{compat.TESTED[0]} to {compat.TESTED[-1]}, and this is {text}" in str(found[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EvictionCache(model, SMALL).unbind()


@pytest.mark.parametrize("text", [*compat.TESTED, "4.57.0", "5.10.1"])
def test_a_version_within_the_range_is_silent(version: Any, text: str) -> None:
    version(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.check_version()


def test_this_version_has_no_method_that_is_not_known() -> None:
    assert compat.unknown_methods(Cache) == []
    assert compat.unknown_methods(CacheLayerMixin) == []


def test_what_a_newer_version_adds_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for base in (Cache, CacheLayerMixin):
        monkeypatch.setattr(base, "truncate", lambda self: None, raising=False)

    @compat.guarded
    class Ours(EvictionCache):
        pass

    @compat.guarded
    class Layer(compat.Layer):
        def update(self, *args: Any, **kwargs: Any) -> Any: ...

        def get_seq_length(self) -> int:
            return 0

        def get_max_length(self) -> int:
            return -1

    with Ours(tiny("llama"), SMALL) as cache:
        for one in (cache, Layer()):
            with pytest.raises(UnsupportedError, match=r"calls truncate\(\).* does not know; install 'transformers=="):
                one.truncate()
        cache.reset()  # known: ours


# Models whose cache a version keeps elsewhere


@pytest.mark.parametrize("hybrid", SINCE)
def test_a_family_is_bound_since_its_version_and_refused_before(hybrid: str) -> None:
    since, why = SINCE[hybrid]
    model = tiny(hybrid)
    if Version(compat.VERSION) >= Version(since):
        EvictionCache(model, SMALL).unbind()
        return
    with pytest.raises(UnsupportedError, match=f"{compat.VERSION} {why}"):
        EvictionCache(model, SMALL)


def test_a_model_with_a_cache_class_of_its_own_is_refused() -> None:
    config = MiniMaxConfig(
        vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"MiniMaxForCausalLM: .* of its own, MiniMaxCache"):
        EvictionCache(MiniMaxForCausalLM(config), SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention", "mamba"]}, "caches its layer 1, 'mamba', like full attention"),
        ({"num_hidden_layers": 5}, "caches 3 of its 5 layers: some share keys"),
        ({"index_topk": 8}, "keys of its index"),
    ],
)
def test_layers_that_a_version_caches_like_others_are_seen(change: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    layers = DynamicCache(config=model.config).layers
    assert compat.unfit(model.model, model.config, layers) is None
    for name, value in change.items():
        setattr(model.config, name, value)
    assert re.search(message, str(compat.unfit(model.model, model.config, layers)))


@pytest.mark.parametrize("change", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}])
def test_attention_that_scales_in_secret_is_refused(change: dict[str, bool]) -> None:
    """Where transformers tells the attention function its scale, nothing is secret."""
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, **change)
    model = GPT2LMHeadModel(config)
    if hasattr(model.transformer.h[0].attn, "scaling"):
        EvictionCache(model, SMALL).unbind()
        return
    with pytest.raises(UnsupportedError, match=f"{compat.VERSION} scales logits inside its attention"):
        EvictionCache(model, SMALL)


# Arguments


@pytest.mark.parametrize("announced", [True, False])
def test_drafts_that_nobody_announces_are_refused(announced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "ANNOUNCES_DRAFTS", announced)
    if announced:
        EvictionCache(tiny("llama"), SMALL, max_draft_tokens=4).unbind()
        return
    with pytest.raises(UnsupportedError, match=r"max_draft_tokens=4: .* install transformers 5\.14 or later"):
        EvictionCache(tiny("llama"), SMALL, max_draft_tokens=4)


@pytest.mark.parametrize(
    ("seen", "argument", "to_length", "removed"),
    [
        *((9, -4, True, 4), (9, -4, False, 4), (9, -9, False, 9), (9, 0, False, 0)),
        *((9, 7, True, 2), (9, 9, True, 0), (9, 12, True, 0), (9, 0, True, 0), (0, 5, True, 0)),
    ],
)
def test_tokens_to_remove(seen: int, argument: int, to_length: bool, removed: int) -> None:
    assert compat.tokens_to_remove(seen, argument, to_length=to_length) == removed


def test_tokens_to_remove_agrees_with_this_version() -> None:
    """What transformers' own layer does, it does to the token; what it refuses is refused."""
    for argument in [*range(-9, 0), *range(1, 12)]:
        cache, keys = DynamicCache(), torch.zeros(1, 1, 9, 2)
        cache.update(keys, keys, 0)
        try:
            cache.crop(argument)
        except ValueError:
            with pytest.raises(UsageError, match=rf"write crop\(-{argument}\)"):
                compat.tokens_to_remove(9, argument)
        else:
            assert compat.tokens_to_remove(9, argument) == 9 - cache.get_seq_length(), argument


@pytest.mark.parametrize(
    ("argument", "message"),
    [(3, r"crop\(3\) is not a number of tokens to remove; write crop\(-3\)"), (-10, "remove 10 tokens.*has seen 9")],
)
def test_what_crop_cannot_mean(argument: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compat.tokens_to_remove(9, argument, to_length=False)


@pytest.mark.parametrize("name", sorted({compat.CACHE_ARGUMENT, "past_key_values"}))
def test_the_cache_is_found_under_each_name_that_this_version_takes(name: str) -> None:
    model, ids = tiny("llama"), torch.arange(2, 42)[None]
    with EvictionCache(model, SMALL) as cache:
        for called in (model, model.model):
            called(ids, **{name: cache})
            model(ids[:, :1], None, None, cache)
            assert cache.receipt().seen == (41,)
            cache.reset()
        model.generate(ids, **{name: cache}, max_new_tokens=9, do_sample=False)
        assert cache.receipt().seen == (48,)


def test_mask_sizes_of_a_number_and_of_positions() -> None:
    with EvictionCache(tiny("llama"), SMALL) as cache:
        layer = cache.layers[0]
        assert layer.get_mask_sizes(4) == layer.get_mask_sizes(torch.arange(3, 7)) == (4, 0)
        assert layer.get_max_length() == layer.get_max_cache_shape() == -1


# What is written about versions


def test_the_pinned_version_and_the_range_are_what_was_tested() -> None:
    assert [str(v) for v in sorted(map(Version, compat.TESTED))] == list(compat.TESTED)
    pinned = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] in compat.TESTED
    assert f"| {pinned[1]}, pinned |" in (ROOT / "docs/transformers-versions.md").read_text("utf-8")
    assert f'"transformers>={compat.OLDEST},<6"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert compat.TESTED[0].startswith(compat.OLDEST)


def table() -> dict[str, list[str]]:
    """Return the rows of the page's table, by version."""
    text = (ROOT / "docs/transformers-versions.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0].removesuffix(", pinned"): row[1:] for row in rows[2:]}


def test_the_table_lists_what_was_tested() -> None:
    assert tuple(table()) == compat.TESTED


@pytest.mark.skipif(
    compat.VERSION not in compat.TESTED, reason=f"transformers {compat.VERSION} is not in the table yet"
)
def test_the_row_of_this_version_is_true() -> None:
    assert table()[compat.VERSION] == [
        f"`{compat.CACHE_ARGUMENT}`",
        "left alone" if Version(compat.VERSION) >= Version(SINCE["qwen3_next"][0]) else "refused",
        "keeps n tokens" if compat.CROPS_TO_LENGTH else "is an error",
        "yes" if compat.ANNOUNCES_DRAFTS else "no",
    ]
