"""A conversation of random tokens, told to a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvpolicy.eviction import LogitSpec, evict, fill_from
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec
from kvpolicy.ragged import new_store
from kvpolicy.row import Row
from kvpolicy.view import LayerSpec

__all__ = ["Event", "Script", "StoreCache", "Tokens"]


@dataclass(frozen=True)
class Script:
    """Describe a conversation of several requests.

    Attributes:
        turns: of each turn, the new tokens of each request and the tokens decoded after them.
        layers: evicting layers.
        heads: KV heads.
        group: query heads of each.
        dtype: of the cache.
        generator: seed of every random number.
    """

    turns: tuple[tuple[tuple[int, ...], int], ...]
    layers: int = 2
    heads: int = 2
    group: int = 2
    dtype: torch.dtype = torch.float32
    generator: int = 0

    @property
    def requests(self) -> int:
        """Return how many there are."""
        return len(self.turns[0][0])

    def steps(self) -> Iterator[tuple[tuple[int, ...], bool]]:
        """Yield the new tokens of each request, and whether they are decoded, of each step."""
        for counts, decoded in self.turns:
            yield counts, False
            for _ in range(decoded):
                yield (1,) * len(counts), True


@dataclass(frozen=True, eq=False)
class Tokens:
    """Hold the new tokens of one step: ``[layers, requests, heads, width, dim]``, left-padded."""

    keys: Tensor
    values: Tensor
    queries: Tensor

    @staticmethod
    def of(script: Script, width: int, random: torch.Generator, dim: int = 4) -> Tokens:
        """Return random tokens."""
        lead = (script.layers, script.requests)
        shapes = [script.heads, script.heads, script.heads * script.group]
        made = [torch.randn(*lead, n, width, dim, generator=random) for n in shapes]
        return Tokens(*(x.to(script.dtype) for x in made))


@dataclass(frozen=True)
class Event:
    """Say what a step did.

    Attributes:
        seen: tokens of each request after it.
        asked: whether the policy was asked.
        due: for each request, whether it was cut.
    """

    seen: tuple[int, ...]
    asked: bool
    due: tuple[bool, ...]


class StoreCache:
    """Tell a script to a :class:`~kvpolicy.store.Store` as an engine does.

    Args:
        policy: asked where it is due.
        script: the conversation.
    """

    def __init__(self, policy: EvictionPolicy, script: Script) -> None:
        self.policy, self.script = policy, script
        tokens = sum(decoded for _, decoded in script.turns)
        model = ModelSpec(num_layers=script.layers, max_new_tokens=tokens + 1)
        plans = policy.plan(model).layers
        plan = next((layer for layer in plans if layer is not None), None)
        assert plan is not None, "no layer of this policy evicts"
        self.plan: LayerPlan = plan
        self.layers = tuple(index for index, other in enumerate(plans) if other == plan)
        query_heads = script.heads * script.group
        cpu = torch.device("cpu")
        spec = LayerSpec(script.heads, query_heads, 4, 4, plan.capacity, script.dtype, cpu)
        rows = [Row(seed=3 * r) for r in range(script.requests)]
        self.store = new_store(policy, plan, spec, self.layers, rows)
        random = torch.Generator().manual_seed(script.generator)
        made = (torch.randn(3, query_heads, 4, generator=random).to(script.dtype) for _ in self.layers)
        self.output, self.rotary = tuple(made), torch.rand(2, generator=random, dtype=torch.float64)
        self.logits = LogitSpec(
            0.5, num_layers=script.layers, num_heads=script.heads, output=self.output, rotary=self.rotary
        )

    def step(self, tokens: Tokens, counts: tuple[int, ...], decoding: bool) -> Event:
        """Take one step's tokens into every layer, and evict where it is due."""
        store = self.store
        after = [row.advanced(count, decoding=decoding) for row, count in zip(store.rows, counts, strict=True)]
        over = tuple(store.over_budget(after))
        filling = not decoding and any(over)
        if filling:
            store.settle()
        for index, layer in enumerate(self.layers):
            store.observe(index, tokens.queries[layer], counts)
            keys, values = tokens.keys[layer], tokens.values[layer]
            if filling:
                held_keys, held_values = store.in_use(index)
                keys, values = torch.cat([held_keys, keys], 2), torch.cat([held_values, values], 2)
                fill_from(store, index, keys, values, counts, after, self.logits_of(layer))
            else:
                store.append(index, keys, values, counts)
        seen = tuple(row.seen for row in after)
        if filling:
            store.advance(store.cut_rows(after))
            return Event(seen, True, over)
        store.advance(after)
        interval = self.plan.interval
        boundary = not decoding or (interval is not None and after[0].decoded % interval == 0)
        asked = boundary and (any(over) or "every_query" in self.policy.needs)
        if asked:
            evict(store, over, self.logits)
        return Event(seen, asked, over if asked else (False,) * len(over))

    def logits_of(self, layer: int) -> LogitSpec:
        """Return what the attention of one layer of the model does."""
        index = self.layers.index(layer)
        return dataclasses.replace(self.logits, output=self.output[index : index + 1])

    def kept(self, layer: int, request: int) -> tuple[frozenset[int], ...]:
        """Return the positions that each head of a row holds; some may not be settled yet."""
        self.store.settle()
        heads = self.store.in_order(self.layers.index(layer))[request].tolist()
        return tuple(frozenset(head) - {-1} for head in heads)

    def attend(self, layer: int, request: int, query: Tensor) -> Tensor:
        """Return the output of attention over the slots in use, in float64.

        Args:
            layer: of the model.
            request: which.
            query: ``[Hq, D]`` of the newest token.

        Returns:
            ``[Hq, Dv]``.
        """
        index, group = self.layers.index(layer), self.script.group
        self.store.settle()
        slots = self.store.slots(self.store.rows_of(index))
        parts = []
        for head, positions in enumerate(slots.positions[request]):
            used = positions >= 0
            keys, values = (x[request, head, used].to(torch.float64) for x in (slots.keys, slots.values))
            mine = query[head * group : (head + 1) * group].to(torch.float64)
            out = scaled_dot_product_attention(mine[None], keys[None], values[None], scale=self.logits.scaling)
            parts.append(out[0])
        return torch.cat(parts)
