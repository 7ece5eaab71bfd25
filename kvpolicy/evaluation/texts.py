"""What texts cost that are read under a policy: :func:`read`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.adapters.hf import Replay, replays, survival
from kvpolicy.policy import EvictionPolicy

__all__ = ["BLOCKS", "EVERY", "read"]

#: One token of so many is compared: most of the time goes into the vocabulary. Prime to the usual intervals, so that
#: tokens are compared at every distance from the last eviction.
EVERY = 7
BLOCKS = 8  #: of positions, for what is shown by position


def read(
    model: Any,
    policies: Sequence[EvictionPolicy],
    tokens: Sequence[Sequence[int]],
    prompt_length: int,
    seed: int,
    names: Sequence[int],
    starts: Sequence[int],
) -> list[list[dict[str, Any]]]:
    """Return the details of each text under each policy, as :class:`~kvpolicy.evaluation.record.Record` lists them.

    Means are over the compared tokens behind ``starts``, which is the same for all policies that are set beside each
    other; where there is none, over all behind the prompt.

    Args:
        model: of transformers.
        policies: what to keep.
        tokens: texts of one length.
        prompt_length: tokens of the prompt, the same of all.
        seed: of the policies' noise.
        names: of the texts, which key the noise, too.
        starts: for each policy, the tokens before which it cannot have evicted anything: its budget.
    """
    whole = torch.tensor(tokens)
    columns = list(range(prompt_length, whole.shape[1], EVERY))
    found = replays(
        model,
        policies,
        whole,
        prompt_length,
        columns=columns,
        probe=True,
        seeds=[seed] * len(tokens),
        requests=names,
    )
    return [[_details(one, row, start) for row in range(len(tokens))] for one, start in zip(found, starts, strict=True)]


def _details(found: Replay, row: int, start: int) -> dict[str, Any]:
    assert found.kl is not None
    assert found.agreement is not None
    assert found.full_log_probs is not None
    assert found.losses is not None
    measured = {
        "kl": found.kl[row],
        "agreement": found.agreement[row].float(),
        "log_prob": found.log_probs[row],
        "full_log_prob": found.full_log_probs[row],
    }
    receipt = found.receipt
    behind = found.columns > start
    if not bool(behind.any()):
        behind = torch.ones_like(behind)
    old = receipt.seen[row] - receipt.capacity
    kept, somewhere = survival(receipt, 0, old) if old > 0 else (torch.ones(row + 1), torch.ones(row + 1))
    return {
        **{name: float(values[behind].double().mean()) for name, values in measured.items()},
        "by_position": {name: _blocks(values) for name, values in measured.items()},
        "mass_lost": found.losses.mass[row].tolist(),
        "output_error": found.losses.output[row].tolist(),
        "survival": float(kept[row]),
        "survival_union": float(somewhere[row]),
        "compression": found.shares[row],
        "peak_nbytes": (receipt.peak_nbytes + receipt.other_nbytes) // len(receipt.seen),
        "evictions": receipt.evictions[row],
    }


def _blocks(values: Tensor) -> list[float | None]:
    """Return means over blocks of positions, None for one that no compared token is in."""
    return [float(block.double().mean()) if len(block) else None for block in values.tensor_split(BLOCKS)]
