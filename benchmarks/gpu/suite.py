"""The tests that need a CUDA device, and what they said."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.deadline import Deadline
from benchmarks.report import Section

__all__ = ["run"]

ROOT = Path(__file__).resolve().parents[2]
COUNT = re.compile(r"(\d+) (passed|failed|skipped|error)")


def run(deadline: Deadline, paths: Sequence[str] = ("tests",)) -> Section:
    """Run the tests marked ``gpu`` in a process of its own, for half of the time that is left.

    Args:
        deadline: the end; what follows needs time, too.
        paths: where they are looked for.
    """
    section = Section("suite", "the tests marked `gpu`", ["passed", "failed", "skipped", "error"])
    if importlib.util.find_spec("pytest") is None:
        section.notes.append("skipped: pytest is not installed here")
        return section
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=line", *paths]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, deadline.left / 2), check=False
        )
    except subprocess.TimeoutExpired as error:
        section.notes.append(f"stopped: not done after {error.timeout:.0f} s")
        return section
    lines = done.stdout.strip().splitlines()
    counts = dict.fromkeys(section.columns, 0) | {what: int(n) for n, what in COUNT.findall(lines[-1] if lines else "")}
    section.rows.append([counts[name] for name in section.columns])
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    section.notes += [*failed, f"pytest said: {lines[-1] if lines else done.stderr.strip()[-300:]}"]
    return section
