"""Which kernels are installed; nothing else in the backends asks for a version."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.torch_version import TorchVersion

__all__ = ["Engine", "installed", "takes_splits", "varlen_forward"]


@dataclass(frozen=True)
class Engine:
    """Say what is installed of a distribution.

    Attributes:
        version: or None, where it cannot be imported.
        why: what the import said, where it failed.
        absent: features that this version lacks though its number does not say so, and why.
    """

    version: str | None
    why: str = ""
    absent: Mapping[str, str] = field(default_factory=dict[str, str])


@functools.cache
def installed(name: str) -> Engine:
    """Return what is installed of ``"torch"`` or ``"flash-attn"``; imports it."""
    if name == "torch":
        return Engine(str(torch.__version__).partition("+")[0])
    try:
        import flash_attn
    except (ImportError, OSError) as error:  # OSError: a library that was built for another CUDA
        return Engine(None, f"{type(error).__name__}: {error}")
    absent = {} if varlen_forward() is not None else {"head_lengths": "its varlen kernel is called without seqused_k"}
    return Engine(str(flash_attn.__version__).partition("+")[0], absent=absent)


def varlen_forward() -> Callable[..., Any] | None:
    """Return flash-attn's function that takes ``seqused_k``, or None: the public one does not take it."""
    from flash_attn import flash_attn_interface

    found = getattr(flash_attn_interface, "_flash_attn_varlen_forward", None)
    if found is None:
        return None
    operator = getattr(found, "_opoverload", None)  # torch.library.custom_op hides the names of a function
    known = inspect.signature(found).parameters if operator is None else [a.name for a in operator._schema.arguments]
    # Before window_size_left came, it returned eight tensors in another order.
    return found if {"seqused_k", "window_size_left"} <= set(known) else None


def takes_splits() -> bool:
    """Return whether torch's FlashAttention-2 lets the caller choose the number of splits.

    The argument is there since 2.12, where these kernels refuse it.
    """
    return TorchVersion(installed("torch").version or "0") >= "2.13"
