"""``kvpolicy show``: everything about one stage or policy."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy import docstrings
from kvpolicy.cli import console
from kvpolicy.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.table import Table

    from kvpolicy.registry import Registered

__all__ = ["show"]

EXAMPLE_BUDGET = 1024


def show(
    name: Annotated[str, typer.Argument(help="A stage or a policy; kvpolicy list knows them.")],
) -> None:
    """Show what a stage or a policy does, its parameters and its paper."""
    from kvpolicy import registry

    known = {**registry.stages(), **registry.policies()}
    name = name.strip().removesuffix("()")
    found = [group[name] for group in (registry.policies(), registry.stages()) if name in group]
    if not found:
        raise CommandError(_unknown(name, list(known)))
    for entry in found:
        _print(entry)


def _unknown(name: str, known: list[str]) -> str:
    import difflib

    from kvpolicy.errors import SIMILAR

    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=SIMILAR)
    hint = f"; near it are {', '.join(by_lower[one] for one in close)}" if close else ""
    return f"{name!r} is not known{hint}; kvpolicy list shows all {len(known)}"


def _print(entry: Registered) -> None:
    out, thing = console.stdout(), entry.load()
    out.print(f"[bold]{entry.name}[/bold]  {entry.role}, from {entry.distribution}", soft_wrap=True)
    out.print()
    out.print(docstrings.prose(thing) or "It has no docstring.", markup=False, soft_wrap=True)
    if rows := docstrings.parameters(thing):
        out.print()
        out.print(_table(rows))
    if entry.role == "policy" and (text := _expression(thing)):
        out.print()
        out.print(f"{entry.name}(budget={EXAMPLE_BUDGET}) is", markup=False)
        out.print(f"    {text}", markup=False, soft_wrap=True)
    module = sys.modules.get(getattr(thing, "__module__", ""))
    if found := docstrings.links(f"{docstrings.written(thing)}\n{getattr(module, '__doc__', None) or ''}"):
        out.print()
        for url in found:
            out.print(url, markup=False, soft_wrap=True)


def _table(rows: list[docstrings.Parameter]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    columns = {
        "parameter": [row.name for row in rows],
        "type": [row.type for row in rows],
        "default": [row.default or ("" if row.name.startswith("*") else "(required)") for row in rows],
        "meaning": [row.meaning for row in rows],
    }
    said = {title: column for title, column in columns.items() if any(column)}  # a class may have no annotations
    for title in said:
        table.add_column(title, overflow="fold", ratio=1 if title == "meaning" else None)
    for cells in zip(*said.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _expression(recipe: Any) -> str | None:
    """Return what a recipe is for a usual budget, or None where it takes other arguments."""
    try:
        made = recipe(budget=EXAMPLE_BUDGET)
    except TypeError:
        return None
    kind: Any = type(made)
    return None if kind.__repr__ is object.__repr__ else repr(made)  # an address says nothing
