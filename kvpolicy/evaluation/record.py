"""What one problem under one policy came to: :class:`Record`, a line of a result file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["FULL", "Cell", "Record", "short"]

FULL = "full"  #: stands in the place of a policy where nothing is evicted


@dataclass(frozen=True, order=True)
class Cell:
    """Name everything that the problems of one cell of the table share.

    Attributes:
        model: as the user calls it.
        weights: a fingerprint of configuration and weights.
        engine: ``"transformers"`` or ``"vllm"``.
        dtype: ``"bfloat16"``, ...
        task: its text, such as ``"gsm8k"``.
        policy: the text of the policy, with every parameter that is not a default; or ``"full"``.
        label: the template that the policy was made of, such as ``"vase(b)"``; what a table shows.
        budget: slots per KV head that the template was given; 0 for the full cache.
        seed: of the sampling and of the policy's noise.
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that make up this share; 1 from all.
        max_new_tokens: a cap on answers in place of the task's; 0 leaves that.
    """

    model: str
    weights: str
    engine: str
    dtype: str
    task: str
    policy: str
    label: str
    budget: int
    seed: int
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 0


@dataclass(frozen=True)
class Record:
    """Hold one finished problem.

    Attributes:
        cell: what it shares with others.
        problem: its id.
        score: 0 to 1, the share of right parts; of a text, the mean KL from the full cache in nats.
        details: of an answer: ``output``, ``parts`` (bools), ``prompt_tokens``, ``tokens``, ``finish``
            (``"stop"`` or ``"length"``), ``loop`` (garbage or a phrase, by VaSE's detector), ``loop_zip``
            (by compression ratio), ``compression`` (mean over generated tokens of slots used / tokens
            seen), ``peak_nbytes`` (keys, values and all else that the cache held, of this request) and
            ``evictions``. Of a text: ``kl``, ``agreement``, ``log_prob``, ``full_log_prob`` (means over
            positions), ``by_position`` (lists of the same, by blocks), ``mass_lost`` and ``output_error``
            (a list over layers), ``survival`` (share of tokens older than the capacity that a head still
            holds), ``survival_union`` (that some head holds), and the same ``compression``,
            ``peak_nbytes`` and ``evictions``. Of both: ``seconds`` (of its batch, divided by its rows),
            ``batch`` (its number in the cell), ``asked`` (a digest of the question), ``model`` (as it
            was named) and ``device``.
        versions: of kvpolicy, torch and the engine.
    """

    cell: Cell
    problem: str
    score: float
    details: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)


def short(label: str) -> str:
    """Return the name of a template that has one, else the template.

    >>> short("VaSE: vase(b, interval=b // 8)"), short("vase")
    ('VaSE', 'vase')
    """
    return label.partition(": ")[0]
