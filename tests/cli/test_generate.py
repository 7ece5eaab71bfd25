"""`kvpolicy generate` on a tiny random model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpolicy import Policy
from kvpolicy.adapters.hf import EvictionCache
from tests.cli.tools import Command, save_tiny

SHORT = ["--policy", "vase(32)", "--interval", 8, "--recent", 4, "--max-new-tokens", 60]


def reference(folder: Path, prompt: str, policy: str, tokens: int, **how: Any) -> str:
    """What the same run writes without the command line."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(how.pop("seed", 0))
    with EvictionCache(model, Policy.parse(policy)) as cache:
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=tokens, **{"do_sample": False, **how})
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_writes_the_text_and_nothing_else_to_stdout(kvpolicy: Command, bare: Path) -> None:
    text = "Policy(ValueGuard() >> Stochastic() >> TopK(32), interval=8, recent=4)"
    expected = reference(bare, "A prompt of some bytes.", text, 60)
    result = kvpolicy(*("generate", "A prompt of some bytes.", "--model", bare, "--dtype", "float32", *SHORT))
    assert result.code == 0, result.err
    assert result.out == expected + "\n"


def test_samples_as_transformers_does(kvpolicy: Command, bare: Path) -> None:
    policy = "Policy(KeyNorm() >> TopK(32), interval=8, recent=4)"
    expected = reference(bare, "abc", policy, 40, do_sample=True, temperature=1.5, seed=7)
    common = ["generate", "abc", "--model", bare, "--dtype", "float32", "--policy", policy]
    common += ["--max-new-tokens", 40, "--temperature", 1.5]
    assert kvpolicy(*common, "--seed", 7).out == expected + "\n"
    assert kvpolicy(*common, "--seed", 8).out != expected + "\n"


def test_the_seed_reaches_the_policy(kvpolicy: Command, bare: Path) -> None:
    policy = "Policy(Constant() >> Stochastic() >> TopK(16), interval=4, recent=2)"
    common = ["generate", "abc", "--model", bare, "--policy", policy, "--max-new-tokens", 100]
    texts = {kvpolicy(*common, "--dtype", "float32", "--seed", seed).out for seed in (0, 0, 1, 2)}
    assert len(texts) > 1  # greedy: only what was forgotten can differ
    assert kvpolicy(*common, "--dtype", "float32", "--seed", 0).out in texts


def test_receipt_and_timing_come_last(kvpolicy: Command, tiny: Path) -> None:
    result = kvpolicy("generate", "abc", "--model", tiny, *SHORT)
    lines = result.err.splitlines()
    assert re.fullmatch(r"loading tiny \(b?float\d\d on cpu\) \.\.\.", lines[0])
    assert "warning" not in result.err
    assert "TopK(32), interval=8, recent=4)" in result.err
    assert "slots per KV head" in result.err
    assert re.fullmatch(r"60 tokens, [\d.]+ tokens per second \(decode\), first token after [\d.]+ s", lines[-1])


def test_one_token_has_no_rate(kvpolicy: Command, tiny: Path) -> None:
    result = kvpolicy("generate", "abc", "--model", tiny, "--max-new-tokens", 1)
    assert result.code == 0
    assert re.fullmatch(r"1 tokens?, first token after [\d.]+ s", result.err.splitlines()[-1])


def test_warns_where_nothing_was_evicted(kvpolicy: Command, tiny: Path) -> None:
    result = kvpolicy("generate", "abc", "--model", tiny, "--max-new-tokens", 5)
    assert result.code == 0
    assert "warning: nothing was evicted" in result.err
    assert "--max-new-tokens" in result.err


def test_warns_beyond_the_positions_of_the_model(kvpolicy: Command, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "short")
    result = kvpolicy("generate", "a" * 2100, "--model", folder, *SHORT)
    assert result.code == 0
    assert "was trained for 2,048" in result.err


@pytest.mark.parametrize("policy", ["snapkv(16)", "vase(32)"])
def test_interval_none_evicts_the_prompt_alone(kvpolicy: Command, tiny: Path, policy: str) -> None:
    result = kvpolicy(
        *("generate", "word " * 30, "--model", tiny, "--policy", policy),
        *("--recent", 4, "--interval", "none", "--max-new-tokens", 20),
    )
    assert result.code == 0, result.err
    row = result.err.splitlines()[-2].split()
    assert row[-1] == "1"
    assert "interval=None" in result.err


def test_chat_template_is_used_where_there_is_one(kvpolicy: Command, tiny: Path, bare: Path) -> None:
    def tokens_seen(*arguments: object) -> int:
        result = kvpolicy("generate", *arguments, "--max-new-tokens", 1)
        assert result.code == 0, result.err
        row = result.err.splitlines()[-2].split()
        return int(row[1])

    assert tokens_seen("abc", "--model", bare) == 3
    assert tokens_seen("abc", "--model", tiny, "--no-chat") == 3
    chat = len("<user>abc\n<assistant>")
    assert tokens_seen("abc", "--model", tiny) == chat
    assert tokens_seen("abc", "--model", tiny, "--chat") == chat
    with_system = tokens_seen("abc", "--model", tiny, "--system", "xy")
    assert with_system == chat + len("<system>xy\n")


def test_prompt_from_stdin_and_from_a_file(kvpolicy: Command, bare: Path, tmp_path: Path) -> None:
    common = ["--model", bare, "--max-new-tokens", 10]
    written = kvpolicy("generate", "Grüße,\nWelt", *common).out
    file = tmp_path / "prompt.txt"
    file.write_text("Grüße,\nWelt\n", "utf-8")
    assert kvpolicy("generate", "--prompt-file", file, *common).out == written
    assert kvpolicy("generate", "-", *common, stdin="Grüße,\nWelt\n").out == written


def test_default_model_is_taken_without_a_name(kvpolicy: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpolicy.cli import default_model

    monkeypatch.setattr(default_model, "default_model", lambda: tiny)
    result = kvpolicy("generate", "abc", "--max-new-tokens", 2)
    assert result.code == 0
    assert "loading tiny" in result.err


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_answers(kvpolicy: Command) -> None:
    from tests.models import default_folder

    result = kvpolicy(
        *("generate", "What is the capital of France?", "--model", default_folder()),
        *("--policy", "vase(32)", "--interval", 8, "--recent", 8, "--max-new-tokens", 24),
        *("--compare",),
    )
    assert result.code == 0, result.err
    assert "Paris" in result.out
    assert "full cache" in result.out
