"""What policies may ask of a model's weights: output projections and rotary frequencies, or why they cannot be had."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.adapters import planning
from kvpolicy.errors import UnsupportedError
from kvpolicy.view import LayerSpec

__all__ = ["Weights", "rotary_of", "weights_of"]

_NAMES = ("o_proj", "out_proj", "dense")  #: of output projections
_FIXED = ("default", "linear", "llama3", "yarn")  #: kinds of rotary embedding whose frequencies never change
_ROTATES = re.compile(r"^ {8}query_states, key_states = apply_rotary_pos_emb\(", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Weights:
    """Hold the parts of a model whose weights a policy reads.

    Attributes:
        output: the output projection of each layer, empty where nobody asks.
        rotary: ``[D / 2]`` float64, radians a position, or None where nobody asks.
    """

    output: dict[int, nn.Linear]
    rotary: Tensor | None = None

    def output_of(self, layers: Sequence[int], spec: LayerSpec) -> tuple[Tensor, ...] | None:
        """Return the weights of some layers, ``[hidden, Hq, Dv]`` each, the model's own; None where nobody asks.

        Raises:
            UnsupportedError: they are not made for what attention gives.
        """
        if not self.output:
            return None
        found = []
        for layer in layers:
            weight = self.output[layer].weight.detach()
            if weight.shape[1] != spec.num_query_heads * spec.value_dim or weight.device != spec.device:
                raise UnsupportedError(
                    f"the output projection of layer {layer} takes {weight.shape[1]} numbers on {weight.device}, and "
                    f"attention gives {spec.num_query_heads} heads of {spec.value_dim} on {spec.device}"
                )
            found.append(weight.unflatten(1, (spec.num_query_heads, spec.value_dim)))
        return tuple(found)

    def rotary_of(self, spec: LayerSpec) -> Tensor | None:
        """Return the frequencies where the layers are, or None where nobody asks."""
        if self.rotary is not None and 2 * len(self.rotary) != spec.head_dim:
            raise UnsupportedError(f"{2 * len(self.rotary)} numbers are rotated, and a key has {spec.head_dim}")
        return None if self.rotary is None else self.rotary.to(spec.device)


def weights_of(
    decoder: nn.Module, layers: Sequence[int], needs: frozenset[str], *, alone: bool, shapes: bool = False
) -> Weights:
    """Return what policies need of a model's weights.

    Args:
        decoder: of transformers.
        layers: those that evict.
        needs: of the policies.
        alone: the model is not split over processes.
        shapes: the model has no weights, and runs on torch's meta device: whether it could be bound is asked.

    Raises:
        UnsupportedError: the model does not have it in a form that is known here; the message says what.
    """
    asked = needs & planning.WEIGHTS
    if not asked:
        return Weights({})
    name = type(decoder).__name__
    if not alone:
        raise UnsupportedError(
            f"{', '.join(sorted(asked))} of a model that is split over processes is not supported yet"
        )
    attention = {
        int(module.layer_idx): module  # type: ignore[arg-type]
        for module in decoder.modules()
        if getattr(module, "is_causal", False) and isinstance(getattr(module, "layer_idx", None), int)
    }
    if any(layer not in attention or hasattr(attention[layer], "kv_b_proj") for layer in layers):
        raise UnsupportedError(
            f"the policy needs {', '.join(sorted(asked))}, and {name} has layers with latent attention, or attention "
            "of an unknown kind, whose keys and values are not those that a head attends to"
        )
    output = {}
    if "output_projection" in asked:
        output = {layer: _output(attention[layer], f"layer {layer} of {name}", shapes) for layer in layers}
    rotary = rotary_of(decoder, [attention[layer] for layer in layers]) if "rotary" in asked else None
    return Weights(output, rotary)


def _output(module: nn.Module, where: str, shapes: bool) -> nn.Linear:
    """Return the output projection of an attention module."""
    found = next((one for name in _NAMES if isinstance(one := getattr(module, name, None), nn.Module)), None)
    why = None
    if found is None:
        why = f"has none of {', '.join(_NAMES)}"
    elif type(found) is not nn.Linear or type(found.weight) is not nn.Parameter:
        why = f"is quantised or wrapped, a {type(found).__name__}: load the model without, or merge its adapters"
    elif found.weight.is_meta and not shapes:
        why = "waits elsewhere until it runs (offloading): give the model room on a device"
    else:
        asked = getattr(module, "q_proj", None)
        wide = getattr(asked, "out_features", found.in_features)
        if wide != found.in_features:
            why = f"takes {found.in_features} numbers where queries have {wide}: something stands between (a gate)"
    if why is not None:
        raise UnsupportedError(f"the policy needs output_projection, and that of {where} {why}")
    assert isinstance(found, nn.Linear)
    return found


@torch.no_grad()
def rotary_of(decoder: nn.Module, attention: Sequence[nn.Module]) -> Tensor:
    """Return by how many radians a position turns each pair of elements, ``[D / 2]`` float64.

    That the model turns them so is not believed, but tried: its own function must agree.

    Raises:
        UnsupportedError: positions do something else in this model.
    """
    name = type(decoder).__name__
    embeddings = [module for module in decoder.modules() if hasattr(module, "inv_freq")]
    config: Any = getattr(decoder, "config", None)
    why = None
    if len(embeddings) != 1:
        why = f"has {len(embeddings)} rotary embeddings, where one is known"
    elif (kind := getattr(embeddings[0], "rope_type", "default")) not in _FIXED:
        why = f"has rotary embeddings of the kind {kind!r}, whose frequencies are not fixed"
    elif "mrope_section" in repr(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)):
        why = "counts positions in several directions"
    elif not all(_ROTATES.search(_source(type(module))) for module in attention):
        why = "does not rotate queries and keys in every layer, or in a way of its own"
    else:
        embeddings = [_with_numbers(embeddings[0])]
        why = _disagrees(embeddings[0], attention[0])
    if why is not None:
        raise UnsupportedError(f"the policy needs rotary, plain rotary embeddings of whole keys, and {name} {why}")
    return embeddings[0].inv_freq.detach().to(torch.float64)  # type: ignore[operator]


def _source(kind: type[nn.Module]) -> str:
    """Return the source of a module's ``forward``, nothing where it cannot be had: it was typed in, or compiled."""
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""


def _with_numbers(embedding: Any) -> Any:
    """Return a rotary embedding whose frequencies can be read: of a model without weights, one made anew."""
    if not embedding.inv_freq.is_meta:
        return embedding
    with torch.device("cpu"):
        return type(embedding)(embedding.config)


def _disagrees(embedding: Any, module: nn.Module) -> str | None:
    """Return what is different about how a model turns its queries, or None."""
    turn = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    frequencies = embedding.inv_freq.detach().to(torch.float64)
    dim, device = getattr(module, "head_dim", 2 * len(frequencies)), frequencies.device
    if turn is None or frequencies.dim() != 1:
        return "has no apply_rotary_pos_emb, or several kinds of frequencies"
    if dim != 2 * len(frequencies):
        return f"rotates {2 * len(frequencies)} of the {dim} numbers of a key"
    positions = torch.tensor([[0, 1, 7, 50]], device=device)
    x = torch.linspace(-1, 2, 4 * dim, device=device).view(1, 1, 4, dim)
    try:
        found = turn(x, x, *embedding(x, positions))[0].to(torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return "takes its rotary embeddings in a way of its own"
    angles = positions[0, :, None] * frequencies
    first, second = x.to(torch.float64).chunk(2, -1)
    expected = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    scale = float(getattr(embedding, "attention_scaling", 1.0))
    same = torch.allclose(found, torch.cat(expected, -1) * scale, atol=1e-3)
    return None if same else "turns other pairs of elements"
