"""The entry point: :func:`register` tells vLLM of our cache spec and of wrapped attention backends."""

from __future__ import annotations

import warnings

from kvpolicy.errors import UntestedVersionWarning

__all__ = ["TESTED", "register", "warn_of_version"]

#: Versions of vLLM that the tests ran with, oldest first.
TESTED = ("0.32.0",)
_HERE = "kvpolicy.adapters.vllm.backends"


def register() -> None:
    """Register with vLLM's own registries; called by vLLM in each of its processes, as often as it likes.

    Nothing changes for an engine that does not ask for eviction.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from kvpolicy.adapters.vllm import backends
    from kvpolicy.adapters.vllm.board import open_board
    from kvpolicy.adapters.vllm.manager import EvictionManager
    from kvpolicy.adapters.vllm.spec import EvictionSpec

    open_board()
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # the built-in specs come first, or never
    KVCacheSpecRegistry.register(EvictionSpec, EvictionManager, EvictionSpec)
    for member in AttentionBackendEnum:
        if not member.value or member.name in backends.LEFT_ALONE:
            continue
        path = member.get_path()
        if not path.startswith(_HERE):
            backends.stock[member.name] = path
            register_backend(member, f"{_HERE}.{member.name}")


def warn_of_version() -> None:
    """Warn where this version of vLLM was not tested; what is relied on is compared in every version."""
    from vllm import __version__

    if __version__.split("+")[0] not in TESTED:
        warnings.warn(
            f"kvpolicy was tested with vLLM {', '.join(TESTED)}, and this is {__version__}: it compares itself with "
            "the full cache when it starts, and refuses to serve if they differ",
            UntestedVersionWarning,
            stacklevel=2,
        )
