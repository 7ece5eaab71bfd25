"""``kvpolicy list``: the stages and policies that are installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpolicy.cli import console
from kvpolicy.cli.docs import summary
from kvpolicy.cli.errors import one_line
from kvpolicy.errors import PolicyError

if TYPE_CHECKING:
    from rich.table import Table

    from kvpolicy.registry import Registered

__all__ = ["list_"]


def list_() -> None:
    """List every stage and policy that can be named in a policy text."""
    from kvpolicy import registry

    out = console.stdout()
    out.print(_table("policies", registry.policies()))
    out.print()
    out.print(_table("stages", registry.stages()))
    console.note("kvpolicy show NAME tells the rest.", style="dim")


def _table(title: str, entries: dict[str, Registered]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("role", no_wrap=True)
    table.add_column("what it does", ratio=1)
    table.add_column("from", no_wrap=True)
    rows = [(*_role_and_summary(entry), entry) for entry in entries.values()]
    for role, text, entry in sorted(rows, key=lambda row: (ORDER.get(row[0], 9), row[2].name)):
        table.add_row(entry.name, role, text, entry.distribution)
    return table


#: Stages are listed in the order in which a chain has them.
ORDER = {"scorer": 0, "transform": 1, "selector": 2, "allocator": 3, "policy": 4}


def _role_and_summary(entry: Registered) -> tuple[str, str]:
    """Return both, or, of an entry that some package declares and cannot load, why not."""
    try:
        return entry.role, summary(entry.load())
    except PolicyError as error:
        return "broken", one_line(error)
