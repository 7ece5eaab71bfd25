"""Tensor parallelism: which of a model's heads this process has, and whether all processes agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, distributed
from transformers import PreTrainedModel

from kvpolicy import Constant, LastQuery, Policy, Prompt, Recency, Sinks, TopK
from kvpolicy.adapters.summing import summed
from kvpolicy.errors import KVPolicyError, UnsupportedError
from kvpolicy.policy import EvictionPolicy

__all__ = ["Ranks", "kept_alike", "ranks_of", "said"]

_KEYS = ("k_proj", "qkv_proj", "query_key_value")  #: projections whose output holds keys, fused or not
_SAME_FOR_ALL_HEADS = (Constant, LastQuery, Prompt, Recency, Sinks, TopK)


@dataclass(frozen=True, eq=False)
class Ranks:
    """Say which of the processes that share a model this one is.

    Attributes:
        size: processes; 1 without tensor parallelism.
        index: of this one, from 0.
        total: KV heads of the model.
        split: whether each process has KV heads of its own; otherwise each has all of them.
        group: how they reach each other, None for a single one.
    """

    size: int = 1
    index: int = 0
    total: int = 0
    split: bool = False
    group: Any = None

    def heads(self, local: int) -> tuple[int, int]:
        """Return the KV heads of the model, and the index of this process's first one.

        Args:
            local: KV heads that a layer has here.

        Raises:
            UnsupportedError: they are not the share that the model's plan gives.
        """
        if self.size == 1:
            return local, 0
        share = self.total // self.size if self.split else self.total
        if local != share:
            raise UnsupportedError(
                f"a layer has {local} KV heads on rank {self.index}, and {share} of {self.total} were expected there; "
                "tensor parallelism is supported as transformers' tp_plan='auto' splits a model"
            )
        return self.total, self.index * share if self.split else 0

    @property
    def all_reduce(self) -> Callable[[Tensor], Tensor] | None:
        """Return what sums a tensor over the processes, or None where each has all heads."""
        return partial(summed, group=self.group) if self.split else None

    def insist(self, mine: Mapping[str, Any], error: type[KVPolicyError]) -> None:
        """Compare what each process has; every one of them must call it.

        Args:
            mine: what this one has, by name: numbers, texts, tuples.
            error: to raise, on every process, so that none waits for another.

        Raises:
            KVPolicyError: two processes have something else; the message says which, and what.
        """
        if self.size == 1:
            return
        every: list[Any] = [None] * self.size
        distributed.all_gather_object(every, dict(mine), group=self.group)
        for name in dict.fromkeys(name for one in every for name in one):
            found = [one.get(name) for one in every]
            other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
            if other is not None:
                raise error(
                    f"the ranks of a model must agree on {name}; on rank 0 it is {found[0]!r}, "
                    f"and on rank {other} {found[other]!r}"
                )


def ranks_of(model: PreTrainedModel) -> Ranks:
    """Return which part of the heads this process has.

    Raises:
        UnsupportedError: the model is split in a way in which evictions cannot be right.
    """
    name, size = type(model).__name__, getattr(model, "tp_size", None) or 1
    mesh: Any = getattr(model, "_device_mesh", None)
    dimensions = getattr(mesh, "mesh_dim_names", None) or ()
    if "pp" in dimensions and mesh.size(dimensions.index("pp")) > 1:
        raise UnsupportedError(
            f"{name} is split into stages (pp_size); split its heads (tp_size), or place its layers by a device_map"
        )
    if size == 1:
        if _split_by_others(model):
            raise UnsupportedError(
                f"{name} holds parts of its parameters, and does not say whose heads these are; load it with "
                "from_pretrained(..., tp_plan='auto') under torchrun"
            )
        return Ranks()
    config = model.config.get_text_config(decoder=True)
    total = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    plan = getattr(model, "tp_plan", None) or {}
    split = any(rule.rsplit(".", 1)[-1] in _KEYS and style == "colwise" for rule, style in plan.items())
    if split and total % size:
        fitting = [str(n) for n in range(1, total + 1) if total % n == 0]
        raise UnsupportedError(
            f"{name} has {total} KV heads, which {size} processes cannot share evenly; start {' or '.join(fitting)}"
        )
    along = "tp" if "tp" in dimensions else None
    return Ranks(size, mesh.get_local_rank(along), total, split, mesh.get_group(along))


def _split_by_others(model: PreTrainedModel) -> bool:
    """Return whether something other than transformers has split parameters over processes."""
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return False
    from torch.distributed.fsdp import FSDPModule

    # FSDP gathers parameters before each forward pass: every process has all heads then.
    return not any(isinstance(module, FSDPModule) for module in model.modules())


def said(value: Any) -> Any:
    """Return a small value that differs, in all likelihood, where a tensor's integers or shape do."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    # Floats may be computed on each process, and need not agree to the last bit.
    content = 0 if value.is_floating_point() else hash(tuple(value.flatten().tolist()))
    return tuple(value.shape), content


def kept_alike(policies: Sequence[EvictionPolicy], ranks: Ranks, kept: dict[int, Tensor]) -> dict[int, int]:
    """Return, for each layer, a number that must be the same on every process; none where heads may differ.

    Where each process has all heads, every head must keep the same there. Where heads are split,
    they may differ, unless every stage gives all heads the same.

    Args:
        policies: what decided.
        ranks: who decided.
        kept: ``[requests, H, slots]`` positions of each layer.
    """
    if not ranks.split:
        return {layer: hash(said(positions)) for layer, positions in kept.items()}
    for policy in policies:
        if not isinstance(policy, Policy) or any(type(stage) not in _SAME_FOR_ALL_HEADS for stage in policy.stages):
            return {}
    distinct = {layer: positions.unique(dim=1) for layer, positions in kept.items()}
    return {layer: hash(said(positions)) for layer, positions in distinct.items()}
