"""``kvpolicy list``: the policies and stages that are installed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli import console
from kvpolicy.cli.errors import CommandError, one_line

if TYPE_CHECKING:
    from rich.table import Table

    from kvpolicy.catalog import PolicyFacts, StageFacts

__all__ = ["POLICY_HEAD", "list_", "markdown", "policy_row"]

NOTHING = "–"


def list_(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Write Markdown tables.")] = False,
) -> None:
    """List every policy and stage that can be named in a policy text, those of other packages among them.

    Of a policy: its paper (a number of arXiv), when it forgets, and what it needs of an engine beyond keys and values.
    """
    from kvpolicy import catalog

    if as_json and as_markdown:
        raise CommandError("--json and --markdown are two forms of one output: give one of them")
    policies, stages = catalog.policies(), catalog.stages()
    if as_json:
        found = {"policies": [dataclasses.asdict(one) for one in policies]}
        found["stages"] = [dataclasses.asdict(one) for one in stages]
        print(json.dumps(found, indent=2))
    elif as_markdown:
        print(markdown(POLICY_HEAD, [policy_row(one, link=True) for one in policies]))
        print(markdown(STAGE_HEAD, [_stage(one) for one in stages]), end="")
    else:
        out = console.stdout()
        out.print(_table("policies", POLICY_HEAD, [policy_row(one) for one in policies], wide="needs"))
        out.print()
        out.print(_table("stages", STAGE_HEAD, [_stage(one) for one in stages], wide="what it does"))
        console.note("kvpolicy show NAME tells the rest.", style="dim")


POLICY_HEAD = ("name", "paper", "phase", "needs", "from")
STAGE_HEAD = ("name", "role", "what it does", "from")


def policy_row(one: PolicyFacts, *, link: bool = False) -> tuple[str, ...]:
    """Return a line of the table; of what cannot be built, the reason stands where its needs would."""
    paper = one.paper or NOTHING
    if link and one.paper:
        paper = f"[{one.paper}](https://arxiv.org/abs/{one.paper})"
    needs = one.needs_in_words if one.problem is None else one_line(one.problem)
    return one.name, paper, one.phase or "broken", needs, one.package


def _stage(one: StageFacts) -> tuple[str, ...]:
    return one.name, one.role or "broken", one.summary if one.problem is None else one_line(one.problem), one.package


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, wide: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in head:
        options: dict[str, Any] = {"ratio": 1} if name == wide else {"no_wrap": True}
        table.add_column(name, **options)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown.

    >>> print(markdown(("name", "needs"), [("knorm", "nothing")]), end="")
    | name | needs |
    | --- | --- |
    | knorm | nothing |
    """
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
