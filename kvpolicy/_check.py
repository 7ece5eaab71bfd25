"""Checks of stage parameters, each with a message that says what to write instead."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvpolicy.errors import ParameterError, nearest


def integer(owner: object, name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse what is not an int from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ParameterError(f"{_name(owner)}({name}={value!r}): {name} is a whole number, found {_kind(value)}")
    if value < low or (high is not None and value > high):
        most = "" if high is None else f" and at most {high}"
        raise ParameterError(f"{_name(owner)}({name}={value}): {name} must be at least {low}{most}")


def odd(owner: object, name: str, value: object) -> None:
    """Refuse what is not an odd int of at least 1: a width with a middle."""
    integer(owner, name, value, 1)
    if isinstance(value, int) and value % 2 == 0:
        raise ParameterError(f"{_name(owner)}({name}={value}): {name} must be odd, such as {value + 1}")


def number(
    owner: object,
    name: str,
    value: object,
    low: float,
    high: float | None = None,
    *,
    above: bool = False,
) -> None:
    """Refuse what is not a finite number from ``low`` (exclusive if ``above``) to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ParameterError(f"{_name(owner)}({name}={value!r}): {name} is a number, found {_kind(value)}")
    if not math.isfinite(value):
        raise ParameterError(f"{_name(owner)}({name}={value}): {name} must be finite")
    if value < low or (above and value <= low) or (high is not None and value > high):
        least = f"above {low}" if above else f"at least {low}"
        most = "" if high is None else f" and at most {high}"
        raise ParameterError(f"{_name(owner)}({name}={value}): {name} must be {least}{most}")


def choice(owner: object, name: str, value: object, known: Sequence[str]) -> None:
    """Refuse what is not one of the known words."""
    if value not in known:
        words = ", ".join(repr(word) for word in known)
        hint = nearest(value, known) if isinstance(value, str) else ""
        raise ParameterError(f"{_name(owner)}({name}={value!r}): {name} is one of {words}{hint}")


def flag(owner: object, name: str, value: object) -> None:
    """Refuse what is not a bool."""
    if not isinstance(value, bool):
        raise ParameterError(f"{_name(owner)}({name}={value!r}): {name} is True or False")


def _name(owner: object) -> str:
    return owner if isinstance(owner, str) else type(owner).__name__


def _kind(value: object) -> str:
    return type(value).__name__
