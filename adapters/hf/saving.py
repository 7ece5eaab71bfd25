"""A cache in a file: :func:`save` and :func:`load`, which :class:`EvictionCache` offers as methods."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.adapters import planning
from kvpolicy.adapters.hf import others
from kvpolicy.adapters.hf.group import Group
from kvpolicy.errors import KVPolicyError, UsageError
from kvpolicy.grammar import parse_policy
from kvpolicy.policy import EvictionPolicy
from kvpolicy.row import Row
from kvpolicy.store import Store
from kvpolicy.view import LayerSpec

if TYPE_CHECKING:
    from kvpolicy.adapters.hf.cache import EvictionCache

__all__ = ["load", "save"]

_FORMAT = 1
_KEY = "kvpolicy"


def save(cache: EvictionCache, path: str | os.PathLike[str]) -> None:
    """Write what a cache holds into a safetensors file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    groups = []
    for number, group in enumerate(cache.groups):
        if group.store is None:
            raise UsageError("no token has been seen yet: there is nothing to save")
        groups.append(_written(group, group.store, f"groups.{number}", tensors))
    what = {
        "format": _FORMAT,
        "transformers": transformers.__version__,
        "model": _fingerprint(cache.model),
        "policies": [planning.policy_text(policy) for policy in cache.policies],
        "options": cache.options,
        "columns": cache.columns,
        "last": cache.last.tolist() if isinstance(cache.last, Tensor) else cache.last,
        "groups": groups,
        "layers": {
            str(i): others.written(layer, f"layers.{i}", tensors)
            for i, layer in enumerate(cache.layers)
            if not cache.holds(i)
        },
    }
    target = Path(path)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, unfinished, {_KEY: json.dumps(what)}
        )
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _written(group: Group, store: Store, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    store.settle()
    used = slice(0, store.longest)
    tensors |= {
        f"{prefix}.keys": store.keys[..., used, :],
        f"{prefix}.values": store.values[..., used, :],
        f"{prefix}.positions": store.positions[..., used],
        f"{prefix}.order": store.order,
        f"{prefix}.queries": store.window.queries,
        f"{prefix}.query_positions": store.window.positions,
        f"{prefix}.broken": store.broken,
    }
    for b, band in enumerate(store.bands):
        tensors |= {f"{prefix}.bands.{b}.{n}": tensor for n, tensor in enumerate(band.tensors())}
    return {
        "layers": group.layers,
        "plans": [dataclasses.asdict(plan) for plan in group.plans],
        "rows": [dataclasses.asdict(row) for row in store.rows],
        "at": store.window.at,
        "heads": store.spec.num_heads,
        "query_heads": store.spec.num_query_heads,
        "query_dim": store.spec.query_dim,
        "values_in_keys": store.spec.values_in_keys,
        "turn_nbytes": group.turn_nbytes,
        "logits": {
            str(layer): {name: value for name, value in logits.items() if name != "s_aux"}
            for layer, logits in group.logits.items()
        },
    }


def load(
    kind: type[EvictionCache],
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    policy: EvictionPolicy | Sequence[EvictionPolicy] | None,
) -> EvictionCache:
    """Return the cache that :func:`save` wrote, bound to the same model."""
    what, tensors = _opened(path)
    known, found = what["model"], _fingerprint(model)
    for name, value in known.items():
        if found[name] != value:
            differ = f"its {name} is {value}, and this model's is {found[name]}"
            if name == "configuration":
                old, new = json.loads(value), json.loads(found[name])
                differ = "; ".join(
                    f"its {k} is {old[k]}, and this model's is {new[k]}" for k in old if old[k] != new[k]
                )
            raise UsageError(
                f"{path} was saved with another model: " + ("its weights differ" if name == "weights" else differ)
            )
    cache = kind(model, _policies(path, what["policies"], policy), **what["options"])
    try:
        _fill(cache, path, what, tensors)
    except BaseException:
        cache.unbind()
        raise
    return cache


def _opened(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise UsageError(f"{path} is no cache: EvictionCache.save() has not written it")
            what = json.loads(metadata[_KEY])
            if what["format"] != _FORMAT:
                raise UsageError(
                    f"{path} has format {what['format']}, and this version of kvpolicy reads format {_FORMAT}"
                )
            return what, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}") from error


def _policies(
    path: str | os.PathLike[str], texts: list[str], given: EvictionPolicy | Sequence[EvictionPolicy] | None
) -> EvictionPolicy | list[EvictionPolicy]:
    if given is None:
        try:
            policies = [parse_policy(text) for text in texts]
        except KVPolicyError as error:
            raise UsageError(f"{path} was saved under {' and '.join(texts)}; give that as policy=...") from error
        return policies if len(policies) > 1 else policies[0]
    policies = list(given) if isinstance(given, Sequence) else [given]
    mine = [planning.policy_text(policy) for policy in policies]
    if mine != texts:
        raise UsageError(
            f"{path} was saved under {' and '.join(texts)}, and policy is {' and '.join(mine)}; leave policy out"
        )
    return policies if len(policies) > 1 else policies[0]


def _fill(cache: EvictionCache, path: Any, what: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    groups = _grouped(cache.groups, [held["layers"] for held in what["groups"]])
    if groups is None:
        raise UsageError(f"{path} holds layers that were on other devices: load the model as it was, then the cache")
    cache.hold(groups)
    plans = [[dataclasses.asdict(plan) for plan in group.plans] for group in cache.groups]
    if plans != [held["plans"] for held in what["groups"]]:
        raise UsageError(
            f"{path} was saved with {[held['plans'] for held in what['groups']]}, and the plan is now {plans}"
        )
    if what["layers"] and what["transformers"] != transformers.__version__:
        raise UsageError(
            f"{path} holds layers of transformers {what['transformers']}, and this is {transformers.__version__}, "
            "which may keep them otherwise"
        )
    for number, (group, held) in enumerate(zip(cache.groups, what["groups"], strict=True)):
        group.turn_nbytes = held["turn_nbytes"]
        group.logits = {
            int(layer): {**logits, "s_aux": _sinks(cache.model, int(layer))} for layer, logits in held["logits"].items()
        }
        group.store = _read(cache, group, held, f"groups.{number}", tensors)
    for i, layer in what["layers"].items():
        others.read(cache.layers[int(i)], layer, tensors, cache.model.device)
    last = what["last"]
    last = torch.tensor(last, device=cache.model.device) if isinstance(last, list) else last
    cache.continue_at(what["columns"], last)


def _grouped(groups: Sequence[Group], layers: list[list[int]]) -> list[Group] | None:
    """Return groups of these layers, parts of those given, or None where a group would cross two of them.

    A fork of some rows keeps groups apart that a cache made for these rows alone holds together.
    """
    if sorted(itertools.chain(*layers)) != sorted(layer for group in groups for layer in group.layers):
        return None
    found = [group.part(some) for some in layers for group in groups if {*some} <= {*group.layers}]
    return found if len(found) == len(layers) else None


def _read(cache: EvictionCache, group: Group, held: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> Store:
    def given(name: str) -> Tensor:
        return tensors[f"{prefix}.{name}"]

    keys, rows = given("keys"), [Row(**row) for row in held["rows"]]
    capacity = max(group.capacity + cache.max_draft_tokens, keys.shape[3])
    sizes = (held["heads"], held["query_heads"], keys.shape[-1], given("values").shape[-1], capacity)
    spec = LayerSpec(*sizes, keys.dtype, group.device, held["query_dim"], held["values_in_keys"])
    store = cache.allocate(group, spec, rows)
    used = keys.shape[3]
    store.keys[..., :used, :].copy_(keys)
    store.values[..., :used, :].copy_(given("values"))
    store.positions[..., :used].copy_(given("positions"))
    store.order.copy_(given("order"))
    store.window.queries.copy_(given("queries"))
    store.window.positions.copy_(given("query_positions"))
    store.window.at = list(held["at"])
    store.broken.copy_(given("broken"))
    for b, band in enumerate(store.bands):
        for n, tensor in enumerate(band.tensors()):
            tensor.copy_(given(f"bands.{b}.{n}"))
    return store


def _sinks(model: PreTrainedModel, layer: int) -> Tensor | None:
    """Return the sink logits of a layer, which are weights of the model."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) == layer and hasattr(module, "sinks"):
            return cast(Tensor, module.sinks)
    return None


def _fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """Return what tells a model from another: its kind, what its keys depend on, and some of its weights."""
    config = model.config.get_text_config(decoder=True)
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "layer_types",
             "sliding_window", "rope_theta", "rope_scaling", "rope_parameters", "head_dim")  # fmt: skip
    given, digest = config.to_dict(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].to(torch.float32).cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return {
        "class": type(model).__name__,
        "configuration": json.dumps({name: given.get(name) for name in names}, default=str),
        "dtype": str(model.dtype),
        "weights": digest.hexdigest(),
    }
