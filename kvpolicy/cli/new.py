"""``kvpolicy new``: write a package with a stage and a policy of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.cli import console
from kvpolicy.cli.errors import CommandError
from kvpolicy.errors import RunError

__all__ = ["new"]


def new(
    name: Annotated[str, typer.Argument(help="Of the package: lower-case letters, digits, and hyphens.")],
    *,
    path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write; it is made where it is missing. ./NAME.")
    ] = None,
) -> None:
    """Write a package with a stage and a policy of your own, which passes its own tests.

    The package registers both by name, so that kvpolicy list and every adapter know them once it is installed.
    """
    from kvpolicy.cli.scaffold import Names, render, write

    names = Names.of(name)
    folder = Path(names.name) if path is None else path
    try:
        written = write(render(names), folder)
    except FileExistsError as error:
        raise CommandError(f"{folder} {error}; give another folder with --path DIR") from error
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error}") from error
    for file in written:
        console.stdout().print(str(file), markup=False, soft_wrap=True)
    console.note(
        f"Next:\n  cd {folder}\n  pip install -e '.[test]'\n  pytest\n"
        f"  kvpolicy list\n  kvpolicy check {names.module}\n"
        f"  kvpolicy generate --policy '{names.module}(256)' 'Why is the sky blue?'"
    )
