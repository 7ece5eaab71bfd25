"""What a model's configuration tells of its cache, without its weights: :func:`read_shape`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from kvpolicy.cli.errors import CommandError
from kvpolicy.errors import KVPolicyError, one_line
from kvpolicy.loading import source_of
from kvpolicy.policy import EvictionPolicy
from kvpolicy.quiet import silent
from kvpolicy.view import LayerSpec

__all__ = ["ModelShape", "read_shape"]


@dataclass(frozen=True, eq=False)
class ModelShape:
    """Say what a model's layers cache.

    Attributes:
        name: what the user calls it.
        model: on torch's meta device: shapes, and no weights.
        layers: sizes of those that evict, in order.
        skipped: layers that do not, and what they are.
        weights: bytes of all weights.
        parameters: how many numbers these are.
        positions: tokens that it was trained for, if the configuration tells.
    """

    name: str
    model: Any
    layers: tuple[LayerSpec, ...]
    skipped: dict[int, str]
    weights: int
    parameters: int
    positions: int | None

    @property
    def num_heads(self) -> int | None:
        """Return the KV heads of each layer that evicts, if that is one number."""
        heads = {layer.num_heads for layer in self.layers}
        return heads.pop() if len(heads) == 1 else None

    @property
    def hidden(self) -> int | None:
        """Return how many numbers a layer's output has, if the configuration tells."""
        found = getattr(self.model.config.get_text_config(decoder=True), "hidden_size", None)
        return found if isinstance(found, int) else None

    def refusal(self, policy: EvictionPolicy, max_new_tokens: int) -> str | None:
        """Return why the transformers adapter cannot bind this model to a policy, or None where it can."""
        from kvpolicy.adapters.hf import EvictionCache

        try:
            with EvictionCache(self.model, policy, max_new_tokens=max_new_tokens):
                return None
        except KVPolicyError as error:
            return str(error)


def read_shape(name: str, dtype: torch.dtype | None = None) -> ModelShape:
    """Read the configuration of a model, and nothing else.

    Args:
        name: a folder, or a model's name on the hub.
        dtype: of weights, keys and values; the configuration's where None.

    Raises:
        CommandError: the configuration does not tell what the layers cache.
        LoadError: there is no such model.
        OfflineError: the hub cannot be reached.
        UnsupportedError: the transformers adapter refuses this model.
    """
    source, options = source_of(name)
    try:
        with silent(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.from_pretrained(source, **options)
            text = config.get_text_config(decoder=True)
            found = dtype or getattr(text, "dtype", None) or torch.float32
            make: Any = AutoModelForCausalLM.from_config
            with torch.device("meta"):
                model = make(config, dtype=torch.bfloat16).eval()
            return _shape(name, model, text, found)
    except KVPolicyError:
        raise
    except Exception as error:  # transformers, and models run without weights, raise what they like
        raise CommandError(
            f"the configuration of {name} does not tell what its layers cache: {one_line(error)}"
        ) from error


def _shape(name: str, model: Any, config: Any, dtype: torch.dtype) -> ModelShape:
    from transformers import DynamicCache

    from kvpolicy.adapters.hf import binding

    found = binding.survey(model)
    # One token, in bfloat16, which every layer computes: what comes into the cache is what the cache holds.
    cache: Any = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64, device="meta"), past_key_values=cache, use_cache=True)
    layers = []
    for index in found.evicting:
        (_, heads, _, dim), value_dim = cache.layers[index].keys.shape, cache.layers[index].values.shape[-1]
        device, latent = torch.device("meta"), found.latents.get(index)
        if latent is None:
            layers.append(LayerSpec(heads, heads * found.sharing.get(index, 1), dim, value_dim, 0, dtype, device))
        else:  # the latent, and behind it what is rotated
            sizes = (heads, latent.heads, dim + value_dim, dim, 0)
            query_dim = latent.plain + value_dim
            layers.append(LayerSpec(*sizes, dtype, device, query_dim=query_dim, values_in_keys=True))
    count = sum(parameter.numel() for parameter in model.parameters())
    positions = getattr(config, "max_position_embeddings", None)
    return ModelShape(
        name,
        model,
        tuple(layers),
        found.skipped,
        count * dtype.itemsize,
        count,
        positions if isinstance(positions, int) else None,
    )
