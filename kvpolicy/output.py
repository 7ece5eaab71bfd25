"""What a layer makes of a value: its output projection, shown to policies that ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["OutputProjection"]


@dataclass(frozen=True, eq=False)
class OutputProjection:
    """Hold the output projection of each row of a view, by reference.

    A view may show many layers, and a projection has as many numbers as a thousand tokens of all heads: a
    tensor ``[B, Hq, Dv, hidden]`` would copy every layer's weights at every eviction. So rows name their
    layer's own weights, which are only read.

    Attributes:
        weights: of some layers, ``[hidden, Hq, Dv]`` each.
        rows: for each row of the view, which of the weights is its own.
    """

    weights: tuple[Tensor, ...]
    rows: tuple[int, ...]

    def __getitem__(self, at: Any) -> OutputProjection:
        """Return the projections of some rows: a slice, or a sequence or tensor of indices."""
        if isinstance(at, slice):
            return OutputProjection(self.weights, self.rows[at])
        picked: Sequence[int] = at.tolist() if isinstance(at, Tensor) else at
        return OutputProjection(self.weights, tuple(self.rows[row] for row in picked))

    def heads(self, start: int, stop: int) -> OutputProjection:
        """Return the projections of some query heads, as one rank of several sees them."""
        return OutputProjection(tuple(weight[:, start:stop] for weight in self.weights), self.rows)

    def norms(self, values: Tensor, dtype: torch.dtype, workspace: int) -> Tensor:
        """Return the sum of the absolute numbers that a value becomes, the mean over the query heads of its group.

        Args:
            values: ``[B, H, F, Dv]``.
            dtype: to compute in.
            workspace: bytes that temporaries may take.

        Returns:
            ``[B, H, F]`` in ``dtype``.
        """
        b, heads, count, _ = values.shape
        out = torch.zeros(b, heads, count, dtype=dtype, device=values.device)
        for first, last in _runs(self.rows):
            weight = self.weights[self.rows[first]]
            hidden, group = weight.shape[0], weight.shape[1] // heads
            step = max(1, workspace // 4 // ((last - first) * hidden * torch.finfo(dtype).bits // 8))
            for head in range(heads):
                mine = [weight[:, head * group + member].to(dtype).T for member in range(group)]
                for start in range(0, count, step):
                    held = values[first:last, head, start : start + step].to(dtype)
                    found = sum((held @ one).abs().sum(-1) for one in mine)
                    out[first:last, head, start : start + step] = found / group
        return out


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return where rows of the same layer begin and end."""
    starts = [at for at in range(len(rows)) if at == 0 or rows[at] != rows[at - 1]]
    return list(zip(starts, [*starts[1:], len(rows)], strict=True))
