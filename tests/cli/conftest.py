from __future__ import annotations

import io
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from kvpolicy import registry
from kvpolicy.cli import main
from kvpolicy.registry import Registered
from tests.cli.tools import Command, Install, Result, save_tiny


@pytest.fixture(autouse=True)
def surroundings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's cache, but those that say that they need the real model."""
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KVPOLICY_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def kvpolicy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line, without the cost of a new process."""

    def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
        if stdin is not None:
            raw = stdin.encode() if isinstance(stdin, str) else stdin
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return Result(exit.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Declare recipes as a package would, in place of all; text is where one that fails to load should be."""
    module = types.ModuleType("third_party")
    monkeypatch.setitem(sys.modules, "third_party", module)

    def declare(**recipes: Any) -> None:
        known = {}
        for name, recipe in recipes.items():
            setattr(module, name, recipe)
            where = f"third_party:{name}" if callable(recipe) else recipe
            known[name] = Registered(name, EntryPoint(name, where, "kvpolicy.policies"))
        monkeypatch.setattr(registry, "policies", lambda: known)

    return declare


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model whose tokenizer has a chat template."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return save_tiny(tmp_path_factory.mktemp("models") / "bare", template=None)
