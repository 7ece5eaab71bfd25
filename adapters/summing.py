"""Sums over the processes that share a model: :func:`summed`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["summed"]


def summed(t: Tensor, group: Any) -> Tensor:
    """Return the sum of a tensor over the processes of a group; the tensor is left as it is.

    Args:
        t: of any dtype and strides, of one shape on every process.
        group: of ``torch.distributed``.
    """
    total = t.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total
