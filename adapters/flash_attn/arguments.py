"""What comes into a cache in one forward pass, checked before anything is modified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from kvpolicy import _check
from kvpolicy.errors import ParameterError, UsageError
from kvpolicy.host import on_device
from kvpolicy.view import LayerSpec

__all__ = ["check_counts", "check_kind", "check_queries", "check_sizes", "check_tokens", "host_integers", "positions"]


def check_sizes(owner: str, sizes: dict[str, int]) -> None:
    """Refuse sizes that are none.

    Args:
        owner: to be named.
        sizes: by their names, ``num_heads`` and ``num_query_heads`` among them.

    Raises:
        ParameterError: one of them is no positive integer, or query heads cannot share KV heads evenly.
    """
    for name, size in sizes.items():
        _check.integer(owner, name, size, 1)
    if sizes["num_query_heads"] % sizes["num_heads"]:
        raise ParameterError(
            f"{owner}(num_query_heads={sizes['num_query_heads']}): it is no multiple of num_heads={sizes['num_heads']}"
        )


def check_tokens(q: Tensor, k: Tensor, v: Tensor, spec: LayerSpec, batch_size: int) -> None:
    """Refuse queries, keys and values that are not those of this cache.

    Args:
        q: ``[B, T, Hq, D]``.
        k: ``[B, T, Hkv, D]``.
        v: ``[B, T, Hkv, Dv]``.
        spec: of the layers.
        batch_size: ``B``.

    Raises:
        UsageError: one of them is missing, or has another shape, dtype, device or stride.
    """
    for name, tensor, heads, dim in (
        ("q", q, spec.num_query_heads, spec.head_dim),
        ("k", k, spec.num_heads, spec.head_dim),
        ("v", v, spec.num_heads, spec.value_dim),
    ):
        if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            _refuse(f"{name} is {tensor!r}: attend takes q, k and v of the new tokens, all three of them")
        _check_new(name, tensor, (batch_size, q.shape[1] if q.dim() == 4 else None, heads, dim))
        check_kind(name, tensor, spec)


def check_queries(q: Tensor, spec: LayerSpec, batch_size: int) -> None:
    """Refuse queries that are not those of these layers, ``[B, T, Hq, D]``.

    Raises:
        UsageError: they have another shape, dtype, device or stride.
    """
    if not isinstance(q, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        _refuse(f"q is {q!r}: give the queries of the new tokens")
    _check_new("q", q, (batch_size, q.shape[1] if q.dim() == 4 else None, spec.num_query_heads, spec.head_dim))
    check_kind("q", q, spec)


def _check_new(name: str, tensor: Tensor, expected: tuple[int, int | None, int, int]) -> None:
    if tuple(tensor.shape) != expected or not expected[1]:
        sizes = ", ".join("T" if size is None else str(size) for size in expected)
        _refuse(
            f"{name} has shape {tuple(tensor.shape)}, and this cache takes ({sizes}): (batch_size, tokens, heads, "
            f"size), and one token at least; for transformers' layout write {name}.transpose(1, 2)"
        )


def check_kind(name: str, tensor: Tensor, spec: LayerSpec) -> None:
    """Refuse a tensor of another dtype, device or layout of memory, or one that asks for a gradient.

    Raises:
        UsageError: it is such a tensor.
    """
    if tensor.dtype != spec.dtype:
        _refuse(f"{name} is {tensor.dtype}, and the cache {spec.dtype}: write {name}.to({spec.dtype})")
    if tensor.device != spec.device:
        _refuse(f"{name} is on {tensor.device}, and the cache on {spec.device}: move one of them")
    if tensor.stride(-1) != 1:
        _refuse(
            f"{name} has strides {tensor.stride()}, and kernels need a last one of 1: write {name}.contiguous(), or "
            "transpose another pair of dimensions"
        )
    if torch.is_grad_enabled() and tensor.requires_grad:
        _refuse(f"{name} asks for a gradient, and slots carry none: run the model under torch.no_grad()")


def check_counts(counts: object, batch_size: int, width: int) -> list[int]:
    """Return the tokens of each row of a forward pass.

    Args:
        counts: as the caller gave them; None for all columns.
        batch_size: rows.
        width: columns.

    Raises:
        UsageError: they are no host integers from 1 to ``width``, one a row.
    """
    if counts is None:
        return [width] * batch_size
    numbers = host_integers("counts", counts, batch_size)
    if not all(1 <= count <= width for count in numbers):
        _refuse(f"counts={numbers}: each row has from 1 to {width} tokens in {width} columns, its last ones")
    return numbers


def host_integers(name: str, given: object, rows: int) -> list[int]:
    """Return one integer a row that the host knows without waiting.

    Raises:
        UsageError: a tensor of another device, no integers, or another number of them.
    """
    if isinstance(given, Tensor):
        if given.device.type != "cpu":
            _refuse(f"{name} is a tensor on {given.device}, which would have to be waited for: give a list of integers")
        given = given.tolist()
    if not isinstance(given, Sequence) or not all(isinstance(n, int) and not isinstance(n, bool) for n in given):
        _refuse(f"{name}={given!r}: give a list of one integer for each row")
    if len(given) != rows:
        _refuse(f"{name} names {len(given)} rows, and there are {rows}")
    return list(given)


def positions(seen: Sequence[int], width: int, counts: Sequence[int], device: torch.device) -> Tensor:
    """Return the positions of left-padded new tokens, ``[B, width]`` int64, 0 for pads."""
    first = [have - (width - count) for have, count in zip(seen, counts, strict=True)]
    return (on_device(first, device)[:, None] + torch.arange(width, device=device)).clamp(min=0)


def _refuse(text: str) -> NoReturn:
    raise UsageError(text)
