"""The command line: ``kvpolicy check | eval | explain | generate | list | lm-eval | new | plot | show | trace``.

Needs the extra ``kvpolicy[cli]``. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: what follows the program's name; ``sys.argv[1:]`` where None.
    """
    try:
        import rich  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import typer  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        print(
            f"error: the command line needs {error.name}, which is not installed: pip install 'kvpolicy[cli]'",
            file=sys.stderr,
        )
        sys.exit(1)
    from kvpolicy.cli.app import run

    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))
