"""The vLLM that is installed here is one that the adapter is tested on, and serves while kvpolicy is not asked for."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import vllm
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy.adapters.vllm.plugin import TESTED


def test_version_is_one_of_those_tested() -> None:
    assert Version(vllm.__version__).public in TESTED


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.logits_processors"])
def test_vllm_is_told_of_kvpolicy(group: str) -> None:
    assert "kvpolicy" in entry_points(group=group).names


def test_vllm_generates_where_no_policy_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,  # of 32: the kernels for the CPU have no smaller ones
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,  # never ends of itself
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)

    engine = vllm.LLM(str(tmp_path), skip_tokenizer_init=True, dtype="float32", enforce_eager=True)
    prompt = vllm.TokensPrompt(prompt_token_ids=[1, 2, 3, 4, 5])
    (request,) = engine.generate([prompt], vllm.SamplingParams(temperature=0, max_tokens=4, detokenize=False))
    assert len(request.outputs[0].token_ids) == 4
