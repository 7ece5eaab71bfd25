"""Every dtype and quantised weights: finite logits, and kept sets that only the dtype's own error may turn."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kvpolicy import Keep, Policy, State, View
from kvpolicy.adapters.hf import EvictionCache
from tests.families import FAMILIES, SMALL
from tests.hf.zoo import zoo
from tests.models import real, tiny, tokenizer

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@dataclass(frozen=True)
class Recorded:
    """Be a policy, and write down what it saw and what it kept."""

    policy: Policy
    seen: list[tuple[View, Keep]]

    @property
    def needs(self) -> frozenset[str]:
        return self.policy.needs

    def plan(self, model: Any) -> Any:
        return self.policy.plan(model)

    def init(self, spec: Any, rows: int) -> State:
        return self.policy.init(spec, rows)

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        keep, state = self.policy.select(view, state)
        some = view.keys.clone(), view.positions.clone(), view.seen.clone()
        self.seen.append((View(**{**vars(view), "keys": some[0], "positions": some[1], "seen": some[2]}), keep))
        return keep, state


def disputed(view: View, keep: Keep) -> Tensor:
    """Return by how much, relative to its score, an evicted key of small norm was beaten by a kept one: ``[B, H]``.

    The policy is ``KeyNorm``: it keeps the keys of smallest norm. Norms are taken in float64 here.
    """
    norms = view.keys.double().square().sum(-1).sqrt()
    free = view.candidates
    worst_kept = norms.masked_fill(~(keep.mask & free), 0).amax(-1)
    best_gone = norms.masked_fill(keep.mask | ~free, torch.inf).amin(-1)
    return (worst_kept - best_gone).clamp(min=0) / worst_kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
def test_kept_sets_are_those_of_exact_scores(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    seen: list[tuple[View, Keep]] = []
    ids = torch.randint(2, 97, (2, 90), generator=torch.Generator().manual_seed(4))
    policy = Recorded(zoo(24)["knorm"], seen)
    with EvictionCache(model, policy) as cache:
        logits = [model(ids[:, :40], past_key_values=cache).logits[:, -1]]
        logits += [model(one, past_key_values=cache).logits[:, -1] for one in ids[:, 40:].split(1, 1)]
        assert torch.isfinite(torch.stack(logits)).all()
        assert cache.receipt().evictions == (7, 7)
        assert cache.groups[0].store is not None
        assert cache.groups[0].store.keys.dtype == dtype
        cache.groups[0].store.check_integrity()
    assert len(seen) >= 7
    # Scores are float32 whatever the keys are: only a gap below its error may turn.
    assert max(disputed(*one).max().item() for one in seen) <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["vase", "h2o", "mixture"])
def test_logits_are_finite_and_near_those_of_float64(name: str, dtype: torch.dtype) -> None:
    """The same kept tokens, replayed in float64: what remains is the error of the dtype."""
    ids = torch.randint(2, 97, (2, 70), generator=torch.Generator().manual_seed(4))
    found = {}
    for one in (dtype, torch.float64):
        model = tiny("llama", dtype).to(one)  # the same weights, rounded to the dtype
        with EvictionCache(model, zoo(24)["streaming_llm"]) as cache:  # it keeps the same tokens in any dtype
            steps = [model(ids[:, :40], past_key_values=cache).logits[:, -1]]
            steps += [model(token, past_key_values=cache).logits[:, -1] for token in ids[:, 40:].split(1, 1)]
            found[one] = torch.stack(steps).double()
        with EvictionCache(model, zoo(24)[name]) as cache:
            model(ids[:, :40], past_key_values=cache)
            assert all(
                torch.isfinite(model(token, past_key_values=cache).logits).all() for token in ids[:, 40:].split(1, 1)
            )
    scale = found[torch.float64].abs().max()
    assert (found[dtype] - found[torch.float64]).abs().max() <= 64 * torch.finfo(dtype).eps * scale


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_real_model_in_every_dtype(dtype: torch.dtype) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(real().name_or_path, dtype=dtype).eval()
    text = "The history of the lighthouse begins in Alexandria, where a tower of stone, " * 5
    ids = tokenizer()(text, return_tensors="pt").input_ids[:, :72]
    seen: list[tuple[View, Keep]] = []
    with EvictionCache(model, Recorded(zoo(48, interval=8, recent=16)["knorm"], seen)) as cache:
        out = model.generate(
            ids, max_new_tokens=25, min_new_tokens=25, do_sample=False, past_key_values=cache,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert all(torch.isfinite(one).all() for one in out.logits)
        assert cache.receipt().evictions == (4,)
    assert max(disputed(*one).max().item() for one in seen) <= 4 * torch.finfo(torch.float32).eps


# Quantised weights


def check(model: Any) -> None:
    """Generate with nothing evicted, as without the cache, and with evictions."""
    ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 25, "do_sample": False}
    expected = model.generate(ids, **options)
    with EvictionCache(model, zoo(128)["vase"]) as cache:
        assert torch.equal(model.generate(ids, **options, past_key_values=cache), expected)
    with EvictionCache(model, zoo(24)["vase"]) as cache:
        out = model.generate(ids, **options, past_key_values=cache, output_logits=True, return_dict_in_generate=True)
        assert all(torch.isfinite(one).all() for one in out.logits)
        assert cache.receipt().evictions == (4, 4)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
def test_weights_quantised_by_torch_alone(family: str) -> None:
    """Linear layers whose weight is no tensor: what needs a weight, latent attention, asks the layer instead."""
    from torch.ao.quantization import quantize_dynamic  # pyright: ignore[reportDeprecated]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still there
        make = quantize_dynamic  # pyright: ignore[reportDeprecated]
        model = make(tiny(family), {nn.Linear}, dtype=torch.qint8)
    quantised = [module for module in model.modules() if type(module).__module__.startswith("torch.ao.")]
    assert len(quantised) >= 12
    check(model)


def _torchao() -> Any:
    quantization = importlib.import_module("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


QUANTISERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "torchao int8": ("torchao", _torchao),
    "quanto int8": ("optimum.quanto", lambda: transformers.QuantoConfig(weights="int8")),
    "bitsandbytes int8": ("bitsandbytes", lambda: transformers.BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes nf4": ("bitsandbytes", lambda: transformers.BitsAndBytesConfig(load_in_4bit=True)),
}


#: Some packages quantise in blocks of 64.
_BLOCKS = {"hidden_size": 64, "intermediate_size": 64}
_LARGER: dict[str, dict[str, int]] = {
    "llama": {**_BLOCKS, "head_dim": 16},
    "deepseek_v3": {
        **_BLOCKS,
        "moe_intermediate_size": 64,
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "head_dim": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
}


@pytest.mark.parametrize(
    ("name", "family"),
    # bitsandbytes itself, without us, fails on the four axes of latents.
    [(name, family) for name in QUANTISERS for family in _LARGER if family == "llama" or "bits" not in name],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_quantised_by_packages(name: str, family: str, tmp_path: Path) -> None:
    package, config = QUANTISERS[name]
    pytest.importorskip(package, reason=f"{package} is not installed: pip install {package.replace('.', '-')}")
    model_class, config_class = FAMILIES[family].classes()
    torch.manual_seed(0)
    model_class(config_class(**{**SMALL, **FAMILIES[family].options, **_LARGER[family]})).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config(), device_map="cpu", dtype=torch.float32
    )
    check(loaded.eval())
