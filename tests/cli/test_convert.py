"""The converter on a GGUF file of a few kilobytes, written by gguf itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kvpolicy.cli.convert import convert
from tests.cli.tools import byte_tokenizer

gguf: Any = pytest.importorskip("gguf")

WIDTH, INNER, HEADS = 32, 64, 4


def write_gguf(path: Path, *, twice: bool = True) -> dict[str, NDArray[np.float32]]:
    """Write a random Llama of one layer; return its tensors."""
    words = sorted(byte_tokenizer(None).get_vocab().items(), key=lambda item: item[1])
    tokens = [word for word, _ in words] + ["ab"]
    numbers = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), WIDTH),
        "output": (len(tokens), WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH // 2, WIDTH),
        "blk.0.attn_v": (WIDTH // 2, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (INNER, WIDTH),
        "blk.0.ffn_up": (INNER, WIDTH),
        "blk.0.ffn_down": (WIDTH, INNER),
    }
    if not twice:
        del shapes["output"]
    tensors = {name: numbers.normal(size=size).astype(np.float32) for name, size in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_the_finer_embedding_serves_both_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    verbosity = logging.get_verbosity()
    folder = tmp_path / "made"
    convert(tmp_path / "tiny.gguf", folder)
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == verbosity
    assert logging.is_progress_bar_enabled()

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = torch.from_numpy(tensors["output"]).bfloat16()
    assert torch.equal(model.lm_head.weight, expected)
    down = torch.from_numpy(tensors["blk.0.ffn_down"]).bfloat16()
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, down)

    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert config["num_key_value_heads"] == HEADS // 2


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "made")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    ids = tokenizer("cab", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2  # the merge is known
    assert tokenizer.decode(ids) == "cab"


def test_one_copy_of_the_embedding_is_enough(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf", twice=False)
    convert(tmp_path / "tiny.gguf", tmp_path / "made")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert torch.equal(model.lm_head.weight, torch.from_numpy(tensors["token_embd"]).bfloat16())
