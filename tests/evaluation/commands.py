"""What tests of `kvpolicy eval` ask for, and how they look at what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.cli.tools import Result

Run = Callable[..., Result]

VASE = "vase(b, interval=b // 4, recent=b // 4)"
PASSCODE = "passcode(length=96, depth=1, count=3)"  # bytes are tokens: that many hold the fact at the very end alone
TEXT = "file('text.txt', length=96, count=3)"
POLICIES = ("--policy", "full", "--policy", VASE, "--policy", "snapkv(b, window=b // 4)", "--budget", 24)


def table(result: Result) -> str:
    assert result.code == 0, result.err
    return result.out


def refused(result: Result, why: str, code: int = 2) -> None:
    assert result.code == code, result.err
    assert result.out == ""
    assert re.search(why, result.error), result.error


def timeless(path: Path) -> list[str]:
    """Return the lines of a file, without what a clock said, in an order of their own."""
    return sorted(re.sub(r'"seconds":[0-9.e-]+', '"seconds":0', line) for line in path.read_text().splitlines())
