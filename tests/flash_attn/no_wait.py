"""A CPU that plays a GPU: whatever would make the host wait for it is an error."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

WAITS = {
    *("item", "tolist", "nonzero", "argwhere", "masked_select", "unique", "cpu", "numpy", "equal", "allclose"),
    *("__bool__", "__int__", "__float__", "__index__", "is_nonzero", "__contains__", "bincount", "__iter__"),
}


class Waited(AssertionError):
    pass


class _Device(TorchFunctionMode):
    """Tell tensors of the host from those of the device, though both are on the CPU.

    The host's are made by ``torch.tensor(...)`` without a device, and of such alone. Moving one to a device
    gives one of the device. Everything else is the device's.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = list(_tensors((args, kwargs)))
        host = all(getattr(t, "of_host", False) for t in tensors)
        if name == "tensor":
            if kwargs.get("device") not in (None, "cpu"):
                raise Waited("a plain copy to the device waits for it: write on_device(...)")
            made = func(*args, **kwargs)
            made.of_host = True
            return made
        if not host or not tensors:
            if name in WAITS and tensors:
                raise Waited(name)
            if name == "to" and any(isinstance(a, str) and a == "cpu" for a in (*args, *kwargs.values())):
                raise Waited("to('cpu')")
            picks = args[1] if name in ("__getitem__", "__setitem__") else ()
            if name == "__getitem__" and any(t.dtype == torch.bool for t in _tensors(picks)):
                raise Waited("a mask that picks")
            if name == "repeat_interleave" and len(tensors) > 1 and "output_size" not in kwargs:
                raise Waited(name)
            return func(*args, **kwargs)
        if name == "to" and any(isinstance(a, torch.device) for a in (*args, *kwargs.values())):
            raise Waited("a plain copy to the device waits for it: write sent(...)")
        made = func(*args, **kwargs)
        for one in _tensors(made):
            one.of_host = True  # type: ignore[attr-defined]
        return made


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@contextmanager
def no_wait() -> Generator[None, None, None]:
    """Raise where the host would wait; checks of the device's values do there what they do on a GPU: not wait."""
    places = ("integrity", "adapters.flash_attn.given", "adapters.flash_attn.pages")
    with mock.patch.multiple(f"kvpolicy.{places[0]}", insist=_told), \
         mock.patch.multiple(f"kvpolicy.{places[1]}", insist=_told), \
         mock.patch.multiple(f"kvpolicy.{places[2]}", insist=_told), \
         mock.patch.multiple("kvpolicy.host", _copied=_copied), \
         mock.patch.multiple("kvpolicy.probabilities", readable=lambda _: False), _Device():  # fmt: skip
        yield


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    with torch._C.DisableTorchFunction():  # it is the device's from now on
        return tensor.clone()


def _told(right: Tensor, error: Exception) -> None:
    assert right.dtype == torch.bool
    assert right.dim() == 0
