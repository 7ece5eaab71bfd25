"""Where a model runs, and in which numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from kvpolicy.cli.errors import CommandError
from kvpolicy.errors import nearest, one_line

__all__ = ["DTYPES", "choose_device", "choose_dtype"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


def choose_device(text: str) -> torch.device:
    """Return the device; ``"auto"`` is CUDA where there is one, else the CPU.

    Raises:
        CommandError: torch has no such device here.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device {text}: torch cannot use it here: {one_line(error, 200)}") from error
    return device


def choose_dtype(text: str, device: torch.device, *, exact: bool = False) -> torch.dtype:
    """Return the dtype of a name; ``"auto"`` is bfloat16 where the device computes it.

    Args:
        text: one of ``DTYPES``.
        device: where the model runs.
        exact: two runs will be compared: on a CPU, ``"auto"`` is float32, in which rounding does
            not change the likeliest token.

    Raises:
        CommandError: the name is none of ``DTYPES``.
    """
    if text not in DTYPES:
        raise CommandError(f"--dtype {text}: it is one of {', '.join(DTYPES)}{nearest(text, DTYPES)}")
    if text != "auto":
        named: torch.dtype = getattr(torch, text)
        return named
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    fast = device.type == "cpu" and _cpu_computes_bfloat16()
    return torch.bfloat16 if fast and not exact else torch.float32


def _cpu_computes_bfloat16() -> bool:
    """Return whether the processor has bfloat16 products; without them float32 is faster."""
    try:
        words = Path("/proc/cpuinfo").read_text(errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(words)
