"""Layers that are left alone: what transformers keeps in them, copied, counted, written down."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["copied", "nbytes", "read", "written"]


def copied(layer: Any, requests: list[int], count: int) -> Any:
    """Return a copy of a layer whose rows are some of its ``count`` rows."""

    def pick(tensor: Tensor) -> Tensor:
        if tensor.dim() and tensor.shape[0] == count:
            return tensor.index_select(0, torch.tensor(requests, device=tensor.device))
        return tensor.clone()

    new = copy.copy(layer)
    for name, value in vars(layer).items():
        setattr(new, name, _mapped(value, pick))
    if isinstance(vars(layer).get("batch_size"), int):
        new.batch_size = len(requests)
    return new


def nbytes(layer: Any) -> int:
    """Return the bytes of a layer's tensors."""
    found: list[int] = []
    _mapped(vars(layer), lambda tensor: found.append(tensor.nbytes))
    return sum(found)


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return {key: _mapped(one, change) for key, one in value.items()} if isinstance(value, dict) else value


def written(layer: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Return what a layer holds as JSON can write it; its tensors go into ``tensors``."""
    return {name: _written(value, f"{prefix}.{name}", tensors) for name, value in vars(layer).items()}


def _written(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _written(one, f"{name}.{key}", tensors)] for key, one in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return {"device": True} if isinstance(value, torch.device) else value


def read(layer: Any, what: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    """Give a fresh layer what :func:`written` returned for another; modifies it."""
    for name, value in what.items():
        setattr(layer, name, _read(value, tensors, device))


def _read(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    kind, held = next(iter(value.items()))
    if kind == "tensor":
        return tensors[held].to(device)
    if kind == "dict":
        return {key: _read(one, tensors, device) for key, one in held}
    return getattr(torch, held) if kind == "dtype" else device
