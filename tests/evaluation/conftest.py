from __future__ import annotations

from pathlib import Path

import pytest

from kvpolicy.cli.app import run
from tests.cli.tools import Command, Result, save_tiny


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`kvpolicy eval` in this process, with results in ``tmp_path`` and no cache of the user's."""
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KVPOLICY_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Result:
        capsys.readouterr()
        code = run(["eval", *map(str, arguments)])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return command


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model whose tokens are bytes."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")
