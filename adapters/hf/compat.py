"""What differs between versions of transformers, all of it; nothing else in the adapter asks for a version."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeVar, cast

import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.masking_utils import create_causal_mask

from kvpolicy.errors import UnsupportedError, UntestedVersionWarning, UsageError

__all__ = [
    "ANNOUNCES_DRAFTS",
    "CACHE_ARGUMENT",
    "CROPS_TO_LENGTH",
    "OLDEST",
    "TESTED",
    "VERSION",
    "Layer",
    "caches_of",
    "check_drafts",
    "check_static",
    "check_version",
    "decoder_of",
    "guarded",
    "tokens_to_remove",
    "unfit",
]

# Oldest first. The Makefile reads this line: `make test` runs the pinned version, `make test-versions` the others.
TESTED = ("4.57.6", "5.4.0", "5.23.0", "5.24.0")
OLDEST = "4.57"
VERSION = transformers.__version__

_NAMES = ("cache", "past_key_values")  # of a forward pass's cache, since 5.24 and before

#: The name under which models and ``generate()`` take a cache without a word of deprecation.
CACHE_ARGUMENT = next(name for name in _NAMES if name in inspect.signature(create_causal_mask).parameters)

#: Whether assisted decoding says so before its first pass (since 5.14). Before, its first pass holds
#: the prompt and the first draft together, and nothing tells it from a prompt.
ANNOUNCES_DRAFTS = hasattr(Cache, "activate_past_recording")

#: Whether ``crop(n)`` with a positive ``n`` leaves ``n`` tokens (before 5.15), and is not refused.
CROPS_TO_LENGTH = "tokens_to_remove" not in inspect.signature(Cache.crop).parameters

_OwnClass = TypeVar("_OwnClass", bound=type)


# The version itself


def check_version() -> None:
    """Refuse a version that is too old, and warn once of one that is newer than what was tested.

    Raises:
        UnsupportedError: the version is older than :data:`OLDEST`.
    """
    if Version(VERSION) < Version(OLDEST):
        raise UnsupportedError(
            f"EvictionCache needs transformers {OLDEST} or later, and this is {VERSION}, whose caches are others; "
            f"install 'transformers>={OLDEST},<6'"
        )
    if Version(VERSION) > Version(TESTED[-1]):
        _warn_once(VERSION)


@functools.cache
def _warn_once(version: str) -> None:
    warnings.warn(
        f"kvpolicy was tested with transformers {TESTED[0]} to {TESTED[-1]}, and this is {version}: a method that it "
        f"does not know is refused by name; if in doubt, install 'transformers=={TESTED[-1]}'",
        UntestedVersionWarning,
        stacklevel=4,  # whoever makes an EvictionCache
    )


# Methods that later versions may add

_KNOWN = {
    *("activate_past_recording", "batch_repeat_interleave", "batch_select_indices", "crop", "early_initialization"),
    *("get_conv_state", "get_mask_sizes", "get_max_cache_shape", "get_max_length", "get_query_offset"),
    *("get_recurrent_state", "get_seq_length", "has_previous_state", "is_recording_past", "lazy_initialization"),
    *("offload", "prefetch", "reorder_cache", "reset", "update", "update_conv_state", "update_indexer"),
    "update_recurrent_state",
}


def unknown_methods(base: type) -> list[str]:
    """Return the public methods of a class of transformers that no tested version has."""
    return sorted(name for name, one in vars(base).items() if name[0] != "_" and callable(one) and name not in _KNOWN)


def guarded(cls: _OwnClass) -> _OwnClass:
    """Let a class of ours refuse, by name, every method that a newer transformers adds to its bases.

    Inherited, such a method would do to ordinary slots what ours do not understand.
    """
    for base in cls.__mro__[1:]:
        if base.__module__.startswith("transformers."):
            for name in unknown_methods(base):
                setattr(cls, name, _refusal(cls.__name__, name))
    return cls


def _refusal(owner: str, name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(
            f"transformers {VERSION} calls {name}() of its caches, which {owner} does not know; "
            f"install 'transformers=={TESTED[-1]}'"
        )

    return refuse


# The cache layer's methods


@guarded
class Layer(CacheLayerMixin):
    """Be a cache layer of any version, for a subclass that says ``mask_sizes`` and ``get_max_length``."""

    def mask_sizes(self, width: int) -> tuple[int, int]:
        """Return the length and the offset of the mask for ``width`` new tokens."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return :meth:`mask_sizes`; before 5.4 the argument is the positions of the new tokens."""
        return self.mask_sizes(query_length if isinstance(query_length, int) else len(query_length))

    def get_max_cache_shape(self) -> int:
        """Return ``get_max_length``, under its name before 5.13."""
        return int(self.get_max_length())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Do nothing: slots are allocated when the first tokens come. Before 5.0 there are keys alone."""


# Arguments


def caches_of(arguments: dict[str, Any]) -> list[Any]:
    """Return what a forward pass was given as its cache, under the name of any version."""
    return [arguments[name] for name in _NAMES if arguments.get(name) is not None]


def check_drafts(max_draft_tokens: int) -> None:
    """Refuse drafts where assisted decoding does not announce them, and sliding layers cannot take them back.

    Raises:
        UnsupportedError: drafts are asked for, and this version is older than 5.14.
    """
    if max_draft_tokens and not ANNOUNCES_DRAFTS:
        raise UnsupportedError(
            f"max_draft_tokens={max_draft_tokens}: assisted decoding of transformers {VERSION} mixes the first draft "
            "with the prompt and does not say so; install transformers 5.14 or later, or leave max_draft_tokens out"
        )


def check_static(static: bool) -> None:
    """Refuse fixed shapes where transformers asks a cache for counts of the host inside compiled code.

    Raises:
        UnsupportedError: they are asked for, and this version is older than 5.14.
    """
    if static and not ANNOUNCES_DRAFTS:
        raise UnsupportedError(
            f"static=True: transformers {VERSION} reads lengths as numbers inside compiled code, which would make "
            "another graph a token; install transformers 5.14 or later, or leave static out"
        )


def tokens_to_remove(seen: int, argument: int, *, to_length: bool = CROPS_TO_LENGTH) -> int:
    """Return how many of ``seen`` tokens ``crop(argument)`` takes back.

    A negative argument is a number of tokens to remove in every version. A positive one is the length
    to keep, before 5.15; later versions came to refuse it. Zero removes nothing: until 5.13 it was a
    length, too, but assisted decoding never asks for that.

    Args:
        seen: tokens that the cache holds, to transformers.
        argument: of ``crop``.
        to_length: whether a positive argument is a length.

    Raises:
        UsageError: the argument is positive where it must not be, or more would go than was seen.
    """
    if not isinstance(argument, int):
        raise UsageError(f"crop({argument!r}): write a number of tokens to remove, as crop(-1)")
    if argument > 0 and not to_length:
        raise UsageError(f"crop({argument}) is not a number of tokens to remove; write crop(-{argument})")
    removed = max(0, seen - argument) if argument > 0 else -argument
    if removed > seen:
        raise UsageError(f"crop({argument}) would remove {removed} tokens, and the cache has seen {seen}")
    return removed


# Models


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module that runs the layers, to which arguments are passed on.

    In version 4, ``get_decoder()`` of a model whose decoder has an unusual name (GPT-2) is the model.
    """
    found = model.get_decoder()
    return cast("PreTrainedModel", model.base_model) if found is None or found is model else found


def unfit(decoder: nn.Module, config: Any, layers: Sequence[Any]) -> str | None:
    """Return why this version cannot give the model, with these layers of ``DynamicCache``, our cache; or None.

    Before 5.5, models with linear or convolutional layers bring a cache class of their own, and
    ``DynamicCache`` takes each such layer for full attention. MiniMax's own class has stayed.
    """
    here = f"transformers {VERSION}"
    own = _own_cache_class(sys.modules[type(decoder).__module__])
    if own is not None:
        return f"{here} keeps its cache in a class of its own, {own}"
    if len(layers) != config.num_hidden_layers:
        return f"{here} caches {len(layers)} of its {config.num_hidden_layers} layers: some share keys"
    if getattr(config, "index_topk", None) and any(type(layer) is DynamicLayer for layer in layers):
        return f"{here} keeps the keys of its index out of the cache"
    if any(_scales_in_secret(module) for module in decoder.modules()):
        return f"{here} scales logits inside its attention, as scale_attn_weights and the like ask"
    kinds: Collection[str] = getattr(config, "layer_types", None) or ()
    for i, (kind, layer) in enumerate(zip(kinds, layers, strict=False)):
        if type(layer) is DynamicLayer and kind != "full_attention":
            return f"{here} caches its layer {i}, {kind!r}, like full attention"
    return None


def _scales_in_secret(module: nn.Module) -> bool:
    """Return whether attention scales its logits otherwise than it tells (GPT-2 with "eager", before 5.4)."""
    if hasattr(module, "scaling") or not hasattr(module, "scale_attn_weights"):
        return False
    return not module.scale_attn_weights or bool(module.scale_attn_by_inverse_layer_idx)


def _own_cache_class(module: Any) -> str | None:
    """Return the name of a cache of keys and values that a modelling file defines."""
    for name, found in vars(module).items():
        if not isinstance(found, type) or found.__module__ != module.__name__ or issubclass(found, CacheLayerMixin):
            continue
        if name.endswith("Cache") and hasattr(found, "update") and hasattr(found, "get_seq_length"):
            return name
    return None
