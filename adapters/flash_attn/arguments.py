"""What comes into a cache in one forward pass, checked before anything is modified."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from kvpolicy import _check
from kvpolicy.errors import BindError, ParameterError, UsageError
from kvpolicy.host import on_device
from kvpolicy.view import LayerSpec

__all__ = [
    "ATTEND",
    "check_counts",
    "check_dtype",
    "check_kind",
    "check_logits",
    "check_queries",
    "check_sizes",
    "check_tokens",
    "checked_width",
    "device_of",
    "host_integers",
    "positions",
]

#: What :meth:`FlashCache.attend` does by itself, or is told elsewhere, by the names of arguments of kernels.
ATTEND: Mapping[str, str] = {
    "softmax_scale": "the cache knows it; write FlashCache(scaling=...)",
    "scal": "the cache knows it; write FlashCache(scaling=...)",
    "softcap": "the cache knows it; write FlashCache(softcap=...)",
    "causal": "attend is causal by itself: a token sees what the layer holds, the tokens before it and itself",
    "is_causal": "attend is causal by itself: a token sees what the layer holds, the tokens before it and itself",
    "attention_mask": "attend is causal by itself, and hides pads on the left; write counts=, the tokens of each row",
    "attn_mask": "attend is causal by itself, and hides pads on the left; write counts=, the tokens of each row",
    "position_ids": "attend counts tokens by itself; rotate q and k by cache.next_positions(width) before the call",
    "return_lse": "attend keeps the log-sum-exp by itself where a policy asks it, and returns the output only",
    "return_softmax_lse": "attend keeps the log-sum-exp by itself where a policy asks it, and returns the output only",
}


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


def check_logits(owner: str, scaling: float | None, softcap: float | None) -> None:
    """Refuse a scale or a cap that no attention has.

    Args:
        owner: to be named.
        scaling: what logits are multiplied by; None for the default.
        softcap: what they are capped with; None for nothing.

    Raises:
        ParameterError: one of them is no positive, finite number.
    """
    for name, value, instead in (
        ("scaling", scaling, "leave it out for head_dim ** -0.5"),
        ("softcap", softcap, "softcap=None switches it off"),
    ):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise ParameterError(f"{owner}({name}={value!r}): {name} is a positive, finite number; {instead}")


def check_dtype(owner: str, dtype: object) -> None:
    """Refuse what is no floating-point dtype.

    Raises:
        ParameterError: it is none.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ParameterError(
            f"{owner}(dtype={dtype!r}): keys and values have a floating-point torch.dtype; write dtype=torch.float32, "
            "or the model's"
        )


def device_of(owner: str, device: torch.device | str) -> torch.device:
    """Return a device with its index: ``"cuda"`` is ``"cuda:0"``, or whichever is current.

    Raises:
        BindError: there is no such device here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise BindError(
            f"{owner}(device={device!r}): this torch ({torch.__version__}) has no such device ({reason}); write "
            "device='cpu', or 'cuda' with a build of torch that sees a GPU"
        ) from error


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
    if tensor.dim() == 4 and not tensor.shape[1] and tensor.shape[2:] == expected[2:]:
        _refuse(f"{name} has shape {tuple(tensor.shape)}: no token was given, and a forward pass has one at least")
    if tuple(tensor.shape) != expected or not expected[1]:
        sizes = ", ".join("T" if size is None else str(size) for size in expected)
        _refuse(
            f"{name} has shape {tuple(tensor.shape)}, and this cache takes ({sizes}): (batch_size, tokens, heads, "
            f"size); for transformers' layout write {name}.transpose(1, 2)"
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


def checked_width(width: int) -> int:
    """Return the columns of a forward pass.

    Raises:
        UsageError: they are no positive integer.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        _refuse(f"next_positions({width!r}): width is a positive integer, the columns of the next forward pass")
    return width


def host_integers(name: str, given: object, rows: int | None) -> list[int]:
    """Return one integer a row that the host knows without waiting; any number of them where ``rows`` is None.

    Raises:
        UsageError: a tensor of another device, no integers, or another number of them.
    """
    if isinstance(given, Tensor):
        if given.device.type != "cpu":
            _refuse(f"{name} is a tensor on {given.device}, which would have to be waited for: give a list of integers")
        given = given.tolist()
    if not isinstance(given, Sequence) or not all(isinstance(n, int) and not isinstance(n, bool) for n in given):
        _refuse(f"{name}={given!r}: give a list of integers, one for each row")
    if rows is not None and len(given) != rows:
        _refuse(f"{name} names {len(given)} rows, and there are {rows}")
    return list(given)


def positions(seen: Sequence[int], width: int, counts: Sequence[int], device: torch.device) -> Tensor:
    """Return the positions of left-padded new tokens, ``[B, width]`` int64, 0 for pads."""
    first = [have - (width - count) for have, count in zip(seen, counts, strict=True)]
    return (on_device(first, device)[:, None] + torch.arange(width, device=device)).clamp(min=0)


def _refuse(text: str) -> NoReturn:
    raise UsageError(text)
