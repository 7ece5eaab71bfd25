"""Decoding compiles to one graph; evictions happen between its runs, in place."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers.generation.configuration_utils import CompileConfig

from kvpolicy import UsageError
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.hf.compat import ANNOUNCES_DRAFTS
from tests.families import KINDS
from tests.hf.test_oracle import padded
from tests.hf.zoo import zoo
from tests.models import real, tiny, tokenizer

pytestmark = pytest.mark.skipif(not ANNOUNCES_DRAFTS, reason="static=True needs transformers 5.14")
LENGTHS = [40, 33, 9]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def decode(
    model: Any, call: Any, policy: Any, prompts: Tensor, mask: Tensor, text: Tensor, static: bool
) -> tuple[Tensor, Any]:
    """Return the logits of every step, and the receipt."""
    with torch.no_grad(), EvictionCache(model, policy, static=static) as cache:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(prompts, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits, position = [out.logits[:, -1]], positions[:, -1:] + 1
        addresses: list[list[int]] = []
        for token in text.split(1, 1):
            options = {} if static else {"attention_mask": (mask := torch.cat([mask, torch.ones_like(token)], 1))}
            out = call(token.clone(), position_ids=position.clone(), past_key_values=cache, **options)
            cache.step()
            logits.append(out.logits[:, -1].clone())
            position = position + 1
            here = [t.data_ptr() for group in cache.groups for t in group.store.tensors()]
            assert not addresses or addresses == [here]
            addresses = [here]
        return torch.stack(logits, 1), cache.receipt()


FULL_ONLY = [family for family in KINDS if family not in ("gemma3", "gpt_oss")]


def test_one_graph_and_no_other_over_200_tokens() -> None:
    one_graph("llama", "vase", tokens=200)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, "vase") for family in FULL_ONLY if family != "llama"),
        *(("llama", name) for name in ("h2o", "knorm", "mixture", "tova")),
    ],
)
def test_one_graph_for_every_family_and_kind_of_policy(family: str, name: str) -> None:
    one_graph(family, name, tokens=64)


def one_graph(family: str, name: str, tokens: int) -> None:
    model, policy = tiny(family), zoo(24)[name]
    prompts, mask = padded(LENGTHS, 97)
    text = torch.randint(2, 97, (3, tokens), generator=torch.Generator().manual_seed(5))
    expected, receipt = decode(model, model, policy, prompts, mask, text, static=False)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    found, compiled_receipt = decode(model, compiled, policy, prompts, mask, text, static=True)
    assert graphs() == 1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert min(compiled_receipt.evictions) >= tokens // 8 - 1
    for layer in receipt.layers:
        assert torch.equal(compiled_receipt.positions(layer), receipt.positions(layer))


@pytest.mark.parametrize("family", [family for family in KINDS if family not in FULL_ONLY])
def test_sliding_layers_count_on_the_host_and_take_few_graphs(family: str) -> None:
    model, policy = tiny(family), zoo(24)["vase"]
    prompts, mask = padded([40, 40], 97)
    text = torch.randint(2, 97, (2, 60), generator=torch.Generator().manual_seed(5))
    expected, _ = decode(model, model, policy, prompts, mask, text, static=False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found, _ = decode(model, compiled, policy, prompts, mask, text, static=True)
    assert graphs() <= 2
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rows_of_different_policies_compile_too() -> None:
    model, policies = tiny("llama"), [zoo(24)["vase"], zoo(30)["h2o"], zoo(20)["streaming_llm"]]
    prompts, mask = padded(LENGTHS, 97)
    text = torch.randint(2, 97, (3, 60), generator=torch.Generator().manual_seed(5))
    expected, _ = decode(model, model, policies, prompts, mask, text, static=False)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    found, _ = decode(model, compiled, policies, prompts, mask, text, static=True)
    assert graphs() == 1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def compile_config(backend: str) -> CompileConfig:
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
def test_generate_compiles_by_itself_to_machine_code() -> None:
    """In a process of its own: what a compiler imports must not meet what other tests have imported."""
    code = "from tests.hf.test_compile import generate_compiles; generate_compiles('inductor')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_generate_compiles_by_itself() -> None:
    generate_compiles("eager")


@torch.no_grad()
def generate_compiles(backend: str) -> None:
    model, policy = tiny("llama"), zoo(24)["vase"]
    prompts, mask = padded(LENGTHS, 97)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 80, "do_sample": False}
    with EvictionCache(model, policy) as cache:
        expected = model.generate(prompts, past_key_values=cache, **options)
        receipt = cache.receipt()
    with EvictionCache(model, policy, static=True) as cache:
        options["compile_config"] = compile_config(backend)
        found = model.generate(prompts, past_key_values=cache, **options)
        assert graphs() == 1
        assert torch.equal(found, expected)
        assert torch.equal(cache.receipt().positions(0), receipt.positions(0))
        cache.reset()
        assert torch.equal(model.generate(prompts, past_key_values=cache, **options), expected)
        assert graphs() == 1
    del model._compiled_call


def test_a_static_cache_decodes_without_a_compiler_too() -> None:
    model, policy = tiny("llama", torch.float64), zoo(24)["vase"]
    prompts, mask = padded(LENGTHS, 97)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    runs = []
    for static in (False, True):
        with EvictionCache(model, policy, static=static) as cache:
            runs.append(model.generate(prompts, past_key_values=cache, **options))
    assert torch.equal(*runs)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_in_one_graph() -> None:
    model, policy = real(), zoo(64, interval=16, recent=16)["vase"]
    texts = ["The tide rose, and the tide fell. " * 12, "Seven ships sailed north. " * 16]
    tokenizer().padding_side = "left"
    inputs = tokenizer()(texts, return_tensors="pt", padding=True)
    options: dict[str, Any] = {**inputs, "max_new_tokens": 48, "min_new_tokens": 48, "do_sample": False}
    with EvictionCache(model, policy) as cache:
        expected = model.generate(past_key_values=cache, **options)
        receipt = cache.receipt()
    with EvictionCache(model, policy, static=True) as cache:
        found = model.generate(past_key_values=cache, compile_config=compile_config("eager"), **options)
        assert graphs() == 1
        assert torch.equal(found, expected)
        assert min(receipt.evictions) >= 3
        assert torch.equal(cache.receipt().positions(0), receipt.positions(0))
    del model._compiled_call


# Refusals


def test_compiled_code_needs_a_static_cache() -> None:
    model, ids = tiny("llama"), torch.full((1, 30), 7)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), EvictionCache(model, zoo(24)["vase"]) as cache:
        model(ids, past_key_values=cache)
        with pytest.raises(Exception, match=r"EvictionCache\(..., static=True\)"):
            compiled(ids[:, :1], past_key_values=cache)


def test_a_step_that_was_not_counted_is_noticed() -> None:
    model, ids = tiny("llama"), torch.full((1, 30), 7)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), EvictionCache(model, zoo(24)["vase"], static=True) as cache:
        model(ids, past_key_values=cache)
        compiled(ids[:, :1], past_key_values=cache)
        with pytest.raises(Exception, match=r"call cache.step\(\) after each"):
            compiled(ids[:, :1], past_key_values=cache)
        cache.step()
        compiled(ids[:, :1], past_key_values=cache)
        assert cache.receipt().seen == (32,)


def test_prompts_are_not_compiled() -> None:
    model, ids = tiny("llama"), torch.full((1, 30), 7)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), EvictionCache(model, zoo(24)["vase"], static=True) as cache:
        with pytest.raises(Exception, match="give the prompt to the model itself"):
            compiled(ids, past_key_values=cache)
        model(ids, past_key_values=cache)
        assert cache.receipt().seen == (30,)


def test_masks_that_transformers_did_not_make_are_refused() -> None:
    model, ids = tiny("llama"), torch.full((1, 6), 7)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with EvictionCache(model, zoo(24)["vase"], static=True) as cache:
        with pytest.raises(UsageError, match="a causal one with pads on the left"):
            model(ids, attention_mask=mask, past_key_values=cache)
        model(ids, attention_mask=mask.tril(), past_key_values=cache)
        assert cache.receipt().seen == (6,)
