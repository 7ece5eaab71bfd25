"""One forward pass through an eviction cache: what comes in, and what happens at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpolicy.adapters.hf.latent import Latent
from kvpolicy.errors import UnsupportedError, UsageError
from kvpolicy.eviction import LogitSpec, evict, fill_from
from kvpolicy.policy import EvictionPolicy, LayerPlan
from kvpolicy.row import Row
from kvpolicy.store import Store
from kvpolicy.view import LayerSpec

if TYPE_CHECKING:
    from kvpolicy.adapters.hf.cache import EvictionCache

__all__ = ["Group", "Step", "open_step"]


@dataclass(eq=False)
class Group:
    """Hold the layers that share a device, a shape and a plan, and so an arena.

    Attributes:
        layers: indices.
        plan: of each of them.
        store: allocated when the first tokens come.
        logits: what each layer's attention was last called with.
        latents: how each layer expands its latents, where that is what it caches.
    """

    layers: tuple[int, ...]
    plan: LayerPlan
    store: Store | None = None
    logits: dict[int, dict[str, Any]] = field(default_factory=dict)
    latents: dict[int, Latent] = field(default_factory=dict)

    def absorb(self, index: int, queries: Tensor) -> Tensor:
        """Return queries of a layer, counted within the store, that ask the latents it holds."""
        return self.latents[self.layers[index]].absorbed(queries)

    def positions(self) -> dict[int, Tensor]:
        """Return a copy of the kept positions of each layer, ascending, -1 behind the last."""
        if self.store is None:
            return {}
        self.store.settle()
        order = self.store.order[..., : self.store.longest].to(torch.int64)
        return dict(zip(self.layers, self.store.positions.gather(-1, order).cpu(), strict=True))


@dataclass(eq=False)
class Step:
    """Be one forward pass: a step of one token, or a turn of several.

    Attributes:
        cache: whose.
        width: columns, pads among them.
        counts: new tokens of each row.
        decoding: one token a row, after the prompt.
        last: the position that the model gives each row's newest token, if it is told.
    """

    cache: EvictionCache
    width: int
    counts: list[int]
    decoding: bool
    last: Tensor | None = None
    _after: dict[int, list[Row]] = field(default_factory=dict)
    _visible: dict[int, Tensor | None] = field(default_factory=dict)
    _taken: set[int] = field(default_factory=set)
    _given: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _attended: set[int] = field(default_factory=set)

    def take(self, group: Group, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take new keys and values of one layer; return what the new tokens attend to."""
        if torch.is_grad_enabled() and keys.requires_grad:
            raise UsageError("slots carry no gradients: run the model under torch.no_grad()")
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
        index = group.layers.index(layer)
        if self.decoding:
            store.append(index, keys, values, self.counts)
            end = store.longest + 1
            return store.keys[index, :, :, :end], store.values[index, :, :, :end]
        if not store.longest:
            return keys, values
        held = slice(0, store.longest)
        return (
            torch.cat([store.keys[index, :, :, held], keys], 2),
            torch.cat([store.values[index, :, :, held], values], 2),
        )

    def _store(self, group: Group, layer: int, keys: Tensor, values: Tensor) -> Store:
        """Return the store of a layer, allocated when its group's first layer runs."""
        shape = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)
        if group.store is None:
            heads, dim, value_dim, dtype, device = shape
            latent = group.latents.get(layer)
            if latent is None:
                asking = heads * self.cache.sharing.get(layer, 1)
                spec = LayerSpec(heads, asking, dim, value_dim, group.plan.capacity, dtype, device)
            else:
                query_dim = latent.plain + dim - latent.rank
                sizes = (heads, latent.heads, dim, value_dim, group.plan.capacity)
                spec = LayerSpec(*sizes, dtype, device, query_dim=query_dim, values_in_keys=True)
            rows = [Row(request=request, seed=seed) for request, seed in self.cache.new_seeds(len(self.counts))]
            group.store = Store(self.cache.policy, group.plan, spec, group.layers, rows)
        spec = group.store.spec
        known = (spec.num_heads, spec.head_dim, spec.value_dim, spec.dtype, spec.device)
        if shape != known:
            raise UnsupportedError(
                f"layer {layer} has (heads, key size, value size, dtype, device) = {shape}, and layer "
                f"{group.layers[0]} has {known}; layers of different shapes are not supported yet"
            )
        if id(group) not in self._after:
            self._open(group, group.store)
        return group.store

    def _open(self, group: Group, store: Store) -> None:
        """Work out, once a group and step, what its layers share."""
        if not self.cache.columns:
            store.window.align(self.counts)
        if not self.decoding and store.longest:
            if "every_query" in self.cache.policy.needs:  # a turn may push queries out of the window
                evict(store, [False] * len(store.rows), self._logit_spec(group, group.layers, store))
            store.settle()
        self._after[id(group)] = [
            row.advanced(count, decoding=self.decoding) for row, count in zip(store.rows, self.counts, strict=True)
        ]
        new = 1 if self.decoding else 0
        if store.uniform and (self.decoding or not store.longest):
            self._visible[id(group)] = None
            return
        slots = torch.arange(store.longest + new, device=store.spec.device)
        self._visible[id(group)] = (slots < store.column("length")[:, None] + new)[:, None, None]

    def visible(self, group: Group) -> Tensor | None:
        """Return which slots hold tokens, ``[requests, 1, 1, slots]`` bool; None where none need hiding."""
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
        store, index = group.store, group.layers.index(layer)
        assert store is not None
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
        after = self._after[id(group)]
        if max(row.length for row in after) <= store.plan.budget:
            store.append(index, keys[:, :, store.longest :], values[:, :, store.longest :], self.counts)
        else:
            spec = self._logit_spec(group, [layer], store)
            fill_from(store, index, keys, values, self.counts, after, spec)

    def commit(self, policy: EvictionPolicy) -> None:
        """Make the step count, and evict where it is due."""
        for group in self.cache.groups:
            missing = set(group.layers) - self._attended
            if missing or group.store is None:
                raise UsageError(
                    f"layer {min(missing)} did not attend through kvpolicy in this forward pass; "
                    "was set_attn_implementation() called while the cache was bound?"
                )
            self._commit(group, group.store, policy)

    def _commit(self, group: Group, store: Store, policy: EvictionPolicy) -> None:
        plan, after = store.plan, self._after[id(group)]
        filled = not self.decoding and max(row.length for row in after) > plan.budget
        if filled:
            after = [row.evicted(min(row.length, plan.budget), plan.recent) for row in after]
        store.advance(after)
        if filled or (self.decoding and plan.interval is None):
            return
        at_end = [not self.decoding or row.decoded % (plan.interval or 1) == 0 for row in store.rows]
        due = [end and row.length > plan.budget for end, row in zip(at_end, store.rows, strict=True)]
        if any(due) or (any(at_end) and "every_query" in policy.needs):
            evict(store, due, self._logit_spec(group, group.layers, store))

    def _logit_spec(self, group: Group, layers: Any, store: Store) -> LogitSpec:
        """Return what attention does to logits, the same for all layers of a store but for sinks."""
        found = [group.logits[layer] for layer in layers]
        first = found[0]
        if any(one["scaling"] != first["scaling"] or one["softcap"] != first["softcap"] for one in found):
            raise UnsupportedError("layers scale their logits differently, which is not supported yet")
        sinks = None if first["s_aux"] is None else torch.stack([one["s_aux"].detach() for one in found])
        return LogitSpec(
            scaling=float(first["scaling"] or (store.spec.query_dim or store.spec.head_dim) ** -0.5),
            softcap=first["softcap"],
            sinks=sinks,
            num_layers=len(self.cache.layers),
            num_heads=store.spec.num_heads,
            workspace=self.cache.workspace,
            absorb=group.absorb if group.latents else None,
        )


def _same(given: Tensor | None, used: Tensor) -> bool:
    """Return whether attention uses what the cache gave; the tensor itself in all but a few models."""
    return given is used or (given is not None and given.dtype == used.dtype and torch.equal(given, used))


def open_step(cache: EvictionCache, arguments: dict[str, Any]) -> Step:
    """Return the step that a forward pass with these arguments is.

    Raises:
        UsageError: these arguments cannot give a right answer; nothing was changed.
    """
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise UsageError("the forward pass has neither input_ids nor inputs_embeds")
    if arguments.get("output_attentions"):
        raise UsageError("evicted tokens have no attention weights to show: leave output_attentions out")
    requests, width = tokens.shape[0], tokens.shape[1]
    if not width:
        raise UsageError(
            "there is no new token: reset() the cache for a new prompt, or give the whole conversation and what is new"
        )
    if arguments.get("use_cache") is False:
        raise UsageError("use_cache=False asks for no cache: leave it out, or leave past_key_values out")
    if not cache.columns and requests != cache.num_requests:
        for group in cache.groups:  # nothing is held: a new batch may have another size
            group.store = None
    if cache.num_requests and requests != cache.num_requests:
        raise UsageError(
            f"the cache holds {cache.num_requests} requests, and the batch has {requests} rows; "
            "a batch keeps its size until reset()"
        )
    started = cache.columns > 0
    seen = cache.seen or [0] * requests
    counts = _counts(arguments.get("attention_mask"), cache.columns, width, seen)
    last = _last(arguments.get("position_ids"), requests)
    step = Step(cache, width, counts, decoding=started and width == 1, last=last)
    if started and not step.decoding:
        _check_continues(cache.last, step.last, counts)
    return step


def _last(positions: Any, requests: int) -> Tensor | None:
    """Return the position that the model gives each row's newest token, where it is one number."""
    if isinstance(positions, Tensor) and positions.dim() == 3 and positions.shape[0] == 4:
        positions = positions[0]  # of the text; behind it, where a token stands in an image
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    return positions[:, -1].expand(requests)


def _check_continues(before: Tensor | None, now: Tensor | None, counts: list[int]) -> None:
    """Refuse a new prompt on a used cache: its positions begin again."""
    if before is None or now is None:
        return
    for r, (old, new, count) in enumerate(zip(before.tolist(), now.tolist(), counts, strict=True)):
        if new != old + count:
            raise UsageError(
                f"row {r} brings {count} tokens that end at position {new}, and the cache's last token is at {old}; "
                "reset() the cache for a new prompt, or continue with the whole conversation"
            )


def _counts(mask: Any, columns: int, width: int, seen: list[int]) -> list[int]:
    """Return the new tokens of each row, which an attention mask tells from pads."""
    if mask is None:
        if any(one != columns for one in seen):
            raise UsageError("some rows were padded: pass the attention_mask with every later call, too")
        return [width] * len(seen)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UsageError("an EvictionCache takes a two-dimensional attention_mask, of ones and zeros, or none")
    if tuple(mask.shape) != (len(seen), columns + width):
        raise UsageError(
            f"attention_mask is {tuple(mask.shape)}; it must cover {len(seen)} rows and the {columns} columns seen "
            f"with the {width} new ones: ({len(seen)}, {columns + width})"
        )
    new = (mask[:, columns:] != 0).to(torch.int64)
    steps = torch.stack([(mask[:, :columns] != 0).sum(1), new.sum(1), (new.diff(dim=1) < 0).sum(1), new[:, -1]])
    before, counts, falls, last = steps.tolist()
    for r in range(len(seen)):
        if falls[r] or not last[r]:
            raise UsageError(
                f"row {r} of attention_mask has a pad behind a token; pad on the left: tokenizer.padding_side = 'left'"
            )
        if before[r] != seen[r]:
            raise UsageError(
                f"row {r} of attention_mask shows {before[r]} tokens among the columns seen, and the cache has seen "
                f"{seen[r]}; tokens cannot be hidden later"
            )
    return [int(count) for count in counts]
