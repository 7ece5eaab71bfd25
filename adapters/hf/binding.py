"""Bind a model: find the layers that can evict, refuse what cannot be right, and undo it all."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from kvpolicy.adapters.hf import compat
from kvpolicy.adapters.hf.attention import CACHE, SUPPORTED, register
from kvpolicy.adapters.hf.latent import Latent, latents_of
from kvpolicy.adapters.hf.ranks import Ranks, ranks_of
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
        groups: the evicting layers of each device that they run on.
        ranks: the processes that share the heads.
        latents: how layers expand their latents, where that is what they cache.
        sharing: query heads that share a KV head, of each layer.
        num_heads: KV heads of a layer, if the configuration tells one number.
    """

    layers: list[Any]
    evicting: tuple[int, ...]
    skipped: dict[int, str]
    groups: dict[torch.device, tuple[int, ...]]
    ranks: Ranks
    latents: dict[int, Latent]
    sharing: dict[int, int]
    num_heads: int | None


_LEFT_ALONE = ("SlidingWindowLayer", "LinearAttentionLayer", "DummyLayer")  #: kinds of layers that need no eviction
_WHY = {
    "Indexed": "picks the tokens that it attends to by an index of its own",
    "And": "attends and is recurrent at once",
}


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
    if getattr(config, "cross_attention_layers", None):
        raise UnsupportedError(f"{name} has cross-attention layers, whose keys are no tokens; they cannot evict")
    if getattr(config, "num_kv_shared_layers", 0) or "reuse" in (getattr(config, "kv_sharing_modes", None) or []):
        raise UnsupportedError(
            f"{name} has layers that attend to the keys of another layer (KV sharing), which is not supported yet"
        )
    decoder = compat.decoder_of(model)
    if not decoder._can_set_attn_implementation():
        raise UnsupportedError(
            f"{type(decoder).__name__} does not take its attention from transformers' AttentionInterface, as old "
            "models and models with ALiBi do not; nothing can stand in for it"
        )
    if not any(getattr(module, "is_causal", False) for module in decoder.modules()):
        raise UnsupportedError(
            f"{name} has no attention that is said to be causal: it attends in both directions, or masks by a rule of "
            "its own, or does not attend at all; only causal decoders are supported"
        )
    layers = list(DynamicCache(config=config).layers)
    why = compat.unfit(decoder, config, layers)
    if why is not None:
        raise UnsupportedError(f"{name}: {why}; kvpolicy extends DynamicCache, which other versions may use for it")
    evicting = tuple(i for i, layer in enumerate(layers) if type(layer) is DynamicLayer)
    skipped = {i: type(layer).__name__ for i, layer in enumerate(layers) if i not in evicting}
    if static:  # layers allocate when the first tokens come, so those that evict never do
        layers = list(StaticCache(config=config, max_cache_len=_UNBOUNDED).layers)
    for i, kind in skipped.items():
        if not any(kind.endswith(known) for known in _LEFT_ALONE) or "And" in kind:
            why = next((why for part, why in _WHY.items() if part in kind), "keeps its keys in a way unknown here")
            raise UnsupportedError(f"layer {i} of {name} is a {kind}, which {why}; this is not supported yet")
    if not evicting:
        kinds = ", ".join(sorted(set(skipped.values()))) or "nothing that transformers' DynamicCache knows"
        raise UnsupportedError(f"{name} has no full-attention layer to evict from; its layers are {kinds}")
    devices: dict[torch.device, list[int]] = {}
    homes = _devices(model)
    for i in evicting:
        devices.setdefault(homes.get(i, model.device), []).append(i)
    groups = {device: tuple(group) for device, group in devices.items()}
    heads = config.to_dict().get("num_key_value_heads")  # some families have one number a layer
    heads = heads if isinstance(heads, int) and not latents_of(decoder) else None
    return Survey(layers, evicting, skipped, groups, ranks_of(model), latents_of(decoder), _sharing(decoder), heads)


def _sharing(decoder: nn.Module) -> dict[int, int]:
    """Return how many query heads share a KV head, 1 for models without grouped heads, by layer."""
    attention = [module for module in decoder.modules() if getattr(module, "is_causal", False)]
    return {
        index: int(getattr(module, "num_key_value_groups", 1))
        for module in attention
        if isinstance(index := getattr(module, "layer_idx", None), int)
    }


def _devices(model: nn.Module) -> dict[int, torch.device]:
    """Return the device that each attention module runs on, by the index of its layer."""
    found: dict[int, torch.device] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        parameter = next(module.parameters(), None)
        if isinstance(index, int) and parameter is not None:
            found.setdefault(index, _runs_on(module) or parameter.device)
    return found


def _runs_on(module: nn.Module) -> torch.device | None:
    """Return where accelerate runs a module, whose weights may wait elsewhere; None where it has no say."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    named = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((one for one in named if one is not None), None)
    return None if device is None else torch.device(device)


@dataclass(eq=False)
class Binding:
    """Hold what binding changed on one model, until the last cache lets go."""

    decoder: PreTrainedModel
    original: str
    around: nn.Module | None = None  #: what calls the decoder with masks of its own making
    users: int = 0
    handles: list[Any] = field(default_factory=list)

    def acquire(self) -> None:
        """Count one more cache, and bind for the first."""
        if self.users == 0:
            self.decoder.set_attn_implementation(register(self.original))
            self.handles = [
                self.decoder.register_forward_pre_hook(_before, with_kwargs=True),
                self.decoder.register_forward_hook(_after, with_kwargs=True),
            ]
            if self.around is not None:
                self.handles.append(self.around.register_forward_pre_hook(_around, with_kwargs=True))
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
    decoder = compat.decoder_of(model)
    binding = _bindings.get(decoder)
    if binding is None or binding.users == 0:
        original = decoder.config._attn_implementation
        if original.startswith("kvpolicy"):
            raise UnsupportedError(
                f"this {type(model).__name__} was copied while another one was bound, and attends like that one; write "
                "model.set_attn_implementation('sdpa') first"
            )
        if original not in SUPPORTED:
            raise UnsupportedError(
                f"{type(model).__name__} uses attn_implementation={original!r}; load it with "
                "attn_implementation='sdpa', which runs FlashAttention-2 kernels on a GPU, or 'eager'"
            )
        if not _passes_keywords(decoder.forward):
            raise UnsupportedError(f"{type(decoder).__name__}.forward hands no keywords to its attention")
        around = model.base_model
        binding = _bindings[decoder] = Binding(decoder, original, None if around is decoder else around)
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
    caches = compat.caches_of(arguments)
    for cache in caches:
        if isinstance(cache, Evicting):
            cache.begin(module, arguments)
            return args, {**kwargs, CACHE: cache}
    if not all(isinstance(cache, Cache) for cache in caches):
        raise UnsupportedError(
            "continuous batching (generate_batch) keeps keys in pages of its own, where nothing is evicted; "
            "unbind() the EvictionCache, or give it to generate()"
        )
    return None


def _around(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arguments = _arguments(module, args, kwargs)
    for cache in compat.caches_of(arguments):
        if isinstance(cache, Evicting):
            cache.told(arguments.get("attention_mask"))


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = kwargs.get(CACHE)
    if isinstance(cache, Evicting):
        cache.finish()


class Evicting:
    """Be what the hooks ask of a cache, once before and once after each forward pass."""

    def told(self, mask: Any) -> None:
        """Remember the attention mask that the model around the decoder was given."""
        raise NotImplementedError

    def begin(self, decoder: nn.Module, arguments: dict[str, Any]) -> None:
        """Open a step."""
        raise NotImplementedError

    def finish(self) -> None:
        """Make the step count, and evict where it is due."""
        raise NotImplementedError
