"""Compare two answers by mathematical value; a program of its own, too, that imports no torch."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from typing import Any

__all__ = ["same_value"]

SECONDS = 5  #: for reading one answer, or comparing two; both are rarely above a hundredth
STARTING = 30  #: seconds that a process may take besides


def same_value(gold: str, answer: str) -> bool:
    r"""Return whether math-verify finds two answers equal, each as it stands in a ``\boxed{}``.

    An answer that takes longer than five seconds, such as ``9^{9^{9}}``, is wrong. The time limit is a
    signal, which the main thread alone can take: other threads ask a process.

    Raises:
        ImportError: math-verify is not installed.
        RuntimeError: the process failed.
    """
    if threading.current_thread() is not threading.main_thread():
        return _in_process(gold, answer)
    math_verify: Any = importlib.import_module("math_verify")  # untyped
    golds, answers = (
        math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=SECONDS)  # one at a time: each has its limit
        for text in (gold, answer)
    )
    return bool(math_verify.verify(golds, answers, timeout_seconds=SECONDS))


def _in_process(gold: str, answer: str) -> bool:
    try:
        done = subprocess.run(
            # -P: the folder of this file is no place to import from
            [sys.executable, "-P", __file__],
            input=json.dumps([gold, answer]),
            capture_output=True,
            text=True,
            timeout=STARTING + 4 * SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode > 0:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return done.stdout.strip() == "true"  # not so where a signal ended it: an answer that no parser survives


if __name__ == "__main__":
    print(json.dumps(same_value(*json.load(sys.stdin))))
