"""Attention over dense, paged and ragged caches: one interface, several kernels, one table of what each can do."""

from kvpolicy.adapters.flash_attn.backends.base import Backend
from kvpolicy.adapters.flash_attn.backends.features import FEATURES, TABLE, Features, markdown_rows
from kvpolicy.adapters.flash_attn.backends.select import BACKENDS, select_backend

__all__ = ["BACKENDS", "FEATURES", "TABLE", "Backend", "Features", "markdown_rows", "select_backend"]
