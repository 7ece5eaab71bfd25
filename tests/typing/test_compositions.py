"""Both type checkers accept what composes, and refuse on its line what does not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "compositions.txt"
ROOT = Path(__file__).parents[2]


def mypy(file: Path) -> set[int]:
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--cache-dir",
        str(file.parent),
    ]
    done = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return {int(n) for n in re.findall(rf"{re.escape(file.name)}:(\d+): error", done.stdout)}


def basedpyright(file: Path) -> set[int]:
    settings = file.parent / "pyrightconfig.json"
    settings.write_text(json.dumps({"typeCheckingMode": "standard", "include": [file.name]}))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, "--project", str(settings)],
        cwd=file.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    return {one["range"]["start"]["line"] + 1 for one in found if one["severity"] == "error"}


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, basedpyright])
def test_type_checkers_refuse_what_cannot_compose(checker: Callable[[Path], set[int]], tmp_path: Path) -> None:
    text = SOURCE.read_text()
    file = tmp_path / "compositions.py"
    file.write_text(text)
    marked = {n for n, line in enumerate(text.splitlines(), 1) if line.endswith("# refused")}
    assert len(marked) == 23
    assert checker(file) == marked
