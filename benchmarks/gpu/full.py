"""Caches that forget nothing, in the two forms that people use."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.decoder import ModelShape
from kvpolicy.adapters.flash_attn import Backend

__all__ = ["Concatenating", "Preallocated"]


def _once_checked(backend: Backend, layers: int) -> list[Backend]:
    """Return a backend for each layer; lengths, which are the same in all, are checked in the first."""
    return [backend, *[replace(backend, check_lengths=False)] * (layers - 1)]


class Preallocated:
    """Hold ``[B, S, H, D]`` a layer, allocated once; the kernel appends.

    Args:
        shape: of the model.
        batch: requests.
        capacity: slots.
        dtype: of keys and values.
        device: where they live.
        backend: attends.
    """

    def __init__(
        self, shape: ModelShape, batch: int, capacity: int, dtype: torch.dtype, device: torch.device, backend: Backend
    ) -> None:
        self.backends = _once_checked(backend, shape.layers)
        size = (shape.layers, batch, capacity, shape.heads, shape.head_dim)
        self.keys, self.values = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.new = 0

    def fill(self, length: int) -> None:
        """Hold random tokens."""
        for tensor in (*self.keys, *self.values):
            tensor[:, :length].normal_()
        self.lengths.fill_(length)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append, and attend to everything."""
        self.new = q.shape[1]
        return self.backends[layer].with_kvcache(
            q, self.keys[layer], self.values[layer], k, v, cache_seqlens=self.lengths, causal=True
        )

    def step(self) -> None:
        """Count the new tokens."""
        self.lengths.add_(self.new)


class Concatenating:
    """Hold ``[B, H, S, D]`` a layer, copied into a longer tensor at every step, as ``DynamicCache`` does.

    Args:
        shape: of the model.
        batch: requests.
        dtype: of keys and values.
        device: where they live.
        backend: attends.
    """

    def __init__(
        self, shape: ModelShape, batch: int, dtype: torch.dtype, device: torch.device, backend: Backend
    ) -> None:
        self.backends, self.size = _once_checked(backend, shape.layers), (batch, shape.heads, 0, shape.head_dim)
        self.keys = [torch.zeros(self.size, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.new = 0

    def fill(self, length: int) -> None:
        """Hold random tokens."""
        batch, heads, _, dim = self.size
        for held in (self.keys, self.values):
            for layer, old in enumerate(held):
                held[layer] = old.new_empty(batch, heads, length, dim).normal_()
        self.lengths.fill_(length)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Copy everything behind which the new tokens come, and attend to it."""
        if layer == 0:
            self.lengths.add_(q.shape[1])
        self.keys[layer] = torch.cat([self.keys[layer], k.transpose(1, 2)], 2)
        self.values[layer] = torch.cat([self.values[layer], v.transpose(1, 2)], 2)
        keys, values = self.keys[layer].transpose(1, 2), self.values[layer].transpose(1, 2)
        return self.backends[layer].with_kvcache(q, keys, values, cache_seqlens=self.lengths, causal=True)

    def step(self) -> None:
        """Do nothing: the tokens count already."""
