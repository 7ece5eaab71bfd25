"""A decoder of random weights, written by hand: what a model costs, and one seam for its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SHAPES", "Cache", "Decoder", "ModelShape"]


class Cache(Protocol):
    """Hold keys and values for a decoder."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take new keys and values of a layer, and attend to all that it holds; all are ``[B, T, heads, D]``."""
        ...

    def step(self) -> object:
        """End a forward pass, after every layer has attended."""
        ...


@dataclass(frozen=True)
class ModelShape:
    """Give the sizes of a model."""

    layers: int
    hidden: int
    query_heads: int
    heads: int
    head_dim: int
    inner: int
    vocabulary: int = 151936
    theta: float = 1e6
    eps: float = 1e-6


#: Qwen3's sizes, and one for tests.
SHAPES = {
    "4B": ModelShape(36, 2560, 32, 8, 128, 9728),
    "14B": ModelShape(40, 5120, 40, 8, 128, 17408),
    "tiny": ModelShape(3, 64, 4, 2, 16, 96, vocabulary=128),
}


@dataclass(frozen=True)
class LayerWeights:
    """Hold one layer; what reads the same input is one matrix."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Decoder:
    """Decode: RMSNorm, grouped queries, rotary embedding, SwiGLU.

    Args:
        shape: sizes.
        dtype: of weights and activations.
        device: where.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        queries, pairs = shape.query_heads * shape.head_dim, 2 * shape.heads * shape.head_dim
        self.embedding = self._random(shape.vocabulary, shape.hidden)
        self.layers = [
            LayerWeights(
                attention_norm=self._ones(shape.hidden),
                qkv=self._random(queries + pairs, shape.hidden),
                out=self._random(shape.hidden, queries),
                mlp_norm=self._ones(shape.hidden),
                gate_up=self._random(2 * shape.inner, shape.hidden),
                down=self._random(shape.hidden, shape.inner),
            )
            for _ in range(shape.layers)
        ]
        self.norm = self._ones(shape.hidden)
        exponents = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        self.frequencies = shape.theta**-exponents

    def _random(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device).normal_(std=0.02)

    def _ones(self, size: int) -> Tensor:
        return torch.ones(size, dtype=self.dtype, device=self.device)

    def forward(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Return the logits of the last token, ``[B, vocabulary]``; the cache takes all of them.

        Args:
            tokens: ``[B, T]``.
            positions: ``[B, T]``.
            cache: modified.
        """
        x, rotation = self.embed(tokens), self.rotation(positions)
        for layer in range(self.shape.layers):
            x = self.after(layer, x, cache.attend(layer, *self.before(layer, x, rotation)))
        cache.step()
        return self.logits(x)

    # The parts between two attentions

    def embed(self, tokens: Tensor) -> Tensor:
        """Return ``[B, T, hidden]``."""
        return F.embedding(tokens, self.embedding)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, ``[B, T, 1, D]``, the sines of the first half negated."""
        angles = positions[..., None, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1).to(self.dtype), torch.cat([-sin, sin], -1).to(self.dtype)

    def before(self, layer: int, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries, rotated keys and values, ``[B, T, heads, D]``."""
        shape, weights = self.shape, self.layers[layer]
        joined = F.linear(self._normed(x, weights.attention_norm), weights.qkv)
        joined = joined.view(*x.shape[:2], shape.query_heads + 2 * shape.heads, shape.head_dim)
        turned = joined[..., : -shape.heads, :]
        cos, sin = rotation
        turned = turned * cos + turned.roll(shape.head_dim // 2, -1) * sin
        return turned[..., : -shape.heads, :], turned[..., -shape.heads :, :], joined[..., -shape.heads :, :]

    def after(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output, ``[B, T, hidden]``."""
        weights = self.layers[layer]
        x = x + F.linear(attended.flatten(-2), weights.out)
        gate, up = F.linear(self._normed(x, weights.mlp_norm), weights.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, weights.down)

    def logits(self, x: Tensor) -> Tensor:
        """Return ``[B, vocabulary]`` of the last token; the embedding is the head, too."""
        return F.linear(self._normed(x[:, -1], self.norm), self.embedding)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.shape.hidden,), weight, self.shape.eps)
