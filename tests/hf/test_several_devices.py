"""Layers on several devices are decided as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model  # type: ignore[import-untyped]
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvpolicy import EvictionPolicy
from kvpolicy.adapters.hf import EvictionCache, binding
from tests.hf.test_oracle import padded
from tests.hf.zoo import zoo
from tests.models import tiny

ZOO = zoo(24)
PARTS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


def decode(model: Any, policy: EvictionPolicy) -> tuple[Tensor, dict[int, Tensor], list[tuple[tuple[int, ...], str]]]:
    """Return the logits of a padded batch, what was kept, and where each group of layers has its slots."""
    tokens, mask = padded([40, 31, 17], 90)
    options = {"max_new_tokens": 26, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with EvictionCache(model, policy) as cache:
        out: Any = model.generate(tokens, attention_mask=mask, past_key_values=cache, **options)
        groups = [(group.layers, str(group.store.spec.device)) for group in cache.groups if group.store is not None]
        receipt = cache.receipt()
        assert min(receipt.evictions) >= 2
        return torch.stack(out.logits, 1).cpu(), receipt.kept, groups


def insist_on_same(one: Any, other: Any, close: float) -> None:
    assert (one[0] - other[0]).abs().max() <= close
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][layer], other[1][layer]) for layer in one[1])


def on(devices: list[Any], rest: Any) -> dict[str, Any]:
    """Return a device map: one device a layer, and one for the rest."""
    return {**dict.fromkeys(PARTS, rest), **{f"model.layers.{i}": device for i, device in enumerate(devices)}}


@pytest.mark.parametrize("name", ZOO)
def test_two_groups_of_layers_decide_as_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", torch.float64)
    one = decode(model, ZOO[name])
    assert [layers for layers, _ in one[2]] == [(0, 1, 2)]
    there, here = torch.device("cpu", 0), torch.device("cpu")  # two names of one device
    monkeypatch.setattr(binding, "_devices", lambda model: {0: here, 1: there, 2: here})
    two = decode(model, ZOO[name])
    assert [layers for layers, _ in two[2]] == [(0, 2), (1,)]
    insist_on_same(one, two, 0)


def test_a_model_placed_by_a_device_map(tmp_path: Path) -> None:
    model = tiny("llama", torch.float64)
    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, device_map="cpu").eval()
    insist_on_same(decode(model, ZOO["vase"]), decode(placed, ZOO["vase"]), 0)


def test_offloaded_weights_do_not_part_layers_that_run_together(tmp_path: Path) -> None:
    expected = decode(tiny("llama", torch.float64), ZOO["vase"])
    everything = cpu_offload(tiny("llama", torch.float64), execution_device=torch.device("cpu"))
    assert {p.device.type for p in everything.parameters()} == {"meta"}
    one_layer = dispatch_model(
        tiny("llama", torch.float64),
        on(["cpu", "disk", "cpu"], "cpu"),
        main_device="cpu",
        offload_dir=tmp_path,
        force_hooks=True,
    )
    assert {p.device.type for p in one_layer.get_submodule("model.layers.1.self_attn").parameters()} == {"meta"}
    for model in (everything, one_layer):
        found = decode(model, ZOO["vase"])
        assert found[2] == [((0, 1, 2), "cpu")]
        insist_on_same(expected, found, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["vase", "h2o", "tova"])
def test_layers_on_a_gpu_and_on_the_cpu(name: str) -> None:
    expected = decode(tiny("llama", torch.float64), ZOO[name])
    # With the CPU as the main device, its layers run there, and are not merely kept there.
    model = dispatch_model(tiny("llama", torch.float64), on([0, "cpu", 0], "cpu"), main_device="cpu")
    found = decode(model, ZOO[name])
    assert found[2] == [((0, 2), "cuda:0"), ((1,), "cpu")]
    insist_on_same(expected, found, 1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_offloaded_to_the_cpu_leave_slots_on_the_gpu() -> None:
    expected = decode(tiny("llama", torch.float64), ZOO["vase"])
    found = decode(dispatch_model(tiny("llama", torch.float64), on([0, "cpu", 0], 0)), ZOO["vase"])
    assert found[2] == [((0, 1, 2), "cuda:0")]
    insist_on_same(expected, found, 1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("name", ["vase", "h2o", "tova"])
def test_layers_on_two_gpus(name: str) -> None:
    expected = decode(tiny("llama", torch.float64), ZOO[name])
    found = decode(dispatch_model(tiny("llama", torch.float64), on([0, 1, 0], 0)), ZOO[name])
    assert found[2] == [((0, 2), "cuda:0"), ((1,), "cuda:1")]
    insist_on_same(expected, found, 1e-9)
