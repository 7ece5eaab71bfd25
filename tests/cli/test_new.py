"""`kvpolicy new`: the package that it writes, and what it refuses to write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpolicy.cli import scaffold
from tests.cli.tools import Command

BY_NAME = Path(__file__).with_name("by_name.py")


def ran(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_package_that_passes_its_tests_and_works_by_name(
    kvpolicy: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    result = kvpolicy("new", "late-values")
    assert result.code == 0, result.err
    folder = work / "late-values"
    assert set(result.out.split()) == {f"late-values/{name}" for name in files(folder)}
    ruff = [sys.executable, "-m", "ruff"]
    ran(*ruff, "check", "--no-cache", cwd=folder)
    ran(*ruff, "format", "--check", "--no-cache", cwd=folder)

    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    ran(*pip, "--no-build-isolation", "--no-index", "--target", site, folder, cwd=work)
    assert (site / "late_values" / "py.typed").exists()
    seen = os.pathsep.join([str(site), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    said = ran(sys.executable, BY_NAME, "late_values", "LateValues", folder, cwd=work, PYTHONPATH=seen)
    rows = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert rows["late_values"].rstrip().endswith("late-values")
    assert "policy" in rows["late_values"]
    assert "scorer" in rows["LateValues"]
    assert "passed" in said
    assert "failed" not in said


def test_what_comes_next_is_what_the_guide_says(
    kvpolicy: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    title, *said = kvpolicy("new", "late-values").err.replace("'", '"').splitlines()
    assert title == "Next:"
    guide = (Path(__file__).parents[2] / "docs/write-a-policy.md").read_text(encoding="utf-8")
    assert "".join(f"$ {line.strip()}\n" for line in said) in guide
    assert {"kvpolicy list", "kvpolicy check late_values"} < {line.strip() for line in said}


def test_every_file_is_written_for_the_name() -> None:
    texts = scaffold.render(scaffold.Names("my-own", "my_own", "MyOwn"))
    assert "src/my_own/py.typed" in texts
    assert {".gitignore", ".github/workflows/test.yml", "README.md", "docs/index.md"} <= set(texts)
    for path, text in texts.items():
        assert "<<" not in text, path
        assert "MODULE" not in path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Late-Values", "single hyphens between, and a letter first; 'late-values' would be one"),
        ("LateValues", "'late-values' would be one"),
        ("3d", "'d' would be one"),
        ("a--b", "'a-b' would be one"),
        ("", "'' is no name for a package"),
        ("../up", "'up' would be one"),
        ("late values", "'late-values' would be one"),
        ("été", "is no name for a package"),
        ("a" * 41, "has 41 letters; 40 are most"),
        ("vase", "vase is a policy of the package 'kvpolicy'"),
        ("recency", "Recency is a scorer of the package 'kvpolicy'"),
        ("top-k", "top_k"),
        ("policy", "policy is a folder or a module of the package itself"),
        ("scorer", "scorer is a folder or a module"),
        ("view", "View is a name of kvpolicy's"),
        ("maximum", "maximum is a name of kvpolicy's"),
        ("lambda", "lambda is a word of Python's"),
        ("match", "match is a word of Python's"),
        ("random", "Python has a random of its own"),
        ("print", "Python has a print of its own"),
        ("torch", "Python imports torch from"),
        ("kvpolicy", "Python imports kvpolicy from"),
    ],
)
def test_names_that_cannot_be(
    kvpolicy: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = kvpolicy("new", name)
    if name == "top-k":  # TopK is taken, whatever the letters between
        message = "TopK is a name" if "TopK is a name" in result.error else "TopK is a selector"
    assert result.code == 2
    assert message in result.error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_as_it_is(kvpolicy: Command, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    result = kvpolicy("new", "late-values", "--path", folder)
    assert result.code == 2
    assert f"{folder} is not empty: it holds README.md; give another folder with --path DIR" in result.error
    assert files(folder) == {"README.md"}
    assert (folder / "README.md").read_text() == "mine"
    result = kvpolicy("new", "late-values", "--path", folder / "README.md")
    assert result.code == 2
    assert "is a file" in result.error


def test_an_empty_folder_and_a_missing_one_are_filled(kvpolicy: Command, tmp_path: Path) -> None:
    empty, missing = tmp_path / "empty", tmp_path / "a" / "b"
    empty.mkdir()
    for folder in (empty, missing):
        assert kvpolicy("new", "late-values", "--path", folder).code == 0
    assert files(empty) == files(missing)


@pytest.mark.parametrize("exists", [True, False])
def test_what_fails_on_the_way_leaves_nothing(
    kvpolicy: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    folder, stock = tmp_path / "a" / "b", Path.open
    if exists:
        folder.mkdir(parents=True)

    def full(path: Path, *rest: object, **more: object) -> object:
        if path.name == "test_use.py":
            raise OSError(28, "No space left on device")
        return stock(path, *rest, **more)

    monkeypatch.setattr(Path, "open", full)
    result = kvpolicy("new", "late-values", "--path", folder)
    assert result.code == 1
    assert "No space left on device" in result.error
    assert folder.exists() == exists
    assert not files(tmp_path)
