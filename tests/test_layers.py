"""The command line is built on the library, and never the other way round."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLI = "kvpolicy.cli"
#: The names that modules have, by the folder they lie in: kvpolicy/policies and kvpolicy/adapters are links.
FOLDERS = {"kvpolicy": "kvpolicy", "policies": "kvpolicy.policies", "adapters": "kvpolicy.adapters"}


def imported(source: str, package: str) -> Iterator[str]:
    """Each module, or name of a module, that a file of a package imports anywhere, by its full name."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (one.name for one in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package.split(".")[: 1 - level or None] if level else []
                yield from (".".join([*above, *filter(None, [module]), one.name]) for one in names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]):  # importlib.import_module(...)
                yield name
            case _:
                pass


def of_the_command_line(source: str, package: str) -> list[str]:
    return [name for name in imported(source, package) if f"{name}.".startswith(f"{CLI}.")]


@pytest.mark.parametrize(
    "source",
    [
        "import kvpolicy.cli.errors",
        "from kvpolicy import cli",
        "from kvpolicy.cli import console",
        "def later():\n    from kvpolicy.cli.console import warn",
        "from ..cli import console",
        "from .. import cli",
        "import_module('kvpolicy.cli')",
    ],
)
def test_every_way_to_import_it_is_seen(source: str) -> None:
    assert of_the_command_line(source, "kvpolicy.evaluation")
    assert not of_the_command_line(source.replace("cli", "client"), "kvpolicy.evaluation")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_library_imports_nothing_of_the_command_line(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py") if ROOT / "kvpolicy" / "cli" not in path.parents]
    assert len(files) > 10
    for path in files:
        package = ".".join([FOLDERS[folder], *path.relative_to(ROOT / folder).parent.parts])
        assert not of_the_command_line(path.read_text("utf-8"), package), path
