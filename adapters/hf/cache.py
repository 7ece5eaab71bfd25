"""The cache that transformers is given: :class:`EvictionCache`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvpolicy import _check
from kvpolicy.adapters.hf import binding
from kvpolicy.adapters.hf.attention import AttentionFunction, one_token, several_tokens
from kvpolicy.adapters.hf.layer import EvictionLayer
from kvpolicy.adapters.hf.step import Group, Step, open_step
from kvpolicy.errors import BindError, UnsupportedError, UsageError
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec, Plan, Policy
from kvpolicy.receipt import Receipt
from kvpolicy.stage import Chain, Stage
from kvpolicy.view import DEFAULT_WORKSPACE

__all__ = ["EvictionCache"]

_OFFERS = frozenset({"queries", "every_query", "cross_heads"})


class EvictionCache(Cache):
    """Keep a fixed number of key-value pairs for each head, and forget the rest as a policy says.

    Pass it as ``past_key_values`` to the model that it is bound to, or to ``model.generate()``.
    While bound, the model uses an attention function of kvpolicy; with an ordinary cache, or none,
    it gives what it gave before. Leaving a ``with`` block, or :meth:`unbind`, restores the model.

    Only full-attention layers evict; sliding-window and linear layers are left alone. The prompt
    is attended in full: a prompt beyond the capacity exists for one layer at a time.

    Args:
        model: a decoder of transformers.
        policy: what to keep; any :class:`~kvpolicy.EvictionPolicy`.
        max_new_tokens: tokens decoded at most, needed by policies that evict at the end of a turn
            only (``interval=None``), whose slots must hold them all.
        seeds: of each request's randomness; all 0 by default, so that a row of a batch equals its
            own single run.
        requests: names of the requests, integers that key randomness beside the seeds; all 0 by
            default.
        workspace: bytes that the temporaries of one eviction may take.

    Raises:
        BudgetError: guards and recent tokens do not fit into the budget.
        UnsupportedError: this model, or this policy, cannot run correctly here.

    Example::

        with EvictionCache(model, vase(256)) as cache:
            tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=1000)
            print(cache.receipt())
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: EvictionPolicy,
        *,
        max_new_tokens: int | None = None,
        seeds: Sequence[int] | None = None,
        requests: Sequence[int] | None = None,
        workspace: int = DEFAULT_WORKSPACE,
    ) -> None:
        found = binding.survey(model)
        _check.integer("EvictionCache", "workspace", workspace, 1)
        self.policy, self.workspace = _checked(policy), workspace
        self.sharing = found.sharing
        self._seeds, self._requests = _integers("seeds", seeds), _integers("requests", requests)
        plans = policy.plan(ModelSpec(len(found.evicting), max_new_tokens))
        by_layer = _by_layer(plans, found.evicting)
        self.skipped = {
            **found.skipped,
            **{i: "left alone by its budget" for i, p in by_layer.items() if p is None},
        }
        self.groups = [
            Group(tuple(same), plan, latents={i: found.latents[i] for i in same if i in found.latents})
            for group in found.groups
            for plan, same in _by_plan(group, by_layer).items()
        ]
        self._group_of = {layer: group for group in self.groups for layer in group.layers}
        if not self._group_of:
            raise UnsupportedError(
                f"{policy!r} leaves every layer of {type(model).__name__} alone: nothing would evict"
            )
        layers: list[Any] = [
            EvictionLayer(self, i) if i in self._group_of else layer for i, layer in enumerate(found.layers)
        ]
        super().__init__(layers=layers)
        self.columns = 0
        self.last: Tensor | None = None
        self._step: Step | None = None
        self._told: tuple[Any] | None = None
        self._failed = False
        self._decoder_binding = binding.bind(model)
        self._decoder_binding.acquire()
        self._release = weakref.finalize(self, self._decoder_binding.release)

    # The life of a binding

    def unbind(self) -> None:
        """Let the model go: it is restored when its last cache lets go. The receipt can still be had."""
        self._release()

    def __enter__(self) -> EvictionCache:
        """Return the cache."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the model go."""
        self.unbind()

    @property
    def num_requests(self) -> int:
        """Return the rows of the batch, 0 before the first forward pass."""
        store = self.groups[0].store
        return 0 if store is None else len(store.rows)

    @property
    def seen(self) -> list[int]:
        """Return the tokens of each request, empty before the first forward pass."""
        store = self.groups[0].store
        return [] if store is None else [row.seen for row in store.rows]

    @property
    def evictions(self) -> list[int]:
        """Return the evictions of each request, empty before the first forward pass."""
        store = self.groups[0].store
        return [] if store is None else [row.evictions for row in store.rows]

    def evicts(self, layer: int) -> bool:
        """Return whether a layer evicts."""
        return layer in self._group_of

    # One forward pass: begin, then take and attend for each layer, then finish

    def told(self, mask: Any) -> None:
        """Remember the mask that a model around the decoder was given; it may hand on another, made of it."""
        self._told = (mask,)

    def begin(self, decoder: nn.Module, arguments: dict[str, Any]) -> None:
        """Open a step; the model's hook calls it before each forward pass."""
        if not self._release.alive:
            raise UsageError("this EvictionCache was unbound; make a new one for the model")
        if decoder is not self._decoder_binding.decoder:
            raise UsageError("this EvictionCache is bound to another model; make one for this model")
        if self._failed:
            raise UsageError("a forward pass failed half-way; reset() the cache and begin again")
        told, self._told = self._told, None
        if told is not None and isinstance(arguments.get("attention_mask"), dict):
            arguments = {**arguments, "attention_mask": told[0]}
        self._step = open_step(self, arguments)
        # Slots count only once a step is finished; layers left alone have moved on by then.
        self._failed = not self._step.decoding or len(self._group_of) < len(self.layers)

    def take(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take new keys and values of one layer; return what the new tokens attend to."""
        if not self._release.alive:
            raise UsageError("this EvictionCache was unbound, as its with block ended; make a new one for the model")
        if self._step is None:
            raise UsageError(
                "an EvictionCache works inside the forward pass of the model that it is bound to; "
                "call that model, with past_key_values=cache, and not a part or a copy of it"
            )
        return self._step.take(self._group_of[layer], layer, keys, values)

    def attend(
        self,
        module: nn.Module,
        function: AttentionFunction,
        original: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """Attend, then let the layer remember its queries and, at the end of a turn, evict."""
        step, layer = self._step, int(module.layer_idx)  # type: ignore[arg-type]
        assert step is not None
        for name in ("sliding_window", "position_bias"):
            if kwargs.get(name) is not None:
                raise UnsupportedError(f"layer {layer} attends with {name}, which slots without order cannot honour")
        group = self._group_of[layer]
        visible = step.visible(group)
        if step.decoding:
            out = one_token(module, function, original, query, key, value, visible, **kwargs)
        else:
            out = several_tokens(module, function, original, query, key, value, mask, visible, **kwargs)
        step.attended(group, layer, query, key, value, kwargs)
        return out

    def finish(self) -> None:
        """Make the step count, and evict where it is due; the model's hook calls it."""
        assert self._step is not None
        self._failed = True
        self._step.commit(self.policy)
        self.columns += self._step.width
        self.last = self._step.last
        self._step, self._failed = None, False

    # What transformers calls between steps

    def reset(self) -> None:
        """Forget everything, keeping the slots, so that the cache can be used again."""
        super().reset()
        for group in self.groups:
            if group.store is not None:
                group.store.reset()
        self.columns, self.last, self._step, self._failed = 0, None, None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace every row by the one that ``beam_idx`` names."""
        super().reorder_cache(beam_idx)
        if self.last is not None:
            self.last = self.last.index_select(0, beam_idx.to(self.last.device))
        for group in self.groups:
            if group.store is not None:
                group.store.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: tokens cannot be taken back here yet."""
        raise UnsupportedError("assisted decoding and crop() are not supported by EvictionCache yet")

    def activate_past_recording(self) -> None:
        """Refuse: drafts cannot be taken back here yet."""
        self.crop(0)

    # Proof

    def receipt(self) -> Receipt:
        """Return what the cache holds and what happened to it.

        Raises:
            UsageError: no forward pass has been made yet.
        """
        from kvpolicy import __version__

        stores = [group.store for group in self.groups if group.store is not None]
        if not stores:
            raise UsageError("no token has been seen yet: there is nothing to prove")
        rows = stores[0].rows
        text = self.policy.text(full=True) if isinstance(self.policy, Policy) else repr(self.policy)
        broken = torch.stack([store.broken.view(-1, len(rows)).sum(0).cpu() for store in stores]).sum(0)
        kept = {layer: at for group in self.groups for layer, at in group.positions().items()}
        return Receipt(
            policy=(text,) * len(rows),
            version=__version__,
            seen=tuple(row.seen for row in rows),
            slots=tuple(max(store.rows[r].length for store in stores) for r in range(len(rows))),
            capacity=max(store.spec.capacity for store in stores),
            evictions=tuple(row.evictions for row in rows),
            guards_broken=tuple(broken.tolist()),
            nbytes=sum(store.nbytes() for store in stores),
            window_nbytes=sum(store.window.nbytes() for store in stores),
            other_nbytes=sum(_held(layer) for i, layer in enumerate(self.layers) if i not in self._group_of),
            layers=tuple(sorted(self._group_of)),
            skipped=self.skipped,
            kept=kept,
        )

    def new_seeds(self, requests: int) -> list[tuple[int, int]]:
        """Return the name and the seed of each request of a batch.

        Raises:
            UsageError: ``seeds`` or ``requests`` were given for another number.
        """
        columns = []
        for name, given in (("requests", self._requests), ("seeds", self._seeds)):
            if given is not None and len(given) != requests:
                raise UsageError(f"{name} names {len(given)} requests, and the batch has {requests} rows")
            columns.append(given or [0] * requests)
        return list(zip(*columns, strict=True))


def _checked(policy: EvictionPolicy) -> EvictionPolicy:
    """Return the policy, or say why it is none, or why transformers cannot give what it needs."""
    if isinstance(policy, Stage | Chain):
        raise BindError(f"{policy!r} is not a policy yet; write Policy({policy!r})")
    if isinstance(policy, str):
        raise BindError(f"{policy!r} is a text; write Policy.parse({policy!r})")
    if isinstance(policy, type) or not isinstance(policy, EvictionPolicy):
        raise BindError(
            f"{policy!r} is not an EvictionPolicy: write one with vase(1024) or Policy(...), or give your class the "
            "attribute needs and the methods plan(model), init(spec, rows) and select(view, state)"
        )
    missing = policy.needs - _OFFERS
    if missing:
        raise UnsupportedError(
            f"{policy!r} needs {', '.join(sorted(missing))}, which the transformers adapter cannot give; "
            f"it gives {', '.join(sorted(_OFFERS))}"
        )
    return policy


def _integers(name: str, given: Sequence[int] | None) -> list[int] | None:
    if given is None:
        return None
    numbers = list(given) if isinstance(given, Sequence) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and -(2**63) <= n < 2**63 for n in numbers):
        raise BindError(f"{name}={given!r}: write one 64-bit integer for each row of the batch")
    return [int(n) for n in numbers if n is not None]


def _by_layer(plan: Plan, evicting: tuple[int, ...]) -> dict[int, LayerPlan | None]:
    if len(plan.layers) != len(evicting):
        raise BindError(f"the policy planned {len(plan.layers)} layers, and the model has {len(evicting)} that evict")
    return dict(zip(evicting, plan.layers, strict=True))


def _by_plan(group: tuple[int, ...], by_layer: dict[int, LayerPlan | None]) -> dict[LayerPlan, list[int]]:
    same: dict[LayerPlan, list[int]] = {}
    for layer in group:
        plan = by_layer[layer]
        if plan is not None:
            same.setdefault(plan, []).append(layer)
    return same


def _held(layer: Any) -> int:
    """Return the bytes that an ordinary cache layer holds."""
    found = 0
    for value in vars(layer).values():
        for one in value.values() if isinstance(value, dict) else [value]:
            if isinstance(one, Tensor):
                found += one.numel() * one.element_size()
    return found
