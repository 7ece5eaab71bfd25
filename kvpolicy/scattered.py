"""Keys and values that do not lie in one block: :class:`Scattered`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Scattered"]


class Scattered:
    """Be ``lines[table]``, gathered only when it is read, and only as much of it as is read.

    Where memory is paged, or heads have slots of different numbers, a view shows its keys and values
    as one of these. Picking rows, heads and slots stays lazy; every other operation of torch, and every other
    method of a tensor, sees an ordinary tensor that is made for it.

    Args:
        lines: ``[N, D]``, one key or value a line.
        table: ``[..., S]`` int64, the line of each slot.

    >>> import torch
    >>> keys = Scattered(torch.arange(6.0).view(3, 2), torch.tensor([[2, 0]]))
    >>> keys.shape
    torch.Size([1, 2, 2])
    >>> torch.linalg.vector_norm(keys, dim=-1)
    tensor([[6.4031, 1.0000]])
    """

    def __init__(self, lines: Tensor, table: Tensor) -> None:
        self.lines, self.table = lines, table

    def gathered(self) -> Tensor:
        """Return the tensor, a copy: ``[..., S, D]``."""
        return self.lines.index_select(0, self.table.reshape(-1)).view(self.shape)

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the tensor."""
        return torch.Size((*self.table.shape, self.lines.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the tensor."""
        return self.lines.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the tensor."""
        return self.lines.device

    @property
    def ndim(self) -> int:
        """Return how many axes the tensor has."""
        return self.table.dim() + 1

    def dim(self) -> int:
        """Return how many axes the tensor has."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return the shape of the tensor, or the size of one axis."""
        return self.shape if dim is None else self.shape[dim]

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        """Return it with some of its axes made one; lazy while the last axis stands alone."""
        last = len(self.shape) - 1
        start, end = start_dim % (last + 1), end_dim % (last + 1)
        if end == last:
            return self.gathered().flatten(start, end)
        return Scattered(self.lines, self.table.flatten(start, end))

    def __getitem__(self, at: Any) -> Any:
        """Return some rows, heads or slots; lazy while the last axis is taken whole."""
        picks = at if isinstance(at, tuple) else (at,)
        if len(picks) <= self.table.dim() and all(isinstance(pick, int | slice | Tensor) for pick in picks):
            return Scattered(self.lines, self.table[at])
        return self.gathered()[at]

    def __getattr__(self, name: str) -> Any:
        """Return what the tensor has under this name."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.gathered(), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Let functions of torch see the tensor."""
        return function(*_plain(args), **_plain(kwargs or {}))


def _plain(value: Any) -> Any:
    """Return the same arguments with tensors in place of what is scattered."""
    if isinstance(value, Scattered):
        return value.gathered()
    if isinstance(value, tuple | list):
        return type(value)(_plain(one) for one in value)
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value


def _binary(name: str) -> Callable[..., Any]:
    def operate(self: Scattered, *others: Any) -> Any:
        return getattr(self.gathered(), name)(*_plain(others))

    operate.__name__ = name
    return operate


#: Python looks operators up on the class, past ``__getattr__``.
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv",
              "rfloordiv", "mod", "rmod", "pow", "rpow", "neg", "abs", "matmul",
              "rmatmul", "lt", "le", "gt", "ge", "eq", "ne", "len", "iter"):  # fmt: skip
    setattr(Scattered, f"__{_name}__", _binary(f"__{_name}__"))
