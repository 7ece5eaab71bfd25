"""What the host tells the device, without waiting for it: :func:`on_device`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["insist", "on_device", "sent"]


def on_device(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return integers that the host knows as a tensor on a device."""
    return sent(torch.tensor(numbers, dtype=dtype), device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device.

    A plain copy to a GPU waits until all that was asked of it before is done; one from pinned memory does not.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
