"""The oracle: a policy on a cache that drops nothing, and hides what the policy has evicted behind a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.eviction import LogitSpec
from kvpolicy.output import OutputProjection
from kvpolicy.policy import EvictionPolicy, LayerPlan
from kvpolicy.testing.kept import Case
from kvpolicy.view import LayerSpec, StageState, State, View

__all__ = ["MaskedCache"]


class MaskedCache:
    """Hold every token that one layer of one request ever saw, and a mask of those that are alive.

    This is what a cache of yours is compared with: tell both the same tokens, and they must hold the same
    positions and attend to the same, up to rounding. Nothing is moved, and each eviction sorts anew; when a row
    is due is decided here from the plan alone. The checks ``check_store`` and ``check_oracle`` compare
    kvpolicy's own store with it.

    Args:
        policy: asked where a row is due.
        plan: of the layer, as ``policy.plan`` returns it.
        spec: heads, sizes and dtype; its capacity is not read.
        logits: what attention does to logits; ``output`` names one projection, ``sinks`` are ``[1, Hq]``.
        layer: which layer of the model.
        request: keys randomness.
        seed: keys randomness.

    Attributes:
        alive: ``[H, N]`` bool, of all ``N`` tokens in order.
        keys: ``[1, H, N, D]`` of all tokens.
        values: ``[1, H, N, Dv]``.
        state: what the policy remembers of each.

    >>> import torch
    >>> from kvpolicy import KeyNorm, LayerSpec, ModelSpec, Policy, TopK
    >>> from kvpolicy.eviction import LogitSpec
    >>> policy = Policy(KeyNorm() >> TopK(4), interval=2, recent=1)
    >>> spec = LayerSpec(2, 2, 8, 8, 6, torch.float32, torch.device("cpu"))
    >>> cache = MaskedCache(policy, policy.plan(ModelSpec(1)).layers[0], spec, LogitSpec(8**-0.5))
    >>> prompt = torch.randn(2, 7, 8)
    >>> _ = cache.step(prompt, prompt, prompt, decoding=False)
    >>> cache.alive.sum(-1).tolist(), cache.attend(prompt[:, -1:]).dtype
    ([4, 4], torch.float64)
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        plan: LayerPlan,
        spec: LayerSpec,
        logits: LogitSpec,
        *,
        layer: int = 0,
        request: int = 0,
        seed: int = 0,
    ) -> None:
        self.policy, self.plan, self.spec, self.logits = policy, plan, spec, logits
        self.layer, self.request, self.seed = layer, request, seed
        heads, dtype = spec.num_heads, spec.dtype
        self.alive = torch.zeros(heads, 0, dtype=torch.bool)
        self.keys = torch.zeros(1, heads, 0, spec.head_dim, dtype=dtype)
        self.values = torch.zeros(1, heads, 0, spec.value_dim, dtype=dtype)
        self.queries = torch.zeros(1, spec.num_query_heads, 0, spec.query_dim or spec.head_dim, dtype=dtype)
        self.prompt = self.decoded = self.evictions = self.told = 0
        self.budgets = torch.tensor([plan.heads or (plan.budget,) * heads])
        self.state = policy.init(self._spec(0), 1)

    @property
    def seen(self) -> int:
        """Return the tokens seen."""
        return self.alive.shape[1]

    @property
    def kept(self) -> tuple[frozenset[int], ...]:
        """Return the positions that each head holds."""
        return tuple(frozenset(head.nonzero()[:, 0].tolist()) for head in self.alive)

    def step(
        self, keys: Tensor, values: Tensor, queries: Tensor, *, decoding: bool, shown: bool = False
    ) -> Case | None:
        """Take new tokens, and evict where it is due: at the end of a turn, and every interval.

        Args:
            keys: ``[H, T, D]``.
            values: ``[H, T, Dv]``.
            queries: ``[Hq, T, D]``.
            decoding: they are decoded, and no turn of several tokens.
            shown: the policy sees this row in any case, as where another row of its batch is due.

        Returns:
            what the policy was asked and what it answered, or None.
        """
        count = keys.shape[1]
        if not decoding and self.prompt == self.seen:
            self.prompt += count
        before, self.decoded = self.decoded, self.decoded + count if decoding else 0
        self.keys = torch.cat([self.keys, keys[None]], 2)
        self.values = torch.cat([self.values, values[None]], 2)
        self.queries = torch.cat([self.queries, queries[None]], 2)
        self.alive = torch.cat([self.alive, self.alive.new_ones(len(self.alive), count)], 1)
        self.state = _joined(self.state, self.policy.init(self._spec(count), 1))
        interval = self.plan.interval
        boundary = not decoding or (interval is not None and self.decoded // interval > before // interval)
        due = boundary and bool((self.alive.sum(-1) > self.budgets[0]).any())
        if not due and not shown and not (boundary and "every_query" in self.policy.needs):
            return None
        view = self._view(due)
        keep, after = self.policy.select(view, self.state)
        case = Case(view, self.state, keep, after)
        if view.sharing is not None:
            self.budgets = keep.mask.sum(-1)
        self.alive, self.state = self.alive & keep.mask[0], after
        self.told, self.evictions = self.seen, self.evictions + due
        return case

    def attend(self, queries: Tensor) -> Tensor:
        """Return the output of attention over all tokens, evicted ones masked, in float64.

        Args:
            queries: ``[Hq, T, D]`` of the newest ``T`` tokens; each sees those before it, and itself.

        Returns:
            ``[Hq, T, Dv]``.
        """
        group, count = self.spec.num_query_heads // self.spec.num_heads, queries.shape[1]
        keys, values = (x[0].to(torch.float64).repeat_interleave(group, 0) for x in (self.keys, self.values))
        logits = queries.to(torch.float64) @ keys.mT * self.logits.scaling
        if self.logits.softcap is not None:
            logits = self.logits.softcap * torch.tanh(logits / self.logits.softcap)
        at = torch.arange(self.seen)
        visible = self.alive[:, None] & (at <= at[self.seen - count :, None])
        logits = logits.masked_fill(~visible.repeat_interleave(group, 0), -torch.inf)
        if self.logits.sinks is not None:
            sinks = self.logits.sinks[0].to(torch.float64)[:, None, None].expand(-1, count, -1)
            return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1] @ values
        return logits.softmax(-1) @ values

    def _spec(self, slots: int) -> LayerSpec:
        spec = self.spec
        dims = (spec.head_dim, spec.value_dim)
        return LayerSpec(spec.num_heads, spec.num_query_heads, *dims, slots, spec.dtype, spec.device)

    def _view(self, due: bool) -> View:
        """Return all tokens as slots, of which those that are not alive are free."""
        plan, heads, size = self.plan, len(self.alive), self.seen
        lengths, at = self.alive.sum(-1)[None], torch.arange(size)
        budget = self.budgets if due else lengths
        again = plan.refresh is not None and self.evictions % plan.refresh == 0
        sharing = plan.shared and due and (not self.evictions or again)
        absent = max(0, plan.window - size)
        asked = torch.cat([torch.full((absent,), -1), at[max(0, size - plan.window) :]]).to(torch.int32)
        queries = self.queries[:, :, max(0, size - plan.window) :]
        queries = torch.nn.functional.pad(queries, (0, 0, absent, 0))
        order = torch.where(self.alive, at, size).argsort(dim=-1, stable=True)
        logits = self.logits
        return View(
            keys=self.keys,
            values=self.values,
            positions=torch.where(self.alive, at, -1).to(torch.int32)[None],
            order=order.to(torch.int32)[None],
            fresh=at[self.told :].expand(1, heads, -1),
            budget=budget,
            lengths=lengths,
            seen=torch.tensor([size]),
            prompt_length=torch.tensor([self.prompt]),
            evictions=torch.tensor([self.evictions]),
            request=torch.tensor([self.request]),
            seed=torch.tensor([self.seed]),
            layer=torch.tensor([self.layer]),
            recent=plan.recent,
            max_budget=int((lengths if sharing else budget).max()),
            max_victims=max(0, int((lengths if sharing else lengths - budget).max())),
            queries=queries if plan.window else None,
            query_positions=asked[None] if plan.window else None,
            num_layers=logits.num_layers,
            num_heads=heads,
            scaling=logits.scaling,
            softcap=logits.softcap,
            sink_logits=logits.sinks,
            output=None if logits.output is None else OutputProjection(logits.output, (0,)),
            rotary=None if logits.rotary is None else logits.rotary[None],
            sharing=torch.tensor([True]) if sharing else None,
        )


def _joined(state: State, new: State) -> State:
    """Return what is remembered of old slots, and then of new ones."""
    return tuple(
        None
        if held is None or more is None
        else StageState(
            tuple(torch.cat([a, b], 2) for a, b in zip(held.slots, more.slots, strict=True)),
            held.rows,
        )
        for held, more in zip(state, new, strict=True)
    )
