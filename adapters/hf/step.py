"""One forward pass through an eviction cache: what comes in, and what happens at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpolicy.adapters.hf import arguments
from kvpolicy.adapters.hf.attention import seen, seen_slots
from kvpolicy.adapters.hf.group import Group
from kvpolicy.errors import UnsupportedError, UsageError
from kvpolicy.ragged import RaggedStore
from kvpolicy.row import Row
from kvpolicy.store import Store
from kvpolicy.turn import begin_turn, end_turn, take_turn
from kvpolicy.view import LayerSpec

if TYPE_CHECKING:
    from kvpolicy.adapters.hf.passes import Passes

__all__ = ["Step", "open_step"]


@dataclass(eq=False)
class Step:
    """Be one forward pass: decoded tokens, or a turn.

    Decoded tokens are written behind the slots in use and attend to them; what is evicted is
    evicted afterwards. A turn is joined with the slots in use, one layer at a time, and cut.

    Attributes:
        cache: whose.
        width: columns, pads among them.
        counts: new tokens of each row.
        decoding: the new tokens count as decoded, one a row or several.
        tail: the last tokens of a turn that count as decoded, since they may be drafts: assisted
            decoding announces itself, and gives a prompt and its first draft together.
        last: the position that the model gives each row's newest token, None if it is no single one.
    """

    cache: Passes
    width: int
    counts: list[int]
    decoding: bool
    tail: int = 0
    last: Tensor | int | None = None
    _turned: dict[int, list[Row]] = field(default_factory=dict)
    _visible: dict[int, Tensor | None] = field(default_factory=dict)
    _taken: set[int] = field(default_factory=set)
    _given: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _attended: set[int] = field(default_factory=set)

    # What a layer does, in order

    def take(self, group: Group, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take new keys and values of one layer; return what the new tokens attend to."""
        _refuse_gradients(keys, values)
        if layer in self._taken:
            raise UsageError(f"layer {layer} gave its keys twice in one forward pass")
        self._taken.add(layer)
        latent = group.latents.get(layer)
        if latent is not None:
            keys = latent.joined(layer, keys, values)
            values = keys[..., : latent.rank]
        given = self._given[layer] = self._take(group, layer, keys, values)
        return given if latent is None else latent.parts(given[0])

    def _take(self, group: Group, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        store = self._store(group, layer, keys, values)
        index = group.index(layer)
        if self.decoding:
            store.append(index, keys, values, self.counts)
            if isinstance(store, RaggedStore):
                return keys, values  # attention reads the slots of each head where they lie
            end = store.longest + self.width
            return store.keys[index, :, :, :end], store.values[index, :, :, :end]
        within, size = store.spec.values_in_keys, store.spec.value_dim
        if store.longest:
            held, seen = store.in_use(index)
            keys = torch.cat([held, keys], 2)
            values = keys[..., :size] if within else torch.cat([seen, values], 2)
        group.turn_nbytes = max(group.turn_nbytes, keys.nbytes + (0 if within else values.nbytes))
        return keys, values

    def visible(self, group: Group, layer: int) -> Tensor | None:
        """Return which slots may be seen, None where all may.

        Decoding: ``[requests, 1, tokens, slots]`` bool, the new tokens among the slots. A turn:
        ``[requests, 1, 1, slots]``, the slots in use before it. Query heads stand for 1 where heads differ.
        """
        store = group.store
        if isinstance(store, RaggedStore):
            index = group.index(layer)
            return seen_slots(store, index, 0) if store.longest_in(index) else None  # a turn; decoding asks by itself
        return self._visible[id(group)]

    def attended(
        self,
        group: Group,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        logits: dict[str, Any],
    ) -> None:
        """Remember the queries of one layer, and put a turn's tokens into its slots."""
        store, index = group.store, group.index(layer)
        assert store is not None
        _refuse_gradients(query)
        self._attended.add(layer)
        group.logits[layer] = {name: logits.get(name) for name in ("scaling", "softcap", "s_aux")}
        if query.shape[1] != store.spec.num_query_heads:
            raise UnsupportedError(
                f"layer {layer} has {query.shape[1]} query heads, and {store.spec.num_query_heads} were expected"
            )
        given = self._given.pop(layer, (None, None))
        if layer not in group.latents and not (_same(given[0], key) and _same(given[1], value)):
            raise UnsupportedError(
                f"layer {layer} attends twice, or to other keys and values than its cache gave it: what it does "
                "between its cache and its attention is not known here"
            )
        keys, values = given
        assert keys is not None
        assert values is not None
        store.observe(index, query, self.counts)
        if self.decoding:
            return
        turned = self._turned[id(group)]
        take_turn(store, index, keys, values, self.counts, turned, lambda: group.logit_spec([layer]), self.tail)

    # What happens once a forward pass and group

    def _store(self, group: Group, layer: int, keys: Tensor, values: Tensor) -> Store:
        """Return the store of a layer, allocated when its group's first layer runs."""
        shape = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)
        if group.store is None:
            group.store = self._allocated(group, layer, *shape)
        spec = group.store.spec
        known = (spec.num_heads, spec.head_dim, spec.value_dim, spec.dtype, spec.device)
        if shape != known:
            raise UnsupportedError(
                f"layer {layer} has (heads, key size, value size, dtype, device) = {shape}, and layer "
                f"{group.layers[0]} has {known}; layers of different shapes are not supported yet"
            )
        if id(group) not in self._visible:
            self._open(group, group.store)
        return group.store

    def _allocated(
        self, group: Group, layer: int, heads: int, dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Store:
        cache, latent = self.cache, group.latents.get(layer)
        capacity = group.capacity + cache.max_draft_tokens
        if latent is None:
            spec = LayerSpec(heads, heads * cache.sharing.get(layer, 1), dim, value_dim, capacity, dtype, device)
        else:
            sizes = (heads, latent.heads, dim, value_dim, capacity)
            query_dim = latent.plain + dim - latent.rank
            spec = LayerSpec(*sizes, dtype, device, query_dim=query_dim, values_in_keys=True)
        rows = [Row(request=request, seed=seed) for request, seed in cache.new_seeds(len(self.counts))]
        return cache.allocate(group, spec, rows)

    def _open(self, group: Group, store: Store) -> None:
        """Work out, once a group and step, what its layers share."""
        if not self.cache.columns:
            store.window.align(self.counts)
        new = self.width if self.decoding else 0
        if not self.decoding:
            turned = [count - self.tail for count in self.counts]
            self._turned[id(group)] = begin_turn(store, turned, group.logit_spec)
        if isinstance(store, RaggedStore):
            return
        if store.uniform and new <= 1 and (self.decoding or not store.longest):
            self._visible[id(group)] = None
            return
        self._visible[id(group)] = seen(store.column("length")[:, None], store.longest, new)

    # The end

    def attended_all(self) -> None:
        """Take as done what compiled code did for every layer."""
        self._attended = {layer for group in self.cache.groups for layer in group.layers}

    def commit(self) -> None:
        """Make the step count, and evict where it is due, but for tokens that may be drafts."""
        for group in self.cache.groups:
            missing = set(group.layers) - self._attended
            if missing or group.store is None:
                raise UsageError(
                    f"layer {min(missing)} did not attend through kvpolicy in this forward pass; "
                    "was set_attn_implementation() called while the cache was bound?"
                )
            if not self.decoding:
                end_turn(group.store, self._turned[id(group)], group.logit_spec)
            self._decode(group, group.store, self.counts if self.decoding else [self.tail] * len(self.counts))

    def _decode(self, group: Group, store: Store, counts: Sequence[int]) -> None:
        """Make decoded tokens count, and evict where it is due, unless they may be drafts."""
        before = store.rows
        if any(counts):
            store.advance([row.advanced(n, decoding=True) for row, n in zip(before, counts, strict=True)])
        if self.cache.max_draft_tokens:
            group.unsettled = before
        elif any(counts):
            group.evict_after(before, turn=False)


def _refuse_gradients(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise UsageError("slots carry no gradients: run the model under torch.no_grad()")


def _same(given: Tensor | None, used: Tensor) -> bool:
    """Return whether attention uses what the cache gave; the tensor itself in all but a few models."""
    return given is used or (given is not None and given.dtype == used.dtype and torch.equal(given, used))


def open_step(cache: Passes, given: dict[str, Any]) -> Step:
    """Return the step that a forward pass with these arguments is.

    Raises:
        UsageError: these arguments cannot give a right answer; nothing was changed.
    """
    new = arguments.read(given, cache.columns, cache.seen)
    if not cache.columns:
        cache.new_seeds(new.requests)  # refused before any layer has run
    decoding, tail = _kind(cache, new)
    if decoding and min(new.counts) < new.width:
        raise UsageError(
            f"{new.width} columns behind the prompt count as decoded, and a row has only {min(new.counts)} tokens in "
            "them; give every row as many, or leave max_draft_tokens and prompt_length out for a padded turn"
        )
    if tail and min(new.counts) <= tail:
        raise UsageError(
            f"prompt_length={cache.prompt_length}, and a row brings {min(new.counts)} tokens, all of them behind it"
        )
    if cache.columns and not (decoding and new.width == 1):
        arguments.check_continues(cache.last, new, padded=any(seen != cache.columns for seen in cache.seen))
    if not cache.columns and new.requests != cache.num_requests:
        for group in cache.groups:  # nothing is held: a new batch may have another size
            group.store = None
    return Step(cache, new.width, new.counts, decoding, tail, new.last)


def _kind(cache: Passes, new: arguments.Arguments) -> tuple[bool, int]:
    """Return whether the new tokens are decoded, and how many at the end of a turn are."""
    drafts, end, columns = cache.max_draft_tokens, cache.prompt_length, cache.columns
    if end is None:
        if columns > 0 and new.width <= drafts + 1:
            return True, 0
        if not cache.announced:
            return False, 0
        shortest = min(new.counts)
        if shortest <= drafts and shortest != max(new.counts):
            raise UsageError(
                f"max_draft_tokens={drafts}, and a row of the padded batch brings {shortest} tokens: which of them may "
                f"be drafts would depend on its neighbours; give more than {drafts} to every row, or leave it out"
            )
        return False, min(drafts, shortest - 1)
    if columns < end:
        tail = max(0, columns + new.width - end)
        if tail > drafts:
            raise UsageError(
                f"prompt_length={end}, and this forward pass has columns {columns} to {columns + new.width}: "
                "end the prompt's last chunk where the prompt ends"
            )
        return False, tail
    if new.width > drafts + 1 and new.width > cache.until_eviction():
        raise UsageError(
            f"{new.width} tokens behind the prompt, and an eviction is due after {cache.until_eviction()}: "
            "feed that many, then up to an interval at a time"
        )
    return True, 0
