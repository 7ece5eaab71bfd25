"""Models for tests: the real one, and a tiny random one of each family."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families import FAMILIES, SMALL

__all__ = ["FAMILIES", "default_folder", "real", "sharpen", "tiny", "tokenizer"]

_SHARPENED = ("q_proj.weight", "k_proj.weight", "qkv_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight")


def sharpen(model: Any) -> Any:
    """Return the model with attention that prefers some tokens, more than at its initialisation."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_SHARPENED):
                parameter.mul_(12)
    return model


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a tiny model of random weights, the same at every call; ``changes`` of its configuration."""
    model_class, config_class = FAMILIES[family].classes()
    torch.manual_seed(0)
    model = model_class(config_class(**{**SMALL, **FAMILIES[family].options, **changes}))
    sharpen(model)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels know no float64
    return model.to(dtype).eval()


def default_folder() -> str:
    """Return the folder of the default model, fetched once."""
    from kvpolicy.cli.default_model import default_model

    return os.environ.get("KVPOLICY_TEST_MODEL") or str(default_model(quiet=True))


@functools.cache
def real() -> Any:
    """Return the real model, in float32."""
    return AutoModelForCausalLM.from_pretrained(default_folder(), dtype=torch.float32).eval()


@functools.cache
def tokenizer() -> Any:
    """Return the real model's tokenizer."""
    return AutoTokenizer.from_pretrained(Path(default_folder()))
