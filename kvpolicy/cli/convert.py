"""Turn a GGUF file into a folder as transformers writes it, with transformers' own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpolicy.errors import RunError
from kvpolicy.quiet import silent

__all__ = ["convert"]

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a bfloat16 folder.

    The file holds the tied embedding twice, quantised to 4 bits for the input and to 8 bits for
    the output: the finer copy serves both.

    Args:
        gguf: a Llama whose embeddings are tied.
        folder: made, with ``model.safetensors``, ``config.json`` and the tokenizer's files.

    Raises:
        RunError: the file has other tensors than a tied Llama.
    """
    with silent():
        folder_of, file = str(gguf.parent), gguf.name
        tokenizer = AutoTokenizer.from_pretrained(folder_of, gguf_file=file)
        read = AutoModelForCausalLM.from_pretrained(folder_of, gguf_file=file, dtype=torch.bfloat16)
        weights: dict[str, torch.Tensor] = dict(read.state_dict())
        weights[EMBEDDINGS] = weights.pop(HEAD)
        model = _tied(read)
        loaded = model.load_state_dict(weights, strict=False)
        if set(loaded.missing_keys) - {HEAD} or loaded.unexpected_keys:
            raise RunError(f"{gguf.name} is not a Llama with tied embeddings: {loaded}")
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _tied(read: Any) -> Any:
    """Return an empty model of the same shape, not quantised, whose embeddings are tied."""
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.tie_word_embeddings = True
    config.dtype = torch.bfloat16
    model = type(read)(config).to(torch.bfloat16)
    model.generation_config = read.generation_config
    return model
