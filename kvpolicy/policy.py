"""Policies: when to evict, how much to keep, and the chain that decides what."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvpolicy import _check
from kvpolicy.errors import BudgetError, CompositionError
from kvpolicy.scorers.attention import Attention
from kvpolicy.scores import Keep, Scores
from kvpolicy.stage import Chain, Piped, Scorer, Selector, Stage, Transform, Transforms, describe
from kvpolicy.view import LayerSpec, State, View

__all__ = ["EvictionPolicy", "LayerPlan", "ModelSpec", "Plan", "Policy"]


@dataclass(frozen=True)
class ModelSpec:
    """Describe a model to a policy that plans for it.

    Attributes:
        num_layers: layers whose cache may be evicted, in order.
        max_new_tokens: tokens that will be decoded at most, if the caller knows.
        num_heads: KV heads of each layer, if the caller knows.
    """

    num_layers: int
    max_new_tokens: int | None = None
    num_heads: int | None = None

    def __post_init__(self) -> None:
        _check.integer(self, "num_layers", self.num_layers, 1)
        if self.max_new_tokens is not None:
            _check.integer("EvictionCache", "max_new_tokens", self.max_new_tokens, 1)


@dataclass(frozen=True)
class LayerPlan:
    """Fix the sizes of one layer, when a policy is bound.

    Attributes:
        budget: slots kept per KV head after an eviction; where heads differ, of the largest, or the mean where
            the policy shares them out.
        capacity: slots allocated per KV head, of which ``capacity - budget`` beyond its budget; never grown.
        interval: decoded tokens between two evictions, or None: evict at the end of a turn only.
        recent: the last tokens, never candidates.
        window: queries that the observation window must hold; 0 for none.
        heads: slots that each KV head keeps, where they differ from the start.
        shared: the policy shares the layer's slots over its heads, at a row's first eviction.
        refresh: evictions after which it shares them again, or None for never.
    """

    budget: int
    capacity: int
    interval: int | None
    recent: int
    window: int
    heads: tuple[int, ...] | None = None
    shared: bool = False
    refresh: int | None = None

    @property
    def head_wise(self) -> bool:
        """Return whether heads of this layer may keep different numbers of slots."""
        return self.shared or self.heads is not None

    def __post_init__(self) -> None:
        for name, low in (("budget", 1), ("capacity", 1), ("recent", 0), ("window", 0)):
            _check.integer(self, name, getattr(self, name), low)
        if self.interval is not None:
            _check.integer(self, "interval", self.interval, 1)
        least = min(self.heads) if self.heads is not None else self.budget
        if self.heads is not None and (self.shared or max(self.heads) != self.budget):
            raise BudgetError(f"{self}: heads with budgets of their own share nothing, and the largest is the budget")
        if self.recent >= least:
            where = "" if self.heads is None else "the KV head with the fewest slots: "
            raise BudgetError(
                f"{where}a budget of {least} is not larger than recent={self.recent}: nothing but the last tokens "
                f"could stay; raise the budget, or lower recent, to {least // 4} say"
            )
        grown, why = (1, "one more token") if self.interval is None else (self.interval, f"interval={self.interval}")
        if self.capacity < self.budget + grown:
            raise BudgetError(
                f"a capacity of {self.capacity} does not hold a budget of {self.budget} and {why}; write "
                f"LayerPlan(..., capacity={self.budget + grown}) or more"
            )


@dataclass(frozen=True)
class Plan:
    """Fix the sizes of every layer; None where a layer is left alone."""

    layers: tuple[LayerPlan | None, ...]


@runtime_checkable
class EvictionPolicy(Protocol):
    """Be what an adapter asks for; :class:`Policy` is one implementation.

    A third party may write another in one class, without the algebra, and every adapter takes it::

        class KeepNewest:
            needs = frozenset()

            def __init__(self, budget):
                self.budget = budget

            def plan(self, model):
                layer = LayerPlan(self.budget, self.budget + 64, interval=64, recent=1, window=0)
                return Plan((layer,) * model.num_layers)

            def init(self, spec, rows):
                return ()

            def select(self, view, state):
                return select_top(Scores.of(view, view.positions, weights=False), view, view.budget), state
    """

    @property
    def needs(self) -> frozenset[str]:
        """Return the names of what the engine must offer; see ``Stage.needs``."""
        ...

    def plan(self, model: ModelSpec) -> Plan:
        """Return the sizes of every layer; called once, when bound."""
        ...

    def init(self, spec: LayerSpec, rows: int) -> State:
        """Return the state of ``rows`` empty rows."""
        ...

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        """Return the slots to keep, and the state of the view's slots before any is dropped."""
        ...


@dataclass(frozen=True, repr=False, init=False)
class Policy:
    """Evict by a chain of stages.

    A chain that begins with a transform, or is a selector alone, begins with ``Attention()``. A
    row is cut to its budget at the end of its prompt and of each later turn of several tokens,
    and then after every ``interval`` decoded tokens, where it holds more. It never holds more
    than budget + interval.

    Args:
        chain: ends with a selector.
        interval: decoded tokens between two evictions; None evicts at the end of a turn only.
        recent: the last tokens, never evicted; they count inside the budget.

    Raises:
        CompositionError: the chain is not complete.
        ParameterError: a parameter is out of its range.

    >>> from kvpolicy import Policy, Stochastic, TopK, ValueGuard
    >>> policy = Policy(ValueGuard() >> Stochastic(tau=1.0) >> TopK(1024))
    >>> policy == Policy.parse("ValueGuard() >> Stochastic(1.0) >> TopK(1024)") == eval(repr(policy))
    True
    """

    chain: Chain
    interval: int | None = 64
    recent: int = 64

    def __init__(self, chain: Chain | Selector, *, interval: int | None = 64, recent: int = 64) -> None:
        if isinstance(chain, Selector):
            chain = Chain(None, None, chain)
        if not isinstance(chain, Chain):
            ends = isinstance(chain, Scorer | Transform)
            why = (
                f"no selector ends it; write {chain!r} >> TopK(budget)" if ends else "a policy takes a chain of stages"
            )
            raise CompositionError(f"Policy({describe(chain)}): {why}")
        if chain.scorer is None:
            chain = dataclasses.replace(chain, scorer=Attention())
        if interval is not None:
            _check.integer(self, "interval", interval, 1)
        _check.integer(self, "recent", recent, 1)
        object.__setattr__(self, "chain", chain)
        object.__setattr__(self, "interval", interval)
        object.__setattr__(self, "recent", recent)

    @staticmethod
    def parse(text: str) -> Policy:
        """Read a policy, a bare chain, or the call of a registered recipe, without ``eval``.

        Raises:
            ParseError: the text is not a policy; it names the nearest thing that would be.

        >>> Policy.parse("vase(1024)")
        Policy(ValueGuard() >> Stochastic() >> TopK(1024))
        """
        from kvpolicy.grammar import parse

        return parse(text)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the leaves of the chain, in the order of their states."""
        return tuple(leaf for part in self.chain.parts() for leaf in part.leaves())

    @property
    def needs(self) -> frozenset[str]:
        """Return what the stages need of an engine, and ``"head_budgets"`` where heads keep different numbers."""
        sharing = self.chain.selector.sharing()
        head_wise = {"head_budgets"} if sharing is not None and sharing.head_wise else set[str]()
        return frozenset(head_wise).union(*(stage.needs for stage in self.stages))

    def plan(self, model: ModelSpec) -> Plan:
        """Return the sizes of every layer.

        Raises:
            BudgetError: guards and recent tokens cannot fit into a budget, or ``interval=None``
                and nobody says how many tokens will be decoded.
        """
        grown = self.interval if self.interval is not None else model.max_new_tokens
        if grown is None:
            raise BudgetError(
                f"{self!r} evicts at the end of a turn only: say how many tokens will be decoded (max_new_tokens=...)"
            )
        window = max(stage.queries_read(self.interval) for stage in self.stages)
        sharing = self.chain.selector.sharing()
        layers: list[LayerPlan | None] = []
        budgets = self.chain.selector.budgets(model.num_layers, self.recent)
        for number, budget in enumerate(budgets):
            if budget is None:
                layers.append(None)
                continue
            where = "" if len(set(budgets)) == 1 else f"layer {number} of the {len(budgets)} that may evict: "
            heads = budget if isinstance(budget, tuple) else None
            if heads is not None and model.num_heads not in (None, len(heads)):
                raise BudgetError(
                    f"{sharing!r} names {len(heads)} heads, and the model has {model.num_heads} KV heads in a layer"
                )
            most, least = (max(budget), min(budget)) if isinstance(budget, tuple) else (budget, budget)
            if isinstance(budget, tuple) and most != least:
                where = f"{where}the KV head with the fewest slots: "
            self._check_budget(least, where)
            if sharing is not None and (fewest := sharing.least(least, self.recent)) != least:
                self._check_guards(fewest, f"{where}{sharing!r} may leave a head with {fewest} slots: ")
            layer = LayerPlan(most, most + grown, self.interval, self.recent, window, heads)
            if sharing is not None and sharing.shared:
                layer = dataclasses.replace(layer, shared=True, refresh=sharing.refresh)
            layers.append(layer)
        return Plan(tuple(layers))

    def guarded(self, budget: int) -> tuple[int, int]:
        """Return how many slots of a budget the guards protect together: for certain, and at most.

        Guards may protect the same tokens, so that one number does not follow from what each protects
        alone. What cannot fit for certain, :meth:`plan` refuses. Where more than the budget may be
        protected, the data decide: the highest tiers stay, then the highest scores, and the receipt counts
        the guarded tokens that had to go.

        >>> from kvpolicy import Policy, Prompt, Sinks, TopK, ValueGuard
        >>> Policy(Prompt(0.5) >> Sinks(8) >> ValueGuard(0.5) >> TopK(1024)).guarded(1024)
        (512, 1020)
        """
        sizes = (budget, self.recent)
        every = [(stage.reserved_most(*sizes), stage.reserved_first(*sizes)) for stage in self.stages]
        first = max(first for _, first in every)
        return _reserved(self.chain, *sizes), first + sum(total - mine for total, mine in every)

    def init(self, spec: LayerSpec, rows: int) -> State:
        """Return the states of the stages for ``rows`` empty rows."""
        return tuple(stage.init(spec, rows) for stage in self.stages)

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        """Return what the chain keeps, and the states after reading the view."""
        state = tuple(
            stage.update(view.at(index), held)
            for index, (stage, held) in enumerate(zip(self.stages, state, strict=True))
        )
        return self.chain.selector.select(self.scores(view, state), view), state

    def scores(self, view: View, state: State) -> Scores:
        """Return the scores from which the selector picks, and how each slot is protected.

        Args:
            view: of what the cache holds.
            state: of the stages, after they have read the view, as :meth:`select` returns it.
        """
        scorer, transform = self.chain.scorer, self.chain.transform
        assert scorer is not None
        scores = scorer.score_with(view.at(0), state)
        if transform is None:
            return scores
        return transform.apply_with(scores, view.at(sum(1 for _ in scorer.leaves())), state)

    def _check_budget(self, budget: int, where: str) -> None:
        """Refuse a budget that holds the last tokens alone, or has no room for the guards."""
        if budget <= self.recent:
            raise BudgetError(
                f"{where}a budget of {budget} is not larger than recent={self.recent}: nothing but the last tokens "
                f"could stay; raise the budget, or write Policy(..., recent={max(1, budget // 4)})"
            )
        self._check_guards(budget, where)

    def _check_guards(self, budget: int, where: str) -> None:
        guarded, _ = self.guarded(budget)
        if guarded + self.recent <= budget:
            return
        each = {stage: stage.reserved(budget, self.recent) for stage in self.stages}
        alone = [f"{stage!r} protects" for stage, count in each.items() if count == guarded]
        together = " and ".join(repr(stage) for stage, count in each.items() if count)
        shared = self.chain.selector.sharing()
        more = " or the floor" if shared is not None and shared.shared else ""
        raise BudgetError(
            f"{where}{alone[0] if alone else f'{together} protect'} {guarded} slots and recent={self.recent} more, "
            f"which do not fit into a budget of {budget}; raise the budget{more} so that it is at least "
            f"{guarded + self.recent}, or protect less"
        )

    def text(self, *, full: bool = False) -> str:
        """Return text that evaluates back to an equal policy.

        Args:
            full: write every parameter, as receipts do, since defaults may change.
        """
        chain = self.chain
        if chain.scorer == Attention() and not full:
            chain = Chain(None, chain.transform, chain.selector)
        words = [chain.text(full=full)]
        words += [f"interval={self.interval}"] if full or self.interval != 64 else []
        words += [f"recent={self.recent}"] if full or self.recent != 64 else []
        return f"Policy({', '.join(words)})"

    def __repr__(self) -> str:
        """Return text that evaluates back to an equal policy, without what equals a default."""
        return self.text()


def _reserved(node: Stage | Chain, budget: int, recent: int, before: int = 0) -> int:
    """Return how many slots are protected for certain behind ``node``, where ``before`` are in front of it."""
    if isinstance(node, Chain | Piped | Transforms):
        for part in node.parts():
            before = _reserved(part, budget, recent, before)
        return before
    if parts := node.parts():  # beside each other: what they protect may be the same
        return max(before, *(_reserved(part, budget, recent) for part in parts))
    own = node.reserved(budget, recent)
    return before + own if node.additive else max(before, own)
