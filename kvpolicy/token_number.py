"""Stages whose number depends on the token alone, and is computed once for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.stage import Stage
from kvpolicy.view import LayerSpec, StageState, View

__all__ = ["TokenNumber"]


class TokenNumber(Stage):
    """Remember, for each slot, a number that depends on the token alone.

    Reading all values again at each eviction would be most of an eviction's cost, so the store
    keeps the number, one float a slot, and only the slots filled since are read.
    """

    def number(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the number of each token, computed in ``dtype``: ``[..., D]``, ``[..., Dv]`` to ``[...]``."""
        raise NotImplementedError(f"{type(self).__name__} has no number(keys, values, dtype)")

    def numbers_in(self, view: View, keys: Tensor, values: Tensor) -> Tensor:
        """Return the number of some tokens of each row, ``[B, H, F]``, given ``[B, H, F, D]`` and ``[B, H, F, Dv]``.

        Where the number depends on the layer, too, this is what a stage writes instead of :meth:`number`.
        """
        return self.number(keys, values, view.compute_dtype)

    def init(self, spec: LayerSpec, rows: int) -> StageState:
        """Return zeros, one float32 a slot."""
        return StageState((torch.zeros(rows, spec.num_heads, spec.capacity, device=spec.device),))

    def update(self, view: View, state: StageState | None) -> StageState:
        """Return the state with the numbers of the fresh slots filled in."""
        numbers, slots, size = self.numbers(state), view.fresh, view.shape[2]
        if slots.shape[-1] >= size:  # a prompt: every slot is new, and nothing need be gathered
            every = self.numbers_in(view, view.keys, view.values).to(torch.float32)
            return StageState((torch.where(view.valid, every, 0),))
        if slots.shape[-1] == 0:
            return StageState((numbers,))
        padded = slots < 0
        slots = torch.where(padded, slots[..., :1], slots).clamp(min=0)  # padding repeats the first
        keys, values = take(view.keys, slots), take(view.values, slots)
        new = self.numbers_in(view, keys, values).to(torch.float32)
        new = torch.where(view.fresh[..., :1] < 0, numbers.gather(-1, slots), new)
        return StageState((numbers.scatter(-1, slots, new),))

    @staticmethod
    def numbers(state: StageState | None) -> Tensor:
        """Return the remembered numbers, ``[rows, H, S]`` float32."""
        assert state is not None
        return state.slots[0]


def take(x: Tensor, slots: Tensor) -> Tensor:
    """Return ``x[b, h, slots[b, h]]``: ``[B, H, S, D]`` and ``[B, H, F]`` to ``[B, H, F, D]``."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
    heads = torch.arange(x.shape[1], device=x.device)[None, :, None]
    return x[rows, heads, slots]
