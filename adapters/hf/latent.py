"""Multi-head latent attention: one latent a token for all heads, which a policy sees in its absorbed form.

Models of this kind (DeepSeek-V2 and V3, Kimi-Linear, GLM-4.7-Flash and others) give their cache a latent and a
rotated key a token, and expand both to a key and a value a head behind it. Absorbed into the query
instead, the expansion leaves attention as it was: one head's keys are the latents beside the rotated
keys, and its values are the latents. So such a layer has one KV head, and one set of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.errors import UnsupportedError

__all__ = ["Latent", "latents_of"]


@dataclass(frozen=True, eq=False)
class Latent:
    """Know how one attention module expands what its cache holds.

    Attributes:
        module: the attention module.
        heads: query heads.
        rank: size of a latent.
        plain: size of the part of a query that is not rotated.
    """

    module: Any
    heads: int
    rank: int
    plain: int

    def joined(self, layer: int, latents: Tensor, rotated: Tensor) -> Tensor:
        """Return the keys of the absorbed form, ``[B, 1, T, rank + rotated]``.

        Args:
            layer: which, to be named in an error.
            latents: ``[B, 1, T, rank]``, what the model gives its cache as keys.
            rotated: ``[B, 1, T, rotated]``, what it gives as values.

        Raises:
            UnsupportedError: the model gives its cache something else.
        """
        if latents.shape[1] != 1 or latents.shape[3] != self.rank or rotated.shape[1] != 1:
            raise UnsupportedError(
                f"layer {layer} gives its cache {tuple(latents.shape)} and {tuple(rotated.shape)}; latent attention "
                f"was expected to give one head, of {self.rank} numbers and the rotated key"
            )
        return torch.cat([latents, rotated], -1)

    def parts(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents and the rotated keys, as the model gave them."""
        return keys[..., : self.rank], keys[..., self.rank :]

    def absorbed(self, queries: Tensor) -> Tensor:
        """Return queries that the absorbed keys answer as the expanded keys answer ``queries``.

        Args:
            queries: ``[B, Hq, W, plain + rotated]``.

        Returns:
            ``[B, Hq, W, rank + rotated]``.
        """
        plain, rotated = queries[..., : self.plain], queries[..., self.plain :]
        return torch.cat([plain @ self._expansion(queries), rotated], -1)

    def _expansion(self, like: Tensor) -> Tensor:
        """Return what expands latents to the keys' plain part, ``[Hq, plain, rank]``."""
        linear = self.module.kv_b_proj
        if type(linear) is nn.Linear and type(linear.weight) is nn.Parameter:
            weight = linear.weight
        else:  # quantised or wrapped: what it makes of unit vectors is its weight
            weight = linear(torch.eye(self.rank, dtype=like.dtype, device=like.device)).T
        return weight.detach().view(self.heads, -1, self.rank)[:, : self.plain].to(like.dtype)


def latents_of(model: nn.Module) -> dict[int, Latent]:
    """Return the latent attention modules whose cache comes before the expansion, by layer."""
    return {
        int(module.layer_idx): Latent(module, module.num_heads, module.kv_lora_rank, module.qk_nope_head_dim)  # type: ignore[arg-type]
        for module in model.modules()
        if hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj")
    }
