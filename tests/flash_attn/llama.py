"""A Llama written by hand, with the weights of transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  #: layer, q, k, v ``[B, T, heads, D]``


def forward(model: Any, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Return the logits of the last token of each row, ``[B, vocabulary]``.

    Args:
        model: a ``LlamaForCausalLM``.
        tokens: ``[B, T]``.
        positions: ``[B, T]``.
        attend: writes new keys and values, and attends.
    """
    config, body = model.config, model.model
    dim = config.head_dim
    x = body.embed_tokens(tokens)
    cos, sin = rotation(body.rotary_emb.inv_freq, positions, x.dtype)
    for i, layer in enumerate(body.layers):
        h = norm(x, layer.input_layernorm)
        q, k, v = (
            linear(h, p.weight, p.bias).unflatten(-1, (-1, dim))
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        out = attend(i, rotated(q, cos, sin), rotated(k, cos, sin), v)
        x = x + linear(out.flatten(2), layer.self_attn.o_proj.weight)
        h, mlp = norm(x, layer.post_attention_layernorm), layer.mlp
        x = x + mlp.down_proj(silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return model.lm_head(norm(x, body.norm)[:, -1])


def norm(x: Tensor, module: Any) -> Tensor:
    wide = x.float()  # as transformers does, in float64, too
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * scaled.to(x.dtype)


def rotation(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = (positions[..., None].float() * frequencies.float()).repeat(1, 1, 2)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
