"""Which backend serves a caller: :func:`select_backend`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from types import MappingProxyType

import torch

from kvpolicy.adapters.flash_attn.backends.base import Backend
from kvpolicy.adapters.flash_attn.backends.engines import installed
from kvpolicy.adapters.flash_attn.backends.features import FEATURES, TABLE, Request, lacking
from kvpolicy.adapters.flash_attn.backends.package import FlashAttn
from kvpolicy.adapters.flash_attn.backends.reference import Reference
from kvpolicy.adapters.flash_attn.backends.sdpa import Sdpa
from kvpolicy.adapters.flash_attn.backends.torch_varlen import TorchVarlen
from kvpolicy.errors import ParameterError, UnsupportedError, nearest

__all__ = ["BACKENDS", "select_backend"]

#: The classes, by name, in the order in which ``"auto"`` tries them.
BACKENDS: Mapping[str, type[Backend]] = MappingProxyType(
    {kind.name: kind for kind in (FlashAttn, TorchVarlen, Sdpa, Reference)}
)


def select_backend(
    name: str = "auto",
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    needs: Iterable[str] = frozenset({"row_lengths"}),
    page: int | None = None,
) -> Backend:
    """Return the backend that is named, or the first that can serve.

    A name is never replaced by another one.

    Args:
        name: ``"auto"``, ``"flash-attn"``, ``"torch"``, ``"sdpa"`` or ``"reference"``.
        device: where queries and caches are.
        dtype: of both.
        head_dim: of both.
        needs: words of :data:`~kvpolicy.adapters.flash_attn.backends.FEATURES`; ``"dense"`` or
            ``"paged"`` are added by ``page``. ``"sdpa"`` can serve ``needs=frozenset()``: it has no length
            per row.
        page: tokens a page, or None for dense caches.

    Raises:
        ParameterError: a name or a need that nobody knows, or a page of no tokens.
        UnsupportedError: the named backend, or every one, lacks something; the message says what.

    Example:
        >>> import torch
        >>> print(select_backend(device="cpu", dtype=torch.float32, head_dim=64).name)
        reference
    """
    needs = _words(needs)
    _check_words(name, needs, page)
    place = torch.device(device)
    cuda = place.type == "cuda" and torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(place) if cuda else None
    layout = frozenset({"dense"} if page is None else {"paged"})
    request = Request(place, dtype, head_dim, needs | layout, page, capability)
    missing = {known: lacking(TABLE[known], installed(TABLE[known].engine), request) for known in BACKENDS}
    fit = [known for known in BACKENDS if not missing[known]]
    if name == "auto":
        if fit:
            return BACKENDS[fit[0]]()
        listed = "; ".join(f"{known}: {', '.join(missing[known])}" for known in BACKENDS)
        raise UnsupportedError(f"no backend can serve {request}. {listed}. Ask for less")
    if name in fit:
        return BACKENDS[name]()
    instead = f"write backend={fit[0]!r}, which can, or 'auto'" if fit else "no other backend can; ask for less"
    raise UnsupportedError(f"backend {name!r} cannot serve {request}: {', '.join(missing[name])}; {instead}")


def _words(needs: Iterable[str]) -> frozenset[str]:
    """Return needs as a set.

    Raises:
        ParameterError: they are one text, or nothing that holds texts.
    """
    found = list(needs) if isinstance(needs, Iterable) and not isinstance(needs, str) else None
    if found is None or not all(isinstance(word, str) for word in found):
        instead = {needs} if isinstance(needs, str) else {"row_lengths"}
        raise ParameterError(f"needs={needs!r}: needs are several words; write needs={instead!r}")
    return frozenset(found)


def _check_words(name: str, needs: Set[str], page: int | None) -> None:
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        words = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ParameterError(f"backend {name!r} is no name: write one of {words}")
    if name != "auto" and name not in BACKENDS:
        words = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ParameterError(f"backend {name!r} is not one of {words}{nearest(name, ('auto', *BACKENDS))}")
    for word in sorted(needs - set(FEATURES)):
        words = ", ".join(map(repr, FEATURES))
        raise ParameterError(f"needs={word!r}: a need is one of {words}{nearest(word, FEATURES)}")
    if page is not None and page < 1:
        raise ParameterError(f"page={page}: a page has at least one token; leave it out for dense caches")
    if page is None and "paged" in needs:
        raise ParameterError("needs 'paged', and page is not given: write page=256, or what your pages hold")
