"""What the host tells the device, without waiting for it: :func:`on_device`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["insist", "on_device", "on_host", "readable", "sent"]


def on_host(numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """Return counts as a tensor of the host, whatever device is the default."""
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def on_device(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return integers that the host knows as a tensor on a device."""
    return sent(on_host(numbers, dtype), device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device.

    A plain copy to a GPU waits until all that was asked of it before is done; one from pinned memory does not.
    """
    return _copied(tensor, device)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def readable(tensor: Tensor) -> bool:
    """Return whether the host may look into a tensor: on the CPU, and not while a graph is made of it."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def insist(right: Tensor, error: Exception) -> None:
    """Stop where a device has found something wrong: on the CPU with an error, elsewhere without waiting.

    Args:
        right: one bool.
        error: what is raised on the CPU; elsewhere the device stops, with its text.
    """
    if right.device.type != "cpu":
        torch._assert_async(right, str(error))  # pyright: ignore[reportPrivateImportUsage]
    elif not bool(right):
        raise error
