"""A conversation of random tokens, told to a store and to a cache that is too simple to be wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.eviction import LogitSpec, evict, fill_from
from kvpolicy.output import OutputProjection
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec
from kvpolicy.ragged import new_store
from kvpolicy.row import Row
from kvpolicy.scores import Keep
from kvpolicy.testing.kept import Case
from kvpolicy.view import LayerSpec, StageState, State, View

__all__ = ["Event", "OrderedCache", "Script", "StoreCache", "Tokens"]


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
                logits = dataclasses.replace(self.logits, output=self.output[index : index + 1])
                fill_from(store, index, keys, values, counts, after, logits)
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

    def kept(self, layer: int, request: int) -> tuple[frozenset[int], ...]:
        """Return the positions that each head of a row holds; some may not be settled yet."""
        self.store.settle()
        heads = self.store.in_order(self.layers.index(layer))[request].tolist()
        return tuple(frozenset(head) - {-1} for head in heads)


class OrderedCache:
    """Hold one row in position order, gathered anew at every eviction.

    Args:
        policy: asked when the step says so.
        like: the cache that this one mirrors.
        layer: which layer of the model.
        request: which request.
    """

    def __init__(self, policy: EvictionPolicy, like: StoreCache, layer: int, request: int) -> None:
        self.policy, self.like, self.layer, self.request = policy, like, layer, request
        heads, script = like.script.heads, like.script
        self.keys = torch.zeros(1, heads, 0, 4, dtype=script.dtype)
        self.values, self.positions = self.keys, torch.zeros(1, heads, 0, dtype=torch.int32)
        self.queries = torch.zeros(1, heads * script.group, 0, 4, dtype=script.dtype)
        self.seen = self.prompt = self.evictions = self.fresh = 0
        plan = like.plan
        self.budgets = torch.tensor([plan.heads or (plan.budget,) * heads])
        self.state = policy.init(self._spec(0), 1)

    def step(self, tokens: Tokens, count: int, decoding: bool, asked: bool, due: bool) -> Case | None:
        """Take one step's tokens; return what the policy was asked and answered, if it was."""
        here, new = (self.layer, slice(self.request, self.request + 1)), slice(-count, None)
        if not decoding and self.prompt == self.seen:
            self.prompt += count
        if count:
            at = torch.arange(self.seen, self.seen + count, dtype=torch.int32)
            at = at.expand(1, self.positions.shape[1], -1)
            self.keys = torch.cat([self.keys, tokens.keys[here][:, :, new]], 2)
            self.values = torch.cat([self.values, tokens.values[here][:, :, new]], 2)
            self.queries = torch.cat([self.queries, tokens.queries[here][:, :, new]], 2)
            self.positions = torch.cat([self.positions, at], 2)
        self.state = _joined(self.state, self.policy.init(self._spec(count), 1))
        self.seen, self.fresh = self.seen + count, self.fresh + count
        if not asked:
            return None
        view = self._view(due)
        keep, after = self.policy.select(view, self.state)
        case = Case(view, self.state, keep, after)
        if view.sharing is not None:
            self.budgets = keep.mask.sum(-1)
        self._drop(keep, after)
        self.fresh, self.evictions = 0, self.evictions + due
        return case

    def _spec(self, slots: int) -> LayerSpec:
        spec = self.like.store.spec
        queries, dims = spec.num_query_heads, (spec.head_dim, spec.value_dim)
        return LayerSpec(spec.num_heads, queries, *dims, slots, spec.dtype, spec.device)

    def _view(self, due: bool) -> View:
        plan, (_, heads, size) = self.like.plan, self.positions.shape
        lengths = (self.positions >= 0).sum(-1)
        budget = self.budgets if due else lengths
        again = plan.refresh is not None and self.evictions % plan.refresh == 0
        sharing = plan.shared and due and (not self.evictions or again)
        window = plan.window
        queries = self.queries[:, :, max(0, self.queries.shape[2] - window) :]
        absent = window - queries.shape[2]
        asked = torch.arange(self.seen - queries.shape[2], self.seen)
        asked = torch.cat([torch.full((absent,), -1), asked]).to(torch.int32)[None]
        queries = torch.cat([queries.new_zeros(1, queries.shape[1], absent, 4), queries], 2)
        slots = torch.arange(size).expand(1, heads, size)
        order = torch.where(self.positions < 0, torch.iinfo(torch.int32).max, self.positions).argsort(
            dim=-1, stable=True
        )
        return View(
            keys=self.keys,
            values=self.values,
            positions=self.positions,
            order=order.to(torch.int32),
            fresh=slots[:, :, size - self.fresh :],
            budget=budget,
            lengths=lengths,
            seen=torch.tensor([self.seen]),
            prompt_length=torch.tensor([self.prompt]),
            evictions=torch.tensor([self.evictions]),
            request=torch.tensor([0]),
            seed=torch.tensor([3 * self.request]),
            layer=torch.tensor([self.layer]),
            recent=plan.recent,
            max_budget=int((lengths if sharing else budget).max()),
            max_victims=max(0, int((lengths if sharing else lengths - budget).max())),
            queries=queries if window else None,
            query_positions=asked if window else None,
            num_layers=self.like.script.layers,
            num_heads=heads,
            scaling=self.like.logits.scaling,
            output=OutputProjection(self.like.output, (self.like.layers.index(self.layer),)),
            rotary=self.like.rotary[None],
            sharing=torch.tensor([True]) if sharing else None,
        )

    def _drop(self, keep: Keep, state: State) -> None:
        most = int(keep.mask.sum(-1).max())
        # The slots kept, in position order; heads that keep fewer are filled up.
        place = torch.where(keep.mask, self.positions, torch.iinfo(torch.int32).max)
        at = place.argsort(dim=-1, stable=True)[..., :most]
        free = ~keep.mask.gather(-1, at)

        def pick(x: Tensor) -> Tensor:
            return x.gather(2, at.view(*at.shape, *[1] * (x.dim() - 3)).expand(*at.shape, *x.shape[3:]))

        def remembered(x: Tensor) -> Tensor:
            return pick(x).masked_fill(free.view(*free.shape, *[1] * (x.dim() - 3)), 0)

        self.keys, self.values = pick(self.keys), pick(self.values)
        self.positions = pick(self.positions).masked_fill(free, -1)
        self.state = tuple(
            None if held is None else StageState(tuple(map(remembered, held.slots)), held.rows) for held in state
        )


def _joined(state: State, new: State) -> State:
    return tuple(
        None
        if held is None or more is None
        else StageState(
            tuple(torch.cat([a, b], 2) for a, b in zip(held.slots, more.slots, strict=True)),
            held.rows,
        )
        for held, more in zip(state, new, strict=True)
    )
