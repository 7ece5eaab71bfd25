"""What went wrong elsewhere with memory and with what an import changes, as docs/pitfalls.md lists it."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import pytest
from torch import Tensor
from torch.nn import Parameter

from kvpolicy.adapters.hf import EvictionCache
from tests.hf.test_pitfalls import feed, tokens
from tests.hf.zoo import zoo
from tests.models import tiny

LITTLE = 4096  #: bytes of masks and counters, whatever the budget


def live() -> dict[int, int]:
    """Return the bytes of every storage that any tensor of this process holds, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, Parameter) and thing.device.type == "cpu":  # a compiler's own have no memory
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.parametrize("name", ["vase", "h2o", "mixture", "streaming_llm"])
def test_the_receipt_counts_all_that_is_held(name: str) -> None:
    """Evicted tokens are gone: nothing but the slots, the window and the state that are counted is alive."""
    model, policy, ids = tiny("llama"), zoo(400)[name], tokens(1, 1000)
    before = live()
    with EvictionCache(model, policy) as cache:
        for step in [ids[:, :950], *ids[:, 950:].split(1, 1)]:
            model(step, past_key_values=cache)
        receipt = cache.receipt()
        held = sum(nbytes for at, nbytes in live().items() if at not in before)
        kept = sum(kept.nbytes for kept in receipt.kept.values())
        assert receipt.evictions == (7,)
        assert receipt.nbytes <= held - kept <= receipt.nbytes + LITTLE
        a_token = receipt.nbytes // 408  # or a token more, or another copy, would not be noticed
        assert a_token * 50 > LITTLE


def test_slots_do_not_grow_or_move_while_decoding() -> None:
    model, ids = tiny("llama"), tokens(2, 300)
    with EvictionCache(model, zoo(24)["vase"]) as cache:
        feed(model, cache, ids[:, :50], 40)
        store = cache.groups[0].store
        assert store is not None
        places = [(x.data_ptr(), x.nbytes) for x in store.tensors()]
        for step in ids[:, 50:].split(1, 1):
            model(step, past_key_values=cache)
            assert [(x.data_ptr(), x.nbytes) for x in store.tensors()] == places
        assert cache.receipt().nbytes == sum(nbytes for _, nbytes in places)


def test_the_receipt_says_what_the_window_takes() -> None:
    nbytes: list[Any] = []
    for window in (16, 32):
        model = tiny("llama")
        with EvictionCache(model, zoo(24, window=window)["snapkv"]) as cache:
            model(tokens(1, 40), past_key_values=cache)
            nbytes.append((cache.receipt().window_nbytes, cache.receipt().nbytes))
    (small, less), (large, more) = nbytes
    assert large == 2 * small == 3 * (4 * 32 * 8 + 32) * 4
    assert more - less == large - small


SCRIPT = """
import sys, transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

def ours():
    return [m for name, m in sys.modules.items() if name.partition(".")[0] in ("transformers", "torch") and m]

def fingerprint(modules):
    found = {}
    for module in modules:
        for name, thing in list(vars(module).items()):
            found[module.__name__, name] = id(thing)
            if isinstance(thing, type) and thing.__module__.partition(".")[0] == "transformers":
                for key, value in vars(thing).items():
                    if not key.startswith("__") and callable(value):
                        found[module.__name__, name, key] = id(value)
    return found

config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config)
model.generate(input_ids=model.dummy_inputs["input_ids"], max_new_tokens=2)
import kvpolicy.policies
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

def registered():
    return {(of, name): id(table[name]) for of, table in enumerate((functions, masks)) for name in table}

modules = ours()
before, known = fingerprint(modules), registered()
import kvpolicy.adapters.hf
after = fingerprint(modules)
changed = sorted(str(name) for name in before if before[name] != after.get(name))
assert not changed, changed
assert registered() == known
with kvpolicy.adapters.hf.EvictionCache(model, kvpolicy.policies.vase(128)):
    pass
after = fingerprint(modules)
changed = sorted(str(name) for name in before if before[name] != after.get(name))
assert not changed, changed
assert known.items() <= registered().items()
assert registered().keys() - known.keys() == {(0, "kvpolicy"), (1, "kvpolicy")}
"""


def test_importing_changes_nothing_in_transformers() -> None:
    """Binding a model adds one name to the registry of attention functions, and replaces none."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
