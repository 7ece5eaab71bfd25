"""Errors of the command line, and the one line that each becomes."""

from __future__ import annotations

from kvpolicy.errors import IntegrityError, KVPolicyError, one_line

__all__ = ["CommandError", "RunError", "exit_code", "one_line"]


class CommandError(KVPolicyError):
    """Report something that whoever typed the command can put right; exit code 2."""


class RunError(CommandError):
    """Report that what was asked was right and could not be done; exit code 1."""


def exit_code(error: BaseException) -> int:
    """Return 2 for what the user can put right, 1 for what failed on the way."""
    if isinstance(error, RunError | IntegrityError):
        return 1
    return 2 if isinstance(error, KVPolicyError) else 1
