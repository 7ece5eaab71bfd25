"""What a user can get wrong: one clear line on stderr, nothing on stdout, exit code 2."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from tests.cli.tools import Command, Result, save_tiny
from tests.models import tiny as tiny_of


@pytest.fixture
def fails(kvpolicy: Command) -> Command:
    """A command that must fail, before it writes anything."""

    def run(*arguments: object, code: int = 2, stdin: str | bytes | None = None) -> Result:
        result = kvpolicy("generate", *arguments, stdin=stdin)
        assert result.code == code, result.err
        assert result.out == ""
        assert result.error
        return result

    return run


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_empty_prompt(fails: Command, prompt: str, tmp_path: Path) -> None:
    assert "is empty" in fails(prompt).error
    assert "standard input is empty" in fails("-", stdin=prompt).error
    (tmp_path / "empty").write_text(prompt)
    assert "empty is empty" in fails("--prompt-file", tmp_path / "empty").error


def test_no_prompt_or_two(fails: Command, tmp_path: Path) -> None:
    assert "there is no prompt" in fails().error
    assert "both" in fails("a", "--prompt-file", tmp_path / "b").error


def test_unreadable_prompt(fails: Command, tmp_path: Path) -> None:
    assert "No such file" in fails("--prompt-file", tmp_path / "nowhere").error
    assert "directory" in fails("--prompt-file", tmp_path).error
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in fails("--prompt-file", tmp_path / "binary").error
    assert "not text" in fails("-", stdin=b"\xff\xfe\x00").error


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--max-new-tokens", 0], "--max-new-tokens 0: it is at least 1"),
        (["--max-new-tokens", -3], "--max-new-tokens -3"),
        (["--temperature", -1], "--temperature -1.0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--seed", -1], "--seed -1"),
        (["--seed", 2**63], "--seed"),
        (["--dtype", "float8"], "did you mean 'float"),
        (["--dtype", "int8"], "it is one of auto, float32"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--interval", 0], "interval must be at least 1"),
        (["--interval", "never"], "--interval never"),
        (["--recent", -4], "recent must be at least 1"),
        (["--policy", "vase(256"], "cannot read"),
        (["--policy", ""], "empty"),
        (["--policy", "vaze(256)"], "did you mean 'vase'"),
        (["--policy", "ValueGuard() >> Stochastic(1.0)"], "no selector"),
        (["--policy", "vase(-5)"], "at least"),
        (["--policy", "Stochastic(tau=-1) >> TopK(8)"], "tau"),
        (["--policy", "__import__('os')"], "is not known"),
        (["--chat", "--policy", "vase"], "brackets"),
    ],
)
def test_wrong_values_are_refused_before_a_model_is_loaded(fails: Command, arguments: list[object], part: str) -> None:
    assert part in fails("a", *arguments, "--model", "/no/such/folder").error


@pytest.mark.parametrize(
    ("policy", "part"),
    [
        ("vase(64)", "recent=64"),
        ("Policy(Recency() >> Sinks(60) >> TopK(32), recent=4)", "60"),
    ],
)
def test_guards_that_cannot_fit(fails: Command, tiny: Path, policy: str, part: str) -> None:
    assert part in fails("abc", "--model", tiny, "--policy", policy).error


def test_chat_where_there_is_no_template(fails: Command, bare: Path, tiny: Path) -> None:
    assert "no chat template" in fails("a", "--model", bare, "--chat").error
    assert "which this model has not" in fails("a", "--model", bare, "--system", "x").error
    contradiction = fails("a", "--model", tiny, "--no-chat", "--system", "x")
    assert "contradicts --no-chat;" in contradiction.error


def test_template_that_refuses(fails: Command, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "{{ raise_exception('System role not supported') }}")
    assert "System role not supported" in fails("a", "--model", folder).error


def test_folders_that_hold_no_model(fails: Command, tmp_path: Path) -> None:
    assert "no config.json" in fails("a", "--model", tmp_path).error
    (tmp_path / "file.gguf").write_text("x")
    assert "is a file; --model takes the folder" in fails("a", "--model", tmp_path / "file.gguf").error
    assert "nowhere'; --model takes a folder" in fails("a", "--model", tmp_path / "nowhere").error
    assert "there is no folder" in fails("a", "--model", "./nowhere").error
    assert "there is no folder ''" in fails("a", "--model", "").error


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "{}"),
        ("config.json", '{"model_type": "no_such_model"}'),
        ("model.safetensors", "not a file of tensors"),
        ("model.safetensors", None),
        ("tokenizer.json", "{"),
    ],
)
def test_damaged_folders(fails: Command, tiny: Path, tmp_path: Path, name: str, content: str | None) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny, folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    assert f"cannot load {folder}" in fails("a", "--model", folder).error


def test_missing_weights_are_named(kvpolicy: Command, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more-layers"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    result = kvpolicy("generate", "a", "--model", folder, "--max-new-tokens", 1)
    assert "lacks 9 weights" in result.err


def test_models_that_are_not_supported(fails: Command, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    shutil.copytree(tiny, folder)
    (folder / "config.json").write_text('{"model_type": "t5", "architectures": ["T5Model"]}')
    assert "cannot load" in fails("a", "--model", folder).error

    sliding = tmp_path / "sliding"
    shutil.copytree(tiny, sliding)
    model = tiny_of("mistral")
    model.config.sliding_window = 16
    model.save_pretrained(sliding)
    assert "full-attention" in fails("a", "--model", sliding).error


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("no_network")
def test_a_hub_that_cannot_be_reached(fails: Command) -> None:
    result = fails("a", "--model", "somebody/some-model", code=1)
    assert "somebody/some-model" in result.error
    assert "cannot be reached" in result.error
    assert result.error.endswith("or give the folder of a model that you have, or leave --model out")


@pytest.mark.usefixtures("no_network")
def test_a_hub_that_must_not_be_asked(fails: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    assert "HF_HUB_OFFLINE" in fails("a", "--model", "somebody/some-model", code=1).error


@pytest.mark.usefixtures("no_network")
def test_a_name_that_no_hub_can_have(fails: Command) -> None:
    assert "neither a folder nor a hub name" in fails("a", "--model", "bad name!").error


@pytest.mark.usefixtures("no_network")
def test_a_cached_model_needs_no_network(kvpolicy: Command, tiny: Path, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--somebody--some-model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny, cached / "snapshots" / ("0" * 40))
    result = kvpolicy("generate", "a", "--model", "somebody/some-model", "--max-new-tokens", 2)
    assert result.code == 0, result.err
    assert "loading some-model" in result.err
