"""Records that nobody measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvpolicy.evaluation.record import Cell, Record

FULL = Cell("tiny", "0123456789abcdef", "transformers", "float32", "gsm8k", "full", "full", 0, 0, 0.0)
VERSIONS = {"kvpolicy": "0.1.0", "torch": "2.9.0", "transformers": "5.0.0"}


def cell(label: str = "full", budget: int = 0, **changes: Any) -> Cell:
    text = label.replace("(b)", f"({budget})")
    return replace(FULL, label=label, budget=budget, policy=text, **changes)


def answer(of: Cell = FULL, problem: str = "0", score: float = 1.0, **details: Any) -> Record:
    base = {
        "output": "42",
        "parts": [score == 1.0],
        "prompt_tokens": 20,
        "tokens": 100,
        "finish": "stop",
        "loop": False,
        "loop_zip": False,
        "compression": 1.0 if of.label == "full" else 0.25,
        "peak_nbytes": 4096,
        "evictions": 0,
        "seconds": 0.5,
        "batch": 0,
    }
    return Record(of, problem, score, base | details, VERSIONS)


def answers(of: Cell, scores: list[float], **details: Any) -> list[Record]:
    return [answer(of, f"{i:03}", score, **details) for i, score in enumerate(scores)]


def text(of: Cell, problem: str = "0", kl: float = 0.1, **details: Any) -> Record:
    base = {
        "kl": kl,
        "agreement": 0.9,
        "log_prob": -2.5,
        "full_log_prob": -2.25,
        "by_position": {"kl": [0.0, 2 * kl], "agreement": [1.0, 0.8]},
        "mass_lost": [0.1, 0.3],
        "output_error": [0.2, 0.4],
        "survival": 0.25,
        "survival_union": 0.5,
        "compression": 0.5,
        "peak_nbytes": 2048,
        "seconds": 1.0,
        "batch": 0,
    }
    return Record(of, problem, kl, base | details, VERSIONS)


def texts(of: Cell, kls: list[float], **details: Any) -> list[Record]:
    return [text(of, f"{i:03}", kl, **details) for i, kl in enumerate(kls)]
