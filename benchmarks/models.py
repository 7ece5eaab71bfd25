"""Models to decode with, and caches that hold what a forward pass left."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

__all__ = ["all_cores", "load", "prefill", "tiny", "tokens", "twin"]


def load(folder: Path | None) -> Any:
    """Return a model in float32; the default model of the command line where None."""
    if folder is None:
        from kvpolicy.cli.default_model import default_model

        folder = default_model()
    read: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    return read(folder, dtype=torch.float32, local_files_only=True).eval()


def tiny() -> Any:
    """Return a small random model, which needs no weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
    )
    make: Callable[..., Any] = LlamaForCausalLM
    return make(config).eval()


def twin(model: Any) -> Any:
    """Return a model with the same weights, in the same memory, and a configuration of its own."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def tokens(model: Any, count: int) -> Tensor:
    """Return random tokens, ``[1, count]``: what they are does not change the time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, model.config.vocab_size, (1, count), generator=generator)


def prefill(model: Any, cache: Any, ids: Tensor, chunk: int = 1024) -> None:
    """Run tokens through a model in chunks."""
    with torch.no_grad():
        for part in torch.split(ids, chunk, 1):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)


@contextmanager
def all_cores() -> Generator[None]:
    """Use every core for what is not measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
