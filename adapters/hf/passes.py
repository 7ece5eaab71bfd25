"""Forward passes through a cache, and what transformers asks of it between them: :class:`Passes`."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvpolicy.adapters import planning
from kvpolicy.adapters.hf import binding, compat, others
from kvpolicy.adapters.hf.arguments import tokens_of
from kvpolicy.adapters.hf.attention import AttentionFunction, by_head, one_token, several_tokens, turn
from kvpolicy.adapters.hf.group import Group
from kvpolicy.adapters.hf.layer import EvictionLayer
from kvpolicy.adapters.hf.ranks import Ranks, said
from kvpolicy.adapters.hf.static import StaticSlots
from kvpolicy.adapters.hf.step import Step, open_step
from kvpolicy.errors import UnsupportedError, UsageError
from kvpolicy.growing import GrowingStore
from kvpolicy.policy import EvictionPolicy
from kvpolicy.ragged import RaggedStore, new_store
from kvpolicy.row import Row
from kvpolicy.store import Store
from kvpolicy.view import LayerSpec

__all__ = ["Passes"]


class Passes(Cache, binding.Evicting):
    """Be the part of an :class:`EvictionCache` that tokens go through.

    Attributes:
        groups: the layers whose tokens are held here, those that evict first.
        policies: one that all requests follow, or one a request.
        options: what the cache was made with.
        ranks: the processes that share the heads.
        sharing: query heads that share a KV head, of each layer.
        static: whether decoding has fixed shapes.
        max_draft_tokens: tokens that may be drafted at once.
        prompt_length: columns of the prompt, if it was named.
        columns: seen, pads among them.
        columns_seen: the same as a tensor, for compiled code.
        last: the position of each row's newest token, if the model told it.
    """

    groups: list[Group]
    policies: tuple[EvictionPolicy, ...]
    options: dict[str, Any]
    ranks: Ranks
    static: bool
    max_draft_tokens: int
    prompt_length: int | None
    sharing: dict[int, int]
    _group_of: dict[int, Group]
    _seeds: list[int] | None
    _requests: list[int] | None
    _decoder_binding: binding.Binding
    _release: weakref.finalize[Any, Any]

    def __init__(self, layers: list[Any], device: torch.device) -> None:
        super().__init__(layers=layers)
        self.columns = 0
        with torch.inference_mode(False):  # a cache may outlive the mode in which it is made
            self.columns_seen = torch.zeros((), dtype=torch.int64, device=device)
        self.last: Tensor | int | None = None
        self.announced = False  #: the next pass may hold a prompt and its first draft together
        self._ran = False  #: a compiled step has run and does not count yet
        self._step: Step | None = None
        self._told: tuple[Any] | None = None
        self._failed = False

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
        """Return the evictions of each request, of the layer that had most; empty before the first forward pass."""
        stores = [group.store for group in self.groups if group.store is not None]
        return [max(row.evictions for row in layers) for layers in zip(*(store.rows for store in stores), strict=True)]

    @property
    def slots(self) -> list[float]:
        """Return the slots in use of each request, a mean over KV heads and layers; empty before the first pass."""
        stores = [group.store for group in self.groups if group.store is not None]
        if not stores:
            return []
        return [
            sum(store.slots_of(r) for store in stores) / sum(len(store.layers) for store in stores)
            for r in range(self.num_requests)
        ]

    def nbytes(self, *, turns: bool = True) -> int:
        """Return the bytes that all layers hold.

        Args:
            turns: add what the largest turn so far held besides, of one layer at a time.
        """
        stores = sum(group.store.nbytes() for group in self.groups if group.store is not None)
        besides = max((group.turn_nbytes for group in self.groups), default=0) if turns else 0
        return stores + besides + sum(map(others.nbytes, self._others()))

    def until_eviction(self) -> int:
        """Return how many tokens can be decoded before an eviction is due in some row."""
        left = [sys.maxsize]
        for group in self.groups:
            if group.store is not None:
                for row, plan in zip(group.store.rows, group.store.plans, strict=True):
                    if plan.interval is not None:
                        left.append(plan.interval - row.decoded % plan.interval)
        return min(left)

    def policy_of(self, request: int) -> EvictionPolicy:
        """Return what a row of the batch follows."""
        return self.policies[request if len(self.policies) > 1 else 0]

    def allocate(self, group: Group, spec: LayerSpec, rows: list[Row]) -> Store:
        """Return new slots for the layers of a group."""
        if not group.evicts:
            return GrowingStore(spec, group.layers, rows)
        policies = [self.policy_of(r) for r in range(len(rows))]
        plans = [group.plans[r % len(group.plans)] for r in range(len(rows))]
        return new_store(policies, plans, spec, group.layers, rows, self.max_draft_tokens)

    def new_seeds(self, requests: int) -> list[tuple[int, int]]:
        """Return the name and the seed of each request of a batch.

        Raises:
            UsageError: ``seeds`` or ``requests`` were given for another number.
        """
        if len(self.policies) not in (1, requests):
            raise UsageError(
                f"there are {len(self.policies)} policies, and the batch has {requests} rows: give one each; beams and "
                "num_return_sequences are rows, too: name each policy as often"
            )
        columns = []
        for name, given in (("requests", self._requests), ("seeds", self._seeds)):
            if given is not None and len(given) != requests:
                raise UsageError(f"{name} names {len(given)} requests, and the batch has {requests} rows")
            columns.append(given or [0] * requests)
        return list(zip(*columns, strict=True))

    def hold(self, groups: list[Group]) -> None:
        """Let these groups be what is held."""
        self.groups, self._group_of = groups, {layer: group for group in groups for layer in group.layers}

    def holds(self, layer: int) -> bool:
        """Return whether a layer's tokens are held here, and not in a layer of transformers."""
        return layer in self._group_of

    # One forward pass: begin, then take and attend for each layer, then finish

    def told(self, mask: Any) -> None:
        """Remember the mask that a model around the decoder was given; it may hand on another, made of it."""
        self._told = (mask,)

    def begin(self, decoder: nn.Module, arguments: dict[str, Any]) -> None:
        """Open a step; the model's hook calls it before each forward pass."""
        if torch.compiler.is_compiling():
            self._begin_compiled(arguments)
            return
        self.step()
        if not self._release.alive:
            raise UsageError("this EvictionCache was unbound; make a new one for the model")
        if decoder is not self._decoder_binding.decoder:
            raise UsageError("this EvictionCache is bound to another model; make one for this model")
        self._check_whole()
        told, self._told = self._told, None
        if told is not None and isinstance(arguments.get("attention_mask"), dict):
            arguments = {**arguments, "attention_mask": told[0]}
        if not self.columns:
            self._insist_on_one_prompt(arguments)
        step = open_step(self, arguments)
        self._settle()  # only now: a refused pass changes nothing
        self._step = step
        # Slots count only once a step is finished; layers left alone have moved on by then.
        self._failed = not self._step.decoding or len(self._group_of) < len(self.layers)

    def _begin_compiled(self, arguments: dict[str, Any]) -> None:
        """Check what a graph depends on; whatever is read here is a guard of the graph."""
        tokens = tokens_of(arguments)
        if not self.static:
            raise UsageError("compiled code needs fixed shapes; write EvictionCache(..., static=True)")
        if tokens.shape[1] != 1 or self.groups[0].static is None:
            raise UsageError("compile one-token steps alone: give the prompt to the model itself")
        if self._ran or self._failed:
            raise UsageError("the last compiled step does not count yet; call cache.step() after each")
        if any(group.static is not None and group.static.full for group in self.groups):
            raise UsageError(
                "every slot of a row is in use, and the policy evicts at the end of a turn only; bind it with a larger "
                "max_new_tokens"
            )

    def step(self) -> None:
        """Make a compiled step count, and evict where it is due.

        ``generate()`` has it called by looking at the cache before each step; whoever calls
        compiled code calls it after each token. Without a compiled step it does nothing.
        """
        if not self._ran:
            return
        self._ran = False
        self._step = Step(self, 1, [1] * self.num_requests, decoding=True)
        self._step.attended_all()
        if self.last is not None:
            self._step.last = self.last + 1
        self._finish()

    def _check_whole(self) -> None:
        if self._failed:
            raise UsageError("a forward pass failed half-way; reset() the cache and begin again")

    def take(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take new keys and values of one layer; return what the new tokens attend to."""
        if torch.compiler.is_compiling():
            group = self._group_of[layer]
            assert group.static is not None
            latent = group.latents.get(layer)
            if latent is None:
                return group.static.take(group.index(layer), keys, values)
            keys = latent.joined(layer, keys, values)
            return latent.parts(group.static.take(group.index(layer), keys, keys)[0])
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
        for name in ("sliding_window", "position_bias"):
            if kwargs.get(name) is not None:
                raise UnsupportedError(f"layer {layer} attends with {name}, which slots without order cannot honour")
        group = self._group_of[layer]
        if torch.compiler.is_compiling():
            static = group.static
            assert static is not None
            static.observe(group.index(layer), query)
            return one_token(module, function, original, query, key, value, static.visible(), **kwargs)
        assert step is not None
        store = group.store
        if step.decoding and isinstance(store, RaggedStore):
            out = by_head(module, function, original, query, store, group.index(layer), **kwargs)
            step.attended(group, layer, query, key, value, kwargs)
            return out
        visible = step.visible(group, layer)
        if not step.decoding:
            out = turn(module, function, original, query, key, value, visible, mask, **kwargs)
        else:
            attend = one_token if step.width == 1 else several_tokens
            out = attend(module, function, original, query, key, value, visible, **kwargs)
        step.attended(group, layer, query, key, value, kwargs)
        return out

    def finish(self) -> None:
        """Make the step count, and evict where it is due; the model's hook calls it."""
        if torch.compiler.is_compiling():
            self._ran = True  # whatever the host does next with this cache counts the step first
            return
        self._finish()

    def _finish(self) -> None:
        assert self._step is not None
        self._failed = True
        self._step.commit()
        self.columns += self._step.width
        self.last = self._step.last
        self.announced = self.announced and self._step.decoding
        self._step, self._failed = None, False
        self._refresh()

    def _refresh(self) -> None:
        """Tell compiled code where the next tokens go."""
        if not self.static:
            return
        self.columns_seen.fill_(self.columns)
        for group in self.groups:
            if group.store is None:
                continue
            if group.static is None or group.static.store is not group.store:
                group.static = StaticSlots(group.store)
            group.static.refresh()

    def _insist_on_one_prompt(self, arguments: dict[str, Any]) -> None:
        """Stop processes that would go separate ways, before they wait for each other for ever."""
        if self.ranks.size == 1:
            return
        found: dict[str, Any] = {
            "the policy": [planning.policy_text(policy) for policy in self.policies],
            "the plans of the layers": [(group.layers, str(group.plans)) for group in self.groups],
            **self.options,
        }
        for name in ("input_ids", "inputs_embeds", "attention_mask"):
            found[f"{name}, its shape and a fingerprint,"] = said(arguments.get(name))
        self.ranks.insist(found, UsageError)

    # What transformers calls between steps

    def reset(self) -> None:
        """Forget everything, keeping the slots, so that the cache can be used again."""
        self._ran = False
        super().reset()
        for group in self.groups:
            group.unsettled = group.static = None
            if group.store is not None:
                group.store.reset()
        self.columns, self.last, self._step, self._failed = 0, None, None, False
        self.announced = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace every row by the one that ``beam_idx`` names.

        Raises:
            UsageError: a row does not exist, or follows another policy; nothing was changed.
        """
        self.step()
        stores = [group.store for group in self.groups if group.store is not None]
        for store in stores:
            store.check_reorder(beam_idx)
        super().reorder_cache(beam_idx)
        if isinstance(self.last, Tensor):
            self.last = self.last.index_select(0, beam_idx.to(self.last.device))
        for store in stores:
            store.reorder(beam_idx)
        for group in self.groups:
            if group.unsettled is not None:
                group.unsettled = [group.unsettled[r] for r in beam_idx.tolist()]
        self._refresh()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, as if they had never been given, then evict where it is due.

        Args:
            tokens_to_remove: how many, as a negative number or 0. Before transformers 5.15 a positive
                number is the columns that stay.

        Raises:
            UsageError: tokens so old that some heads have evicted some of them; nothing was changed.
        """
        self.step()
        stores = [group.store for group in self.groups if group.store is not None]
        if not stores:
            raise UsageError(f"crop({tokens_to_remove}): no token has been seen yet")
        count = compat.tokens_to_remove(self.columns, tokens_to_remove)
        self._check_whole()
        if count > self.max_draft_tokens > 0:
            raise UsageError(
                f"crop({tokens_to_remove}): {count} tokens were drafted, and slots are set aside for "
                f"{self.max_draft_tokens}; write EvictionCache(..., max_draft_tokens={count}) or more"
            )
        for store in stores:
            store.check_crop([count] * len(store.rows))
        for layer in self._others():
            if count or compat.ANNOUNCES_DRAFTS:
                layer.crop(-count)  # what was recorded for drafts is trimmed also where none goes
        for store in stores:
            store.crop([count] * len(store.rows))
        self.columns -= count
        self.last = None if self.last is None else self.last - count
        self._settle()
        self._refresh()

    def _settle(self) -> None:
        """Evict where it is due, now that no more drafts will be taken back."""
        failed, self._failed = self._failed, True  # a policy that raises leaves slots half moved
        for group in self.groups:
            group.settle()
        self._failed = failed

    def _others(self) -> list[Any]:
        """Return the layers that are left alone."""
        return [layer for layer in self.layers if not isinstance(layer, EvictionLayer)]

    def activate_past_recording(self) -> None:
        """Prepare for drafts, as assisted decoding asks.

        Raises:
            UnsupportedError: no slots were set aside for them.
        """
        if not self.max_draft_tokens:
            raise UnsupportedError(
                "assisted and prompt-lookup decoding draft tokens and take some back, and no slots were set aside for "
                "them; write EvictionCache(..., max_draft_tokens=20), at least as many as are drafted at once"
            )
        self.announced = True
        for layer in self._others():
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def continue_at(self, columns: int, last: Tensor | int | None) -> None:
        """Go on behind so many columns, whose last tokens have these positions."""
        self.columns, self.last, self._step, self._failed = columns, last, None, False
        self._refresh()
