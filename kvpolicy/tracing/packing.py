"""Arrays as short text: the smallest integers that hold them, deflated, in base64.

What heads drop and protect is mostly runs of equal small numbers, so that deflate leaves a byte or
less of each. JavaScript reads the same text with ``atob``, ``DecompressionStream`` and a typed array.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import sys
import zlib
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import UsageError

__all__ = ["packed", "packed_floats", "unpacked"]

TYPES = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "float16": torch.float16}
LARGEST = {"uint8": 2**8 - 1, "int16": 2**15 - 1, "int32": 2**31 - 1}
#: What the largest of some numbers becomes. Numbers down to a five hundred millionth of it keep eleven bits.
TOP = 32768.0


def packed(x: Tensor) -> dict[str, Any]:
    """Return non-negative integers, ``[H, T]``, as what JSON can write.

    >>> unpacked(packed(torch.tensor([[0, 1, 300]]))).tolist()
    [[0, 1, 300]]
    """
    most = int(x.max()) if x.numel() else 0
    name = next(name for name, largest in LARGEST.items() if most <= largest)
    return _written(x.to(TYPES[name]), name, 1.0)


def packed_floats(x: Tensor) -> dict[str, Any]:
    """Return finite numbers, ``[H, T]``, as what JSON can write, each within a thousandth of itself.

    >>> unpacked(packed_floats(torch.tensor([[0.0, 0.25, 4.0]])))
    tensor([[0.0000, 0.2500, 4.0000]])
    """
    most = float(x.abs().max()) if x.numel() else 0.0
    scale = most / TOP if most > 0 else 1.0
    return _written((x.double() / scale).to(torch.float16), "float16", scale)


def unpacked(what: dict[str, Any]) -> Tensor:
    """Return the array that was packed: int32, or float32.

    Raises:
        UsageError: it is no packed array.
    """
    try:
        kind, shape, scale = TYPES[what["type"]], tuple(what["shape"]), float(what["scale"])
        raw = bytearray(zlib.decompress(base64.b64decode(what["data"], validate=True)))
        if not raw:
            return torch.zeros(shape, dtype=torch.int32 if kind != torch.float16 else torch.float32)
        _swap(raw, kind.itemsize)
        found = torch.frombuffer(raw, dtype=kind).view(shape)
    except (KeyError, TypeError, ValueError, RuntimeError, binascii.Error, zlib.error) as error:
        raise UsageError(f"this is no packed array: {error}; record the trace again") from error
    return found.to(torch.int32) if kind != torch.float16 else (found.double() * scale).float()


def _written(x: Tensor, name: str, scale: float) -> dict[str, Any]:
    whole = x.cpu().contiguous()
    raw = bytearray(ctypes.string_at(whole.data_ptr(), whole.nbytes))  # torch alone has no faster way to bytes
    _swap(raw, x.dtype.itemsize)
    text = base64.b64encode(zlib.compress(bytes(raw))).decode("ascii")
    return {"type": name, "shape": list(x.shape), "scale": scale, "data": text}


def _swap(raw: bytearray, size: int) -> None:
    """Turn numbers into little-endian ones, or back."""
    if sys.byteorder == "big" and size > 1:
        for byte in range(size // 2):
            raw[byte::size], raw[size - 1 - byte :: size] = raw[size - 1 - byte :: size], raw[byte::size]
