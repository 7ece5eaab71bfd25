"""Check the commands ``kvpolicy eval`` that pages show, without running what takes minutes."""

from __future__ import annotations

from typing import Any

import typer

from kvpolicy.cli import app as cli
from kvpolicy.cli.evaluate import QUICK_BUDGET, _policies
from kvpolicy.evaluation import tasks

__all__ = ["check"]


def check(options: list[str]) -> None:
    """Read the options as the command does: tasks, policies and budgets must be some.

    Raises:
        click.UsageError: there is no such option.
        KVPolicyError: a task or a policy cannot be read, or wants what is not given.
    """
    group: Any = typer.main.get_command(cli.app)
    given = group.commands["eval"].make_context("eval", list(options)).params
    if given["tasks"]:
        assert cli.run(["eval", *options]) == 0
        return
    assert given["task"] or given["quick"] or given["only_report"], options
    for text in given["task"] or ():
        tasks.parse(text)
    if not given["only_report"]:
        policies = list(given["policy"] or ())
        budgets = given["budget"] or ([QUICK_BUDGET] if given["quick"] else [])
        _policies(policies, budgets, given["quick"], given["leaderboard"], given["ablation"])
