"""The table of what each backend can do; selection, checks and the documentation read it and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import torch
from torch.torch_version import TorchVersion

from kvpolicy.adapters.flash_attn.backends.engines import Engine

__all__ = ["FEATURES", "TABLE", "Features", "Request", "lacking", "markdown_rows"]

#: Every word that ``needs`` may hold, and what it means.
FEATURES: Mapping[str, str] = {
    "dense": "caches of one tensor `[B, S, Hkv, D]`",
    "strided": "transposed and cut views whose last stride is 1",
    "paged": "caches of pages with a `block_table`",
    "row_lengths": "a length per row, in a tensor",
    "varlen": "sequences packed behind each other",
    "head_lengths": "`seqused_k`: gaps between sequences, so that every head has its own length",
    "lse": "the log-sum-exp of every query",
    "softcap": "soft capping of logits",
    "value_dim": "values of another size than keys",
    "append_in_kernel": "new keys are written by the kernel that attends",
}

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Features:
    """Say what one backend can do.

    Attributes:
        engine: the distribution that brings the kernels, ``"torch"`` or ``"flash-attn"``.
        since: its oldest version.
        has: the features, each with the oldest version that has it, where that is newer.
        devices: types of devices, or None for any.
        dtypes: of queries, keys and values, or None for any floating-point dtype.
        head_dim: the largest, or None for any; kernels take multiples of 8.
        page: what divides page sizes.
        align: elements that are read at once, and what so divides strides.
        capability: the oldest compute capability of a CUDA device, or None for any.
    """

    engine: str
    since: str
    has: Mapping[str, str | None]
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dim: int | None = None
    page: int = 1
    align: int = 1
    capability: tuple[int, int] | None = None


def _kernels(engine: str, since: str, has: Mapping[str, str | None]) -> Features:
    """Return what every build of the FlashAttention-2 kernels has in common, with some features."""
    return Features(engine, since, has, ("cuda",), _HALF, head_dim=256, page=256, align=8, capability=(8, 0))


def _of(*names: str, **since: str) -> dict[str, str | None]:
    return {**dict.fromkeys(names), **since}


#: What each backend can do, in the order in which ``"auto"`` tries them.
TABLE: Mapping[str, Features] = {
    "flash-attn": _kernels(
        "flash-attn",
        "2.6",
        _of("dense", "strided", "paged", "row_lengths", "varlen", "head_lengths", "lse", "softcap", "append_in_kernel"),
    ),
    "torch": _kernels(
        "torch",
        "2.12",
        # With pages, kernels that choose the number of splits may be wrong (pytorch/pytorch#194167),
        # and 2.12 does not let the caller choose.
        _of("dense", "strided", "row_lengths", "varlen", "head_lengths", "lse", paged="2.13"),
    ),
    "sdpa": _kernels("torch", "2.6", _of("dense", "strided")),
    "reference": Features("torch", "2.6", _of(*(name for name in FEATURES if name != "append_in_kernel"))),
}


@dataclass(frozen=True)
class Request:
    """Say what a caller wants to do; None is not asked.

    Attributes:
        device: where.
        dtype: of queries, keys and values.
        head_dim: of queries and keys.
        needs: words of :data:`FEATURES`.
        page: tokens a page, where caches are paged.
        capability: of the CUDA device.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    needs: Set[str] = field(default_factory=frozenset)
    page: int | None = None
    capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        pages = f", pages of {self.page}" if self.page is not None else ""
        needs = f", needs={sorted(self.needs)}" if self.needs else ""
        return f"{self.dtype} on {self.device}, head_dim={self.head_dim}{pages}{needs}"


def lacking(features: Features, engine: Engine, request: Request) -> list[str]:
    """Return what a backend lacks for a request, each with its way out; nothing if it can serve.

    Args:
        features: the backend's line of the table.
        engine: what is installed.
        request: what is wanted.
    """
    if engine.version is None:
        return [f"{features.engine} is not here ({engine.why}): pip install '{features.engine}>={features.since}'"]
    if TorchVersion(engine.version) < features.since:
        return [f"{features.engine} {engine.version} is too old: install {features.engine} {features.since} or later"]
    found: list[str] = []
    if features.devices is not None and request.device.type not in features.devices:
        found.append(f"it runs on {' and '.join(features.devices)} only")
    oldest = features.capability
    if oldest is not None and request.capability is not None and request.capability < oldest:
        found.append(
            f"it needs compute capability {_dotted(oldest)}, and this device has {_dotted(request.capability)}"
        )
    if features.dtypes is not None and request.dtype not in features.dtypes:
        found.append(f"it takes {' and '.join(map(_short, features.dtypes))} only")
    if features.head_dim is not None and (request.head_dim > features.head_dim or request.head_dim % 8):
        found.append(f"its head_dim is a multiple of 8 up to {features.head_dim}")
    if request.page is not None and request.page % features.page:
        found.append(f"its pages have a multiple of {features.page} tokens")
    for name in sorted(request.needs):
        since = features.has.get(name)
        if name not in features.has:
            found.append(f"it has no {name}")
        elif since is not None and TorchVersion(engine.version) < since:
            found.append(f"it has {name} since {features.engine} {since}, and this is {engine.version}")
        elif name in engine.absent:
            found.append(f"{features.engine} {engine.version} has no {name}: {engine.absent[name]}")
    return found


def markdown_rows() -> list[str]:
    """Return the table in Markdown, a string a line.

    >>> print(markdown_rows()[0])
    | | flash-attn | torch | sdpa | reference |
    """
    rows: list[tuple[str, ...]] = [
        ("", *TABLE),
        ("---",) * (len(TABLE) + 1),
        ("needs", *(f"{f.engine} >= {f.since}" for f in TABLE.values())),
        ("devices", *(", ".join(f.devices) if f.devices else "any" for f in TABLE.values())),
        ("compute capability", *(f"from {_dotted(f.capability)}" if f.capability else "any" for f in TABLE.values())),
        ("dtypes", *(", ".join(map(_short, f.dtypes)) if f.dtypes else "any" for f in TABLE.values())),
        ("`head_dim`", *(f"multiples of 8 to {f.head_dim}" if f.head_dim else "any" for f in TABLE.values())),
    ]
    for name, meaning in FEATURES.items():
        rows.append((f"`{name}`: {meaning}", *(_cell(features, name) for features in TABLE.values())))
    return [_line(row) for row in rows]


def _cell(features: Features, name: str) -> str:
    if name not in features.has:
        return "no"
    since = features.has[name]
    pages = f", multiples of {features.page}" if name == "paged" and features.page > 1 else ""
    return ("yes" if since is None else f"from {features.engine} {since}") + pages


def _line(cells: tuple[str, ...]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
