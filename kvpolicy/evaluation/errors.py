"""What goes wrong in an evaluation, beside what goes wrong in a policy."""

from __future__ import annotations

from kvpolicy.errors import KVPolicyError

__all__ = ["DataError", "EvaluationError"]


class DataError(KVPolicyError):
    """Report problems or results that cannot be read."""


class EvaluationError(KVPolicyError):
    """Report an evaluation that cannot be done."""
