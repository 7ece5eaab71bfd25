"""The error of the command line, and what becomes of errors there: one line, in its words, and an exit code."""

from __future__ import annotations

import re

from kvpolicy.errors import IntegrityError, KVPolicyError, OfflineError, RunError, one_line

__all__ = ["CommandError", "exit_code", "line"]

#: What sets a parameter that a message of the library names in backticks.
OPTIONS = {
    "batch": "--batch",
    "budgets": "--budget",
    "chat=False": "--no-chat",
    "data": "--data",
    "engine": "--engine",
    "name": "--model",
    "policies": "--policy",
    "results": "--out",
}


class CommandError(KVPolicyError):
    """Report something that whoever typed the command can put right; exit code 2."""


def exit_code(error: BaseException) -> int:
    """Return 2 for what the user can put right, 1 for what failed on the way."""
    if isinstance(error, RunError | IntegrityError):
        return 1
    return 2 if isinstance(error, KVPolicyError) else 1


def line(error: KVPolicyError) -> str:
    """Return the message on one line, with options for the parameters that it names.

    >>> line(KVPolicyError("`budgets` 0: it is at least 1"))
    '--budget 0: it is at least 1'
    """
    text = re.sub(r"`([\w=]+)`", lambda found: OPTIONS.get(found[1], found[0]), one_line(error))
    return f"{text}, or leave --model out" if isinstance(error, OfflineError) else text
