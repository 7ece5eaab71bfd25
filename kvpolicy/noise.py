"""Counter-based randomness: numbers are a hash of what they belong to, never of a generator's state.

A number is keyed by (stage seed, row seed, request, stage index, layer, global KV head, draw) and
counted by position. So it is the same alone or in a batch, on one device or many, eager or
compiled, and whatever was drawn before. All arithmetic is on 32-bit words held in int64, and no
intermediate exceeds 63 bits, so that the integers are the same on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvpolicy.view import View

__all__ = ["extend", "gumbel", "normal", "stream", "uniform_bits"]

_MASK = 0xFFFFFFFF
_GOLDEN = 0x1E3779B1  # odd, below 2**31: a product with a 32-bit word stays below 2**63


def _mix(x: Tensor) -> Tensor:
    """Scramble 32-bit words: the two-round integer finaliser of Wellons' hash prospector."""
    x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(_MASK)
    x ^= x >> 15
    # 0x846CA68B does not fit into 31 bits: multiply by its halves.
    high = (x * 0x846C).bitwise_and_(0xFFFF).bitwise_left_shift_(16)
    x = x.mul_(0xA68B).add_(high).bitwise_and_(_MASK)
    return x ^ (x >> 16)


def _absorb(key: tuple[Tensor, Tensor], word: Tensor | int) -> tuple[Tensor, Tensor]:
    a, b = key
    a = _mix((a ^ word) & _MASK)
    b = _mix((b + a + _GOLDEN) & _MASK)
    return a, b


def stream(view: View, seed: int, *, per_head: bool = True, redraw: bool = True) -> tuple[Tensor, Tensor]:
    """Return the key of a stage's randomness: two 32-bit words for each row, or row and head.

    Args:
        view: names the rows, the heads and the stage.
        seed: of the stage.
        per_head: give each KV head its own numbers; otherwise the heads of a row share them.
        redraw: give each eviction its own numbers; otherwise a token's number stays with it.

    Returns:
        Two int64 tensors, ``[B, H]``, or ``[B, 1]`` where heads share.
    """
    zero = torch.zeros_like(view.layer)
    key = (zero, zero + 0x5851F42D)
    for word in (seed & _MASK, (seed >> 32) & _MASK):
        key = _absorb(key, word)
    for rows in (view.seed, view.request):
        key = _absorb(key, rows & _MASK)
        key = _absorb(key, (rows >> 32) & _MASK)
    key = _absorb(key, view.stage)
    key = _absorb(key, view.layer)
    key = _absorb(key, view.draw & _MASK if redraw else 0)
    a, b = key[0][:, None], key[1][:, None]
    if per_head:
        heads = torch.arange(view.shape[1], device=a.device)[None] + view.head_offset
        a, b = _absorb((a, b), heads + 1)
    return a, b


def extend(key: tuple[Tensor, Tensor], word: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return a key that belongs to ``word``, too, such as the position of a query; the two are broadcast."""
    return _absorb(key, word)


def uniform_bits(key: tuple[Tensor, Tensor], counter: Tensor) -> Tensor:
    """Return 32 random bits, as int64, for each counter.

    Args:
        key: what :func:`stream` returned, broadcast against ``counter`` without its last axis.
        counter: non-negative integers below ``2**32``, such as positions.
    """
    a, b = key[0][..., None], key[1][..., None]
    x = (counter.to(torch.int64) * _GOLDEN + a) & _MASK
    return _mix(_mix(x) ^ b)


def _unit(bits: Tensor) -> Tensor:
    """Map 32 bits to float64 inside (0, 1), both ends excluded."""
    return bits.to(torch.float64).add_(0.5).mul_(2.0**-32)


def gumbel(key: tuple[Tensor, Tensor], counter: Tensor) -> Tensor:
    """Return standard Gumbel numbers, float64: ``-log(-log(1 - u))``, with ``u`` of 32 bits, from -3.1 to 22.9."""
    return _unit(uniform_bits(key, counter)).neg_().log1p_().neg_().log_().neg_()


def normal(key: tuple[Tensor, Tensor], counter: Tensor) -> Tensor:
    """Return standard normal numbers, float64, by Box and Muller's transform of two draws a number."""
    twice = counter.to(torch.int64) * 2
    radius = torch.sqrt(-2 * torch.log1p(-_unit(uniform_bits(key, twice))))
    return radius * torch.cos(2 * math.pi * _unit(uniform_bits(key, twice + 1)))
