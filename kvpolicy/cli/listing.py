"""``kvpolicy list``: the policies and stages that are installed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli import console
from kvpolicy.cli.checking import EXAMPLES, EXAMPLES_HELP, in_words, of_recipe
from kvpolicy.cli.errors import CommandError
from kvpolicy.errors import one_line

if TYPE_CHECKING:
    from rich.table import Table

    from kvpolicy.catalog import PolicyFacts, StageFacts
    from kvpolicy.testing import Outcome

__all__ = ["POLICY_HEAD", "list_", "markdown", "policy_row"]

NOTHING = "–"


def list_(
    *,
    check: Annotated[bool, typer.Option("--check", help="Run every check on every policy (a minute).")] = False,
    examples: Annotated[int, typer.Option(metavar="N", help=f"With --check. {EXAMPLES_HELP}")] = EXAMPLES,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Write Markdown tables.")] = False,
) -> None:
    """List every policy and stage that can be named in a policy text, those of other packages among them.

    Of a policy: its paper (a number of arXiv), when it forgets, what it needs of an engine beyond keys and values,
    and, with --check, which checks of kvpolicy.testing it passes. The exit code is then 1 where one fails.
    """
    from kvpolicy import catalog

    if as_json and as_markdown:
        raise CommandError("--json and --markdown are two forms of one output: give one of them")
    policies, stages = catalog.policies(), catalog.stages()
    checks = _checked(policies, examples) if check else None
    head = POLICY_HEAD if checks is None else CHECKED_HEAD
    if as_json:
        print(json.dumps(_data(policies, stages, checks), indent=2))
    elif as_markdown:
        print(markdown(head, [policy_row(one, checks, link=True) for one in policies]))
        print(markdown(STAGE_HEAD, [_stage(one) for one in stages]), end="")
    else:
        out = console.stdout()
        rows = [policy_row(one, checks) for one in policies if one.problem is None]
        out.print(_table("policies", head, rows, wide=("needs", "checks")))
        _print_broken(policies)
        out.print()
        rows = [_stage(one) for one in stages if one.problem is None]
        out.print(_table("stages", STAGE_HEAD, rows, wide=("what it does",)))
        _print_broken(stages)
        more = "" if check else "; kvpolicy list --check, whether policies keep what engines rely on"
        console.note(f"kvpolicy show NAME tells the rest{more}.", style="dim")
    if checks is not None and not all(one.good for found in checks.values() for one in found):
        raise typer.Exit(1)


POLICY_HEAD = ("name", "paper", "phase", "needs", "from")
CHECKED_HEAD = ("name", "paper", "phase", "needs", "checks", "from")
STAGE_HEAD = ("name", "role", "what it does", "from")

Checks = Mapping[str, Sequence["Outcome"]]


def _checked(policies: Sequence[PolicyFacts], examples: int) -> Checks:
    """Return what every check finds, by policy; none of what cannot be built."""
    from kvpolicy import registry

    found = {}
    for one in policies:
        if one.problem is None:
            with console.working(f"checking {one.name}"):
                found[one.name] = of_recipe(registry.policies()[one.name], examples)
    return found


def _data(policies: Sequence[PolicyFacts], stages: Sequence[StageFacts], checks: Checks | None) -> dict[str, Any]:
    found = [dataclasses.asdict(one) for one in policies]
    for one in found if checks is not None else ():
        outcomes = [dataclasses.asdict(each) for each in (checks or {}).get(one["name"], ())]
        one["checks"] = {each["check"]: {"result": each["result"], "reason": each["reason"]} for each in outcomes}
    return {"policies": found, "stages": [dataclasses.asdict(one) for one in stages]}


def policy_row(one: PolicyFacts, checks: Checks | None = None, *, link: bool = False) -> tuple[str, ...]:
    """Return a line of the table; of what cannot be built, the reason stands where its needs would.

    Args:
        one: the policy.
        checks: what every check found, by policy; no column without it.
        link: make a link of the paper.
    """
    paper = one.paper or NOTHING
    if link and one.paper:
        paper = f"[{one.paper}](https://arxiv.org/abs/{one.paper})"
    needs = one.needs_in_words if one.problem is None else one_line(one.problem)
    column = () if checks is None else (in_words(checks[one.name]) if one.name in checks else NOTHING,)
    return one.name, paper, one.phase or "broken", needs, *column, one.package


def _stage(one: StageFacts) -> tuple[str, ...]:
    return one.name, one.role or "broken", one.summary if one.problem is None else one_line(one.problem), one.package


def _print_broken(facts: Sequence[PolicyFacts | StageFacts]) -> None:
    """Print what cannot be loaded or built, each on a line as long as its reason."""
    for one in facts:
        if one.problem is not None:
            line = f"{one.name}  broken, from {one.package}: {one_line(one.problem)}"
            console.stdout().print(line, style="red", markup=False, soft_wrap=True)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, wide: Sequence[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in head:
        options: dict[str, Any] = {"ratio": 1} if name in wide else {"no_wrap": True}
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
