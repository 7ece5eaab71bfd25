"""Bind a model: find the layers that can evict, refuse what cannot be right, and undo it all."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from kvpolicy.adapters.hf.attention import CACHE, SUPPORTED, register
from kvpolicy.errors import UnsupportedError

__all__ = ["Binding", "Survey", "bind", "survey"]


_UNBOUNDED = 2**30  #: tokens that a static sliding layer may see: its window is what bounds it


@dataclass(frozen=True)
class Survey:
    """Say what a model's layers are.

    Attributes:
        layers: a fresh cache layer for each, as transformers makes them.
        evicting: indices of the full-attention layers.
        skipped: the others, and what they are.
        groups: the evicting layers by the device that they run on.
    """

    layers: list[Any]
    evicting: tuple[int, ...]
    skipped: dict[int, str]
    groups: tuple[tuple[int, ...], ...]


def survey(model: nn.Module, *, static: bool = False) -> Survey:
    """Return what the layers of a model are.

    Args:
        model: of transformers.
        static: layers left alone have fixed shapes, too.

    Raises:
        UnsupportedError: this model cannot evict correctly; the message says why.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"EvictionCache takes a transformers model, found {type(model).__name__}")
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise UnsupportedError(f"{name} is an encoder-decoder; only decoders are supported")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedError(f"{name} caches latents (multi-head latent attention), which is not supported yet")
    if not any(getattr(module, "is_causal", False) for module in model.modules()):
        raise UnsupportedError(
            f"{name} attends in both directions, or its attention does not use transformers' AttentionInterface; "
            "only decoders that do are supported"
        )
    layers = list(DynamicCache(config=config).layers)
    evicting = tuple(i for i, layer in enumerate(layers) if type(layer) is DynamicLayer)
    skipped = {i: type(layer).__name__ for i, layer in enumerate(layers) if i not in evicting}
    if static:  # layers allocate when the first tokens come, so those that evict never do
        layers = list(StaticCache(config=config, max_cache_len=_UNBOUNDED).layers)
    for i, kind in skipped.items():
        if ("Sliding" not in kind and "Linear" not in kind) or "And" in kind:
            raise UnsupportedError(f"layer {i} of {name} is a {kind}, which is not supported yet")
    if not evicting:
        kinds = ", ".join(sorted(set(skipped.values()))) or "nothing that transformers' DynamicCache knows"
        raise UnsupportedError(f"{name} has no full-attention layer to evict from; its layers are {kinds}")
    devices: dict[str, list[int]] = {}
    homes = _devices(model)
    for i in evicting:
        devices.setdefault(str(homes.get(i, model.device)), []).append(i)
    return Survey(layers, evicting, skipped, tuple(tuple(group) for group in devices.values()))


def _devices(model: nn.Module) -> dict[int, torch.device]:
    """Return the device of each attention module, by the index of its layer."""
    found: dict[int, torch.device] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        parameter = next(module.parameters(), None)
        if isinstance(index, int) and parameter is not None:
            found.setdefault(index, parameter.device)
    return found


@dataclass(eq=False)
class Binding:
    """Hold what binding changed on one model, until the last cache lets go."""

    decoder: PreTrainedModel
    original: str
    users: int = 0
    handles: list[Any] = field(default_factory=list)

    def acquire(self) -> None:
        """Count one more cache, and bind for the first.

        Raises:
            UnsupportedError: the model's attention cannot be chosen.
        """
        if self.users == 0:
            name = register(self.original)
            self.decoder.set_attn_implementation(name)
            if self.decoder.config._attn_implementation != name:  # transformers only warns
                _bindings.pop(self.decoder, None)
                raise UnsupportedError(
                    f"{type(self.decoder).__name__} has an attention of its own, which does not use transformers' "
                    "AttentionInterface"
                )
            self.handles = [
                self.decoder.register_forward_pre_hook(_before, with_kwargs=True),
                self.decoder.register_forward_hook(_after, with_kwargs=True),
            ]
        self.users += 1

    def release(self) -> None:
        """Count one cache less, and restore the model after the last."""
        self.users -= 1
        if self.users == 0:
            for handle in self.handles:
                handle.remove()
            self.handles = []
            self.decoder.set_attn_implementation(self.original)
            _bindings.pop(self.decoder, None)  # the value holds its key


_bindings: weakref.WeakKeyDictionary[nn.Module, Binding] = weakref.WeakKeyDictionary()


def bind(model: PreTrainedModel) -> Binding:
    """Return the binding of a model, made when the first cache asks.

    Raises:
        UnsupportedError: the model uses an attention that evicting layers cannot stand in for.
    """
    decoder = model.get_decoder()
    decoder = model if decoder is None else decoder
    binding = _bindings.get(decoder)
    if binding is None or binding.users == 0:
        original = decoder.config._attn_implementation
        if original not in SUPPORTED:
            raise UnsupportedError(
                f"{type(model).__name__} uses attn_implementation={original!r}; load it with "
                "attn_implementation='sdpa', which runs FlashAttention-2 kernels on a GPU, or 'eager'"
            )
        if not _passes_keywords(decoder.forward):
            raise UnsupportedError(f"{type(decoder).__name__}.forward hands no keywords to its attention")
        binding = _bindings[decoder] = Binding(decoder, original)
    return binding


def _passes_keywords(function: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward pass by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    arguments = _arguments(module, args, kwargs)
    cache = arguments.get("past_key_values")
    if not isinstance(cache, Evicting):
        return None
    cache.begin(module, arguments)
    return args, {**kwargs, CACHE: cache}


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = kwargs.get(CACHE)
    if isinstance(cache, Evicting):
        cache.finish()


class Evicting:
    """Be what the hooks ask of a cache, once before and once after each forward pass."""

    def begin(self, decoder: nn.Module, arguments: dict[str, Any]) -> None:
        """Open a step."""
        raise NotImplementedError

    def finish(self) -> None:
        """Make the step count, and evict where it is due."""
        raise NotImplementedError
