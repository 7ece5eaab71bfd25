"""Use an installed policy by its name alone, then run the tests of its package.

Runs in a process of its own: ``python by_name.py MODULE STAGE FOLDER``. Nothing here imports the package.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy import Policy
from kvpolicy.adapters.flash_attn import FlashCache
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.vllm import Config, Settings
from kvpolicy.cli.app import run

module, stage, folder = sys.argv[1:]
assert module not in sys.modules

assert run(["list"]) == 0
assert run(["show", module]) == 0
assert run(["check", module, "--examples", "1"]) == 0

policy = Policy.parse(f"{module}(16, interval=4, recent=4)")
assert Policy.parse(repr(policy)) == policy
assert policy == Policy.parse(f"Policy({stage}() >> Sinks(4) >> TopK(16), interval=4, recent=4)")

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
model: Any = LlamaForCausalLM(config).eval()
prompt = torch.arange(1, 41)[None]
options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False}
with EvictionCache(model, policy) as cache:
    model.generate(prompt, past_key_values=cache, **options)
    assert cache.receipt().evictions == (5,)
    assert cache.receipt().positions(0).shape[-1] == 19

flash = FlashCache(policy, num_layers=1, num_heads=2, num_query_heads=4, head_dim=8, dtype=torch.float32)
flash.attend(0, torch.randn(1, 40, 4, 8), torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8))
flash.step()
assert flash.lengths == [16]

engine = Config(f"{module}(64, recent=16)", interval=32)
assert engine.plan.capacity == 96
asked = SimpleNamespace(extra_args={"kvpolicy": {"policy": module, "budget": 48}}, seed=None)
assert Settings.of(engine, asked).plan.budget == 48

sys.stdout.flush()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", folder, "-c", f"{folder}/pyproject.toml", folder]))
