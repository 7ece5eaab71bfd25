"""What other attempts at eviction in vLLM got wrong, each as a test of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from vllm import LLM
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvpolicy import UnsupportedError
from kvpolicy.adapters.vllm import board
from tests.vllm.engine import (
    agreeing,
    answers,
    engine,
    managers,
    params,
    preempted,
    prompt_of,
    reference,
    scheduler,
)

POLICY = "vase(64, interval=32, recent=16)"
PROMPT = [(7 * i) % 512 for i in range(300)]


def gemma(folder: Path, *kinds: str) -> Gemma3ForCausalLM:
    """Return a random model of sliding and full layers, saved where vLLM finds it."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=len(kinds),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=64,
        layer_types=list(kinds),
        max_position_embeddings=2048,
        query_pre_attn_scalar=32,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Gemma3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def recomputed() -> float:
    return sum(numbers["recomputed_requests"] for numbers in board.counted().values())


def served(llm: LLM, count: int) -> tuple[list[int], int]:
    """Return an answer to the prompt, and how many of the prompt's tokens were found in the prefix cache."""
    (out,) = llm.generate([prompt_of(PROMPT)], params(count), use_tqdm=False)
    assert out.num_cached_tokens is not None
    return list(out.outputs[0].token_ids), out.num_cached_tokens


def test_a_prefix_that_was_served_before_is_no_hit(folder: Path) -> None:
    llm = engine(folder, {"policy": POLICY}, enable_prefix_caching=True)
    (first, none), (second, hits) = (served(llm, 100) for _ in range(2))
    assert first == second
    assert none == hits == 0
    assert not managers(llm)[0].block_pool.cached_block_hash_to_block._cache


def test_a_prefix_that_sliding_layers_have_is_computed_for_the_others(tmp_path: Path) -> None:
    model = gemma(tmp_path, "sliding_attention", "full_attention", "sliding_attention", "full_attention")
    llm = engine(tmp_path, {"policy": POLICY}, enable_prefix_caching=True)
    expected = reference(model, PROMPT, POLICY, 100)
    for _ in range(2):
        found, hits = served(llm, 100)
        assert agreeing(found, expected) == 100
        assert hits == 0
    others = list(scheduler(llm).kv_cache_manager.coordinator.single_type_managers)
    assert len(others) > len(managers(llm)) == 1


def test_a_request_that_is_computed_again_is_counted(folder: Path) -> None:
    llm = engine(folder, {"policy": POLICY})
    before = recomputed()
    expected = answers(llm, [PROMPT[:50]], params(150))[0]
    assert recomputed() == before
    llm.llm_engine.add_request("0", {"prompt_token_ids": PROMPT[:50]}, params(150))
    for _ in range(100):
        llm.llm_engine.step()
    llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
    (manager,), found, held = managers(llm), [], []
    while llm.llm_engine.has_unfinished_requests():
        found += [one for one in llm.llm_engine.step() if one.finished]
        held += [len(blocks) for blocks in manager.req_to_blocks.values()]
    assert recomputed() == before + 1
    tokens = found[0].outputs[0].token_ids
    assert len(tokens) == 150
    assert agreeing(tokens, expected) >= 99
    assert max(held) <= -(-150 // 32)
    assert held[-1] == 3


def test_preempted_neighbours_of_requests_that_keep_everything_finish(folder: Path) -> None:
    llm = engine(folder, {"policy": POLICY}, num_gpu_blocks_override=65, max_num_seqs=12)
    (manager,), stopped = managers(llm), preempted(llm)
    free = manager.block_pool.get_num_free_blocks()
    found = answers(llm, [PROMPT[:40]] * 12, [params(200, "off" if i % 2 else None) for i in range(12)])
    assert [len(one) for one in found] == [200] * 12
    assert stopped
    assert manager.block_pool.get_num_free_blocks() == free


def test_an_engine_whose_layers_all_slide_never_serves(tmp_path: Path) -> None:
    gemma(tmp_path, "sliding_attention", "sliding_attention")
    with pytest.raises(UnsupportedError, match="no layer of this model has full attention"):
        answers(engine(tmp_path, {"policy": POLICY}), [PROMPT], params(2))


def test_a_prefix_is_a_hit_where_nothing_evicts(folder: Path) -> None:
    """What the tests above look at would show a hit."""
    llm = engine(folder, enable_prefix_caching=True)
    (first, none), (second, hits) = (served(llm, 20) for _ in range(2))
    assert first == second
    assert none == 0
    assert hits >= 256


WITHOUT = """
import importlib.metadata as metadata, sys
stock = metadata.entry_points
def others(**asked):
    found = stock(**asked)
    return metadata.EntryPoints(one for one in found if one.name != "kvpolicy") if asked else found
metadata.entry_points = others
from tests.vllm.test_vllm_pitfalls import answered
answered(sys.argv[1])
"""


def answered(folder: str) -> None:
    """Print what an engine without the key answers, and whether vLLM has loaded our entry points."""
    llm = engine(folder)
    (out,) = llm.generate([prompt_of(PROMPT)], params(40, logprobs=3), use_tqdm=False)
    logprobs = [[one.logprob for one in step.values()] for step in out.outputs[0].logprobs or ()]
    wrapped = AttentionBackendEnum.CPU_ATTN.get_path().startswith("kvpolicy.")
    loaded = [wrapped, "kvpolicy.adapters.vllm.requests" in sys.modules]
    print(json.dumps([list(out.outputs[0].token_ids), logprobs, loaded]))


def test_without_the_key_nothing_changes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    answered(str(folder))
    here = capsys.readouterr().out
    command = [sys.executable, "-c", WITHOUT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    there = done.stdout
    (*plugged, loaded), (*stock, absent) = (json.loads(text.splitlines()[-1]) for text in (here, there))
    assert (loaded, absent) == ([True, True], [False, False])
    assert len(plugged[1]) == 40
    assert plugged == stock
