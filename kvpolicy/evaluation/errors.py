"""Errors of an evaluation."""

from __future__ import annotations

from kvpolicy.errors import KVPolicyError

__all__ = ["DataError", "EvaluationError"]


class DataError(KVPolicyError):
    """Report a data set that is not there, or a file of one that cannot be read."""


class EvaluationError(KVPolicyError):
    """Report an evaluation that cannot be done as it is asked for: its tasks, policies, engine or file of results."""
