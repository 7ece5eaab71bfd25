"""The algebra: three roles of stages, and how they compose.

::

    Scorer     score(view, state)          -> Scores
    Transform  apply(scores, view, state)  -> Scores     guards, samplers, normalisation
    Selector   select(scores, view)        -> Keep

``scorer >> transform >> selector`` is a chain; ``+``, ``*`` and :func:`maximum` mix scorers.
Stages are frozen dataclasses: parameters in the constructor and nowhere else. What is illegal is
refused by the type checker and, with a message that names both stages, at construction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, overload

import torch

from kvpolicy.errors import CompositionError, ParameterError
from kvpolicy.scores import Keep, Scores
from kvpolicy.view import LayerSpec, StageState, State, View

if TYPE_CHECKING:
    from kvpolicy.allocators import Allocator, Budget

__all__ = ["Chain", "Scorer", "Selector", "Stage", "Transform", "maximum"]


class Stage:
    """Be a node of the algebra: a leaf, or leaves composed.

    Attributes:
        needs: names of what the engine must offer: ``"queries"`` (the observation window),
            ``"every_query"`` (it asks at every interval, even where nothing has to go, so that no
            query leaves the window unseen), ``"cross_heads"`` (a reduction over heads that may
            live on other devices), ``"output_projection"`` (the weights that turn values into the
            output of a layer), ``"rotary"`` (by how much positions turn queries and keys).
        additive: a guard whose slots are none of those that stages before it protect.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    additive: ClassVar[bool] = False

    def queries_read(self, interval: int | None) -> int:
        """Return how many of the newest queries this stage reads, evicting every ``interval`` tokens."""
        return 0

    def reserved(self, budget: int, recent: int) -> int:
        """Return how many slots of ``budget`` this stage protects in every case, beside the last ``recent`` tokens."""
        return 0

    def reserved_most(self, budget: int, recent: int) -> int:
        """Return how many it protects at most, where the data decide."""
        return self.reserved(budget, recent)

    def reserved_first(self, budget: int, recent: int) -> int:
        """Return how many of these are the first tokens of the sequence, which other guards may share."""
        return 0

    def init(self, spec: LayerSpec, rows: int) -> StageState | None:
        """Return what this stage remembers about ``rows`` empty rows, or None."""
        return None

    def update(self, view: View, state: StageState | None) -> StageState | None:
        """Return the state after reading the view; runs before scoring, which only reads.

        It may run more often than evictions, also on rows that lose nothing. So that a row does not
        depend on its neighbours, let it depend on ``view.fresh``, the slots that it has not seen.
        """
        return state

    def parts(self) -> tuple[Stage, ...]:
        """Return the stages that this one is made of; a leaf has none."""
        return ()

    def leaves(self) -> Iterator[Stage]:
        """Yield the leaves in the order in which their states stand."""
        parts = self.parts()
        if not parts:
            yield self
        for part in parts:
            yield from part.leaves()

    def text(self, *, full: bool = False) -> str:
        """Return text that evaluates back to an equal stage.

        Args:
            full: write every parameter, since defaults may change; otherwise what differs from them.
        """
        return call_text(self, full=full)

    def __bool__(self) -> NoReturn:
        """Refuse: ``and``, ``or`` and ``not`` would drop a stage."""
        raise CompositionError(f"{self!r} is neither true nor false: compose with >>, + and maximum(), not and, or")

    def __rrshift__(self, other: NoReturn) -> NoReturn:
        """Refuse: what stands before a stage is a stage, and not its class."""
        _refuse(other, self, _why_not(other, self))

    def __repr__(self) -> str:
        """Return text that evaluates back to an equal stage, without what equals a default."""
        return self.text()


def call_text(node: Any, *, full: bool = False) -> str:
    """Return ``Name(required, option=value)`` for a dataclass, in full or without defaults."""
    words: list[str] = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if not field.init:
            continue
        default = default_of(field)
        if default is dataclasses.MISSING and not field.kw_only:
            words.append(repr(value))
        elif full or value != default:
            words.append(f"{field.name}={value!r}")
    return f"{type(node).__name__}({', '.join(words)})"


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field, ``dataclasses.MISSING`` where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def describe(node: object) -> str:
    """Return how a message names a stage, or whatever stands in its place."""
    if isinstance(node, type) and issubclass(node, Stage):
        return f"the class {node.__name__} (write {node.__name__}() with brackets)"
    return repr(node) if isinstance(node, Stage | Chain) else f"{node!r} of type {type(node).__name__}"


def _refuse(left: object, right: object, why: str) -> NoReturn:
    raise CompositionError(f"{describe(left)} >> {describe(right)}: {why}")


def _why_not(left: object, right: object) -> str:
    """Explain why ``left >> right`` is not a chain, and what to write instead."""
    if isinstance(left, Chain | Selector) and isinstance(right, Chain | Selector):
        return "a chain has one selector, at its end; write one of them"
    if isinstance(left, Chain | Selector):
        return f"{left!r} is a selector, and a selector ends a chain; put {describe(right)} before it"
    if isinstance(right, Scorer):
        if isinstance(left, Scorer):
            return "both are scorers; mix them with + or maximum(a, b), and put transforms behind them"
        return f"a scorer begins a chain; write {describe(right)} >> {describe(left)}"
    if isinstance(right, int) and not isinstance(right, bool):
        return f"a chain ends with a selector; write >> TopK({right})"
    if not isinstance(left, Stage):
        return "only a stage can stand here: a scorer or a transform"
    return "only a stage can follow here: a transform or a selector"


class Scorer(Stage):
    """Give every slot a number; higher is kept.

    A subclass is a frozen dataclass with a ``score`` method::

        @dataclass(frozen=True, repr=False)
        class Youngest(Scorer):
            def score(self, view, state):
                return Scores.of(view, view.positions, weights=False)
    """

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the scores of the view's slots."""
        raise NotImplementedError(f"{type(self).__name__} has no score(view, state)")

    def score_with(self, view: View, states: State) -> Scores:
        """Return the scores, given the states of all leaves of this node."""
        return _scores(self, "score", self.score(view, states[view.stage]))

    @overload
    def __rshift__(self, other: Transform) -> Scorer: ...
    @overload
    def __rshift__(self, other: Selector) -> Chain: ...
    @overload
    def __rshift__(self, other: Chain) -> Chain: ...
    def __rshift__(self, other: Transform | Selector | Chain) -> Scorer | Chain:
        """Return this scorer followed by a transform or a selector."""
        if isinstance(other, Transform):
            return Piped(self, other)
        if isinstance(other, Selector):
            return Chain(self, None, other)
        if isinstance(other, Chain) and other.scorer is None:
            head = self if other.transform is None else Piped(self, other.transform)
            return Chain(head, None, other.selector)
        if isinstance(other, Chain):
            _refuse(self, other, f"{other!r} begins with a scorer of its own; mix the two with +")
        _refuse(self, other, _why_not(self, other))

    def __add__(self, other: Scorer) -> Scorer:
        """Return the sum of two scorers; put them on one scale with ``Normalize`` first."""
        if not isinstance(other, Scorer):
            raise CompositionError(
                f"{describe(self)} + {describe(other)}: + mixes two scorers; a transform stands behind them with >>"
            )
        return Sum(self, other)

    def __mul__(self, factor: Scorer | float) -> Scorer:
        """Return this scorer times a number, or times another scorer."""
        if isinstance(factor, Scorer):
            return Product(self, factor)
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise CompositionError(
                f"{describe(self)} * {describe(factor)}: a scorer is multiplied by a number or by another scorer"
            )
        return Scaled(float(factor), self)

    def __rmul__(self, factor: float) -> Scorer:
        """Return this scorer times a number."""
        return self * factor


class Transform(Stage):
    """Change scores or tiers: a guard, a sampler, a normalisation."""

    def apply(self, scores: Scores, view: View, state: StageState | None) -> Scores:
        """Return the transformed scores."""
        raise NotImplementedError(f"{type(self).__name__} has no apply(scores, view, state)")

    def apply_with(self, scores: Scores, view: View, states: State) -> Scores:
        """Return the transformed scores, given the states of all leaves of this node."""
        return _scores(self, "apply", self.apply(scores, view, states[view.stage]))

    @overload
    def __rshift__(self, other: Transform) -> Transform: ...
    @overload
    def __rshift__(self, other: Selector) -> Chain: ...
    @overload
    def __rshift__(self, other: Chain) -> Chain: ...
    def __rshift__(self, other: Transform | Selector | Chain) -> Transform | Chain:
        """Return this transform followed by another or by a selector."""
        if isinstance(other, Transform):
            return Transforms((*self.sequence(), *other.sequence()))
        if isinstance(other, Selector):
            return Chain(None, self, other)
        if isinstance(other, Chain) and other.scorer is None:
            return Chain(None, self if other.transform is None else self >> other.transform, other.selector)
        if isinstance(other, Chain):
            _refuse(self, other, f"{other.scorer!r} is a scorer, and a scorer begins a chain")
        _refuse(self, other, _why_not(self, other))

    def sequence(self) -> tuple[Transform, ...]:
        """Return the transforms one after another."""
        return (self,)


class Selector(Stage):
    """Decide which slots stay, given their scores."""

    def budgets(self, num_layers: int, recent: int) -> tuple[Budget, ...]:
        """Return the slots that each KV head of each layer keeps; None leaves a layer alone."""
        raise NotImplementedError(f"{type(self).__name__} has no budgets(num_layers, recent)")

    def sharing(self) -> Allocator | None:
        """Return what shares slots over layers and heads, or None where every head keeps as many."""
        return None

    def select(self, scores: Scores, view: View) -> Keep:
        """Return the slots to keep: ``min(budget, valid)`` of each head."""
        raise NotImplementedError(f"{type(self).__name__} has no select(scores, view)")

    def __rshift__(self, other: NoReturn) -> NoReturn:
        """Refuse: a selector ends a chain."""
        _refuse(self, other, _why_not(self, other))


@dataclass(frozen=True, repr=False)
class Transforms(Transform):
    """Apply transforms one after another."""

    steps: tuple[Transform, ...]

    def parts(self) -> tuple[Stage, ...]:
        """Return the transforms."""
        return self.steps

    def sequence(self) -> tuple[Transform, ...]:
        """Return the transforms one after another."""
        return self.steps

    def apply_with(self, scores: Scores, view: View, states: State) -> Scores:
        """Return the scores after every transform."""
        for step, at in zip(self.steps, _starts(self, view.stage), strict=True):
            scores = step.apply_with(scores, view.at(at), states)
        return scores

    def text(self, *, full: bool = False) -> str:
        """Return the steps joined by ``>>``."""
        return " >> ".join(step.text(full=full) for step in self.steps)


@dataclass(frozen=True, repr=False, init=False)
class Piped(Scorer):
    """Transform what a scorer says, so that it can be mixed with others."""

    scorer: Scorer
    transform: Transform

    def __init__(self, scorer: Scorer, transform: Transform) -> None:
        if isinstance(scorer, Piped):  # (a >> b) >> c is a >> (b >> c)
            inner = scorer
            scorer, transform = inner.scorer, inner.transform >> transform
        object.__setattr__(self, "scorer", scorer)
        object.__setattr__(self, "transform", transform)

    def parts(self) -> tuple[Stage, ...]:
        """Return the scorer and the transforms."""
        return (self.scorer, self.transform)

    def score_with(self, view: View, states: State) -> Scores:
        """Return the transformed scores."""
        first, second = _starts(self, view.stage)
        scores = self.scorer.score_with(view.at(first), states)
        return self.transform.apply_with(scores, view.at(second), states)

    def text(self, *, full: bool = False) -> str:
        """Return ``scorer >> transform``."""
        return f"{bracketed(self.scorer, full, Sum)} >> {self.transform.text(full=full)}"


@dataclass(frozen=True, repr=False)
class Sum(Scorer):
    """Add what two scorers say."""

    left: Scorer
    right: Scorer

    def parts(self) -> tuple[Stage, ...]:
        """Return both scorers."""
        return (self.left, self.right)

    def score_with(self, view: View, states: State) -> Scores:
        """Return the sum; weights if both are weights, else logits."""
        return _mix(self, view, states, torch.add)

    def text(self, *, full: bool = False) -> str:
        """Return ``left + right``."""
        return f"{bracketed(self.left, full, Piped)} + {bracketed(self.right, full, Piped, Sum)}"


@dataclass(frozen=True, repr=False)
class Product(Scorer):
    """Multiply what two scorers say.

    Meant for weights, such as attention times the size of a value. Two scores below zero have a
    product above it: take the minus sign of one of two logits out first.
    """

    left: Scorer
    right: Scorer

    def parts(self) -> tuple[Stage, ...]:
        """Return both scorers."""
        return (self.left, self.right)

    def score_with(self, view: View, states: State) -> Scores:
        """Return the product; weights if both are weights, else logits."""
        return _mix(self, view, states, torch.mul)

    def text(self, *, full: bool = False) -> str:
        """Return ``left * right``."""
        right = bracketed(self.right, full, Piped, Sum, Scaled, Product)
        return f"{bracketed(self.left, full, Piped, Sum)} * {right}"


@dataclass(frozen=True, repr=False)
class Maximum(Scorer):
    """Take the larger of what two scorers say."""

    left: Scorer
    right: Scorer

    def parts(self) -> tuple[Stage, ...]:
        """Return both scorers."""
        return (self.left, self.right)

    def score_with(self, view: View, states: State) -> Scores:
        """Return the maximum; weights if both are weights, else logits."""
        return _mix(self, view, states, torch.maximum)

    def text(self, *, full: bool = False) -> str:
        """Return ``maximum(left, right)``."""
        return f"maximum({self.left.text(full=full)}, {self.right.text(full=full)})"


@dataclass(frozen=True, repr=False)
class Scaled(Scorer):
    """Multiply what a scorer says by a number.

    Args:
        factor: what scores are multiplied by.
        scorer: whose scores they are.
    """

    factor: float
    scorer: Scorer

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise ParameterError(f"{self.factor} * {self.scorer!r}: the factor must be finite")

    def parts(self) -> tuple[Stage, ...]:
        """Return the scorer."""
        return (self.scorer,)

    def score_with(self, view: View, states: State) -> Scores:
        """Return the product; weights stay weights under a non-negative factor."""
        scores = self.scorer.score_with(view, states)
        return scores.replace(scores.values * self.factor, weights=scores.weights and self.factor >= 0)

    def text(self, *, full: bool = False) -> str:
        """Return ``factor * scorer``."""
        return f"{self.factor!r} * {bracketed(self.scorer, full, Piped, Sum, Scaled, Product)}"


def maximum(left: Scorer, right: Scorer) -> Scorer:
    """Return the scorer that gives each slot the larger of two scores.

    >>> from kvpolicy import KeyNorm, Recency
    >>> maximum(KeyNorm(), Recency())
    maximum(KeyNorm(), Recency())
    """
    for one in (left, right):
        if not isinstance(one, Scorer):
            raise CompositionError(f"maximum({describe(left)}, {describe(right)}): both must be scorers")
    return Maximum(left, right)


@dataclass(frozen=True, repr=False)
class Chain:
    """Hold a complete chain: a scorer, transforms and the selector that ends it.

    Attributes:
        scorer: None until a policy puts ``Attention()`` there.
        transform: None where nothing stands between scorer and selector.
        selector: what decides.
    """

    scorer: Scorer | None
    transform: Transform | None
    selector: Selector

    def __post_init__(self) -> None:
        for leaf in (leaf for part in self.parts() for leaf in part.leaves()):
            if not dataclasses.is_dataclass(leaf):
                name = type(leaf).__name__
                raise CompositionError(f"{name} is not a dataclass; write @dataclass(frozen=True) above class {name}")
            _insist_on_method(leaf)
        if isinstance(self.scorer, Piped):  # one form for one meaning: a >> b belongs to the chain
            transform = self.scorer.transform
            object.__setattr__(
                self,
                "transform",
                transform if self.transform is None else transform >> self.transform,
            )
            object.__setattr__(self, "scorer", self.scorer.scorer)

    def __rshift__(self, other: NoReturn) -> NoReturn:
        """Refuse: a chain has ended."""
        _refuse(self, other, _why_not(self, other))

    def parts(self) -> tuple[Stage, ...]:
        """Return scorer, transform and selector, as far as they are there."""
        return tuple(part for part in (self.scorer, self.transform, self.selector) if part is not None)

    def text(self, *, full: bool = False) -> str:
        """Return the parts joined by ``>>``."""
        return " >> ".join(bracketed(part, full, Sum) for part in self.parts())

    def __repr__(self) -> str:
        """Return text that evaluates back to an equal chain."""
        return self.text()


def bracketed(node: Stage, full: bool, *looser: type) -> str:
    """Return the text of a node, in brackets where it binds looser than its surroundings."""
    text = node.text(full=full)
    return f"({text})" if isinstance(node, looser) else text


def _insist_on_method(leaf: Stage) -> None:
    """Refuse a stage that lacks what makes it one, before a token is spent."""
    for role, names in (  # of each row one must be there
        (Scorer, ("score", "score_with")),
        (Transform, ("apply", "apply_with")),
        (Selector, ("select",)),
        (Selector, ("budgets",)),
    ):
        if isinstance(leaf, role) and all(getattr(type(leaf), name) is getattr(role, name) for name in names):
            raise CompositionError(f"{type(leaf).__name__} has no method {names[0]}(), which makes a {role.__name__}")


def _scores(stage: Stage, method: str, found: object) -> Scores:
    if isinstance(found, Scores):
        return found
    name = f"{type(stage).__name__}.{method}()"
    raise CompositionError(f"{name} returned {type(found).__name__}; return Scores.of(view, values, weights=...)")


def _starts(node: Stage, start: int) -> list[int]:
    """Return the index of the first leaf of each part of ``node``."""
    starts: list[int] = []
    for part in node.parts():
        starts.append(start)
        start += sum(1 for _ in part.leaves())
    return starts


def _mix(node: Stage, view: View, states: State, combine: Any) -> Scores:
    left, right = (
        part.score_with(view.at(at), states)
        for part, at in zip(node.parts(), _starts(node, view.stage), strict=True)
        if isinstance(part, Scorer)
    )
    mixed = left.replace(combine(left.values, right.values), weights=left.weights and right.weights)
    return dataclasses.replace(mixed, tier=torch.maximum(left.tier, right.tier))
