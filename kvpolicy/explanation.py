"""What a policy does, in words and numbers: :func:`explain`.

Nothing is written here that stands elsewhere: a stage is told by the first sentence of its docstring and its
parameters by what it says of them; sizes are those of the plan; what an engine cannot do is its adapter's
own refusal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvpolicy import catalog, docstrings
from kvpolicy.adapters import planning
from kvpolicy.allocators import Allocator, Uniform
from kvpolicy.errors import BudgetError, KVPolicyError
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec, Policy
from kvpolicy.stage import Piped, Scorer, Selector, Stage, Transform, Transforms, default_of

__all__ = ["Argument", "Engine", "Explanation", "Guarded", "Node", "explain", "interval_of"]

_LAYERS = 32  #: of a model that nobody has named
_DECODED = 1  #: tokens, where nobody says how many a policy without an interval lets a cache grow


@dataclass(frozen=True)
class Argument:
    """Give the value of one parameter of a stage.

    Attributes:
        name: of the parameter.
        value: as it is written.
        meaning: what the docstring says of it.
        default: whether that is its default.
    """

    name: str
    value: str
    meaning: str
    default: bool


@dataclass(frozen=True)
class Node:
    """Tell one node of a chain.

    Attributes:
        name: of the stage.
        role: scorer, transform, selector or allocator.
        sentence: what it does.
        parameters: all of them.
        depth: 0 for what stands in the chain itself, more for what is mixed inside of it.
    """

    name: str
    role: str
    sentence: str
    parameters: tuple[Argument, ...]
    depth: int


@dataclass(frozen=True)
class Guarded:
    """Say what guards protect of the smallest budget.

    Attributes:
        budget: slots of that layer and head.
        recent: the last tokens, which stay besides.
        stages: how many slots each guard protects at most, by its text.
        certain: slots that they protect together, at least, as soon as there are tokens enough.
        most: slots that they protect together, where all of them protect different tokens.
    """

    budget: int
    recent: int
    stages: dict[str, int]
    certain: int
    most: int

    @property
    def may_overflow(self) -> bool:
        """Return whether data decide if guards and recent tokens fit."""
        return self.most + self.recent > self.budget


@dataclass(frozen=True)
class Engine:
    """Say whether an engine can follow a policy.

    Attributes:
        name: of the engine.
        follows: whether it can.
        why: its adapter's refusal, or what has to be said to it; empty where there is nothing to say.
    """

    name: str
    follows: bool
    why: str = ""


@dataclass(frozen=True)
class Explanation:
    """Tell what a policy does.

    Attributes:
        policy: with every parameter written out.
        stages: of its chain, in order; none where the policy is a class of its own.
        one_class: what such a class is, in one line; empty where the policy is made of stages.
        layers: the plan of each layer, None where it is left alone.
        interval: decoded tokens between two evictions, or None; the fewest, where layers differ.
        recent: the last tokens, which always stay; the fewest, where layers differ.
        needs: names of what an engine must offer.
        queries: how many of the newest it reads.
        remembers: bytes that it remembers of each slot.
        guards: what they protect; None without any.
        engines: what each can do.
    """

    policy: str
    stages: tuple[Node, ...]
    one_class: str
    layers: tuple[LayerPlan | None, ...]
    interval: int | None
    recent: int
    needs: tuple[str, ...]
    queries: int
    remembers: int
    guards: Guarded | None
    engines: tuple[Engine, ...]


def explain(policy: EvictionPolicy, *, num_layers: int | None = None, num_heads: int | None = None) -> Explanation:
    """Return what a policy does.

    Args:
        policy: to be told; of one that is not made of stages, what its plan says.
        num_layers: layers of the model that evict; 32, or as many as the policy names, where None.
        num_heads: KV heads of each, if they are known.

    Raises:
        BudgetError: guards and recent tokens cannot fit into a budget, or the policy does not fit the model.

    >>> from kvpolicy.policies import vase
    >>> told = explain(vase(1024))
    >>> [stage.name for stage in told.stages]
    ['Attention', 'ValueGuard', 'Stochastic', 'TopK']
    >>> told.layers[0].capacity, told.guards.certain, [engine.follows for engine in told.engines]
    (1088, 256, [True, True, True])
    """
    model = ModelSpec(num_layers or _layers_named(policy), _DECODED, num_heads)
    layers = policy.plan(model).layers
    planned = [layer for layer in layers if layer is not None]
    return Explanation(
        policy=planning.policy_text(policy),
        stages=tuple(_told(policy)) if isinstance(policy, Policy) else (),
        one_class="" if isinstance(policy, Policy) else _one_class(policy),
        layers=layers,
        interval=interval_of(layers),
        recent=min((layer.recent for layer in planned), default=0),
        needs=tuple(sorted(policy.needs)),
        queries=max((layer.window for layer in planned), default=0),
        remembers=catalog.remembered(policy),
        guards=_guards(policy, planned) if isinstance(policy, Policy) else None,
        engines=tuple(_engines(policy, model)),
    )


def interval_of(layers: Sequence[LayerPlan | None]) -> int | None:
    """Return the decoded tokens between two evictions, the fewest where layers differ; None where none evicts then."""
    return min((one.interval for one in layers if one is not None and one.interval is not None), default=None)


def _one_class(policy: EvictionPolicy) -> str:
    kind = type(policy)
    said = docstrings.summary(kind)
    return f"{kind.__name__}, a class that is not made of stages{f': {said}' if said else ''}"


def _layers_named(policy: EvictionPolicy) -> int:
    if not isinstance(policy, Policy):
        return _LAYERS
    sharing = policy.chain.selector.sharing()
    named = None if sharing is None else sharing.layers_named
    return _LAYERS if named is None else named


def _told(policy: Policy) -> Iterator[Node]:
    for part in policy.chain.parts():
        yield from _nodes(part, 0)


def _nodes(node: Stage | Allocator, depth: int) -> Iterator[Node]:
    """Yield a node and what it is made of; what only joins stages is not told."""
    if isinstance(node, Transforms):
        for step in node.steps:
            yield from _nodes(step, depth)
        return
    if isinstance(node, Piped):
        yield from _nodes(node.scorer, depth)
        yield from _nodes(node.transform, depth + 1)
        return
    kind, inner, parameters = type(node), [], []
    meanings = {one.name: one.meaning for one in docstrings.parameters(kind)}
    for field in dataclasses.fields(node):  # type: ignore[arg-type]
        value = getattr(node, field.name)
        if isinstance(value, Uniform):  # what a plain number of slots is short for
            parameters.append(Argument("budget", repr(value.budget), meanings.get("budget", ""), False))
        elif isinstance(value, Stage | Allocator):
            inner.append(value)
        elif field.init:
            default = default_of(field) == value
            parameters.append(Argument(field.name, repr(value), meanings.get(field.name, ""), default))
    yield Node(kind.__name__, _role(node), docstrings.summary(kind), tuple(parameters), depth)
    for one in inner:
        yield from _nodes(one, depth + 1)


def _role(node: Stage | Allocator) -> str:
    for role, kind in {"scorer": Scorer, "transform": Transform, "selector": Selector}.items():
        if isinstance(node, kind):
            return role
    return "allocator"


def _guards(policy: Policy, layers: list[LayerPlan]) -> Guarded | None:
    """Return what guards protect where there is least room."""
    budget = min(min(layer.heads or (layer.budget,)) for layer in layers)
    sharing = policy.chain.selector.sharing()
    budget = budget if sharing is None else sharing.least(budget, policy.recent)
    every = {repr(stage): stage.reserved_most(budget, policy.recent) for stage in policy.stages}
    guards = {text: count for text, count in every.items() if count}
    return Guarded(budget, policy.recent, guards, *policy.guarded(budget)) if guards else None


# What engines say


def _engines(policy: EvictionPolicy, model: ModelSpec) -> Iterator[Engine]:
    for name, ask in {"transformers": _transformers, "vLLM": _vllm, "FlashCache": _flash_cache}.items():
        try:
            yield Engine(name, True, ask(policy, model))
        except KVPolicyError as error:
            yield Engine(name, False, str(error))


def _transformers(policy: EvictionPolicy, model: ModelSpec) -> str:
    planning.checked(policy, "the transformers adapter", planning.TRANSFORMERS)
    planning.plans_of_layers([policy.plan(model)], tuple(range(model.num_layers)))
    return _with_tokens(policy, model)


def _flash_cache(policy: EvictionPolicy, model: ModelSpec) -> str:
    from kvpolicy.adapters.flash_attn import groups

    heads = model.num_heads or next((len(one.heads) for one in policy.plan(model).layers if one and one.heads), 1)
    groups.layers_by_plan(groups.follow(policy, 1), model.num_layers, heads, model.max_new_tokens)
    return _with_tokens(policy, model)


def _vllm(policy: EvictionPolicy, model: ModelSpec) -> str:
    from kvpolicy.adapters.vllm.config import followed, planned

    if isinstance(policy, Policy):
        followed(policy.text(full=True))
    else:  # its repr need not be a text that is read back
        planned(policy, planning.policy_text(policy))
    return ""


def _with_tokens(policy: EvictionPolicy, model: ModelSpec) -> str:
    """Return what must be said to a cache that does not know how far it will grow."""
    try:
        policy.plan(dataclasses.replace(model, max_new_tokens=None))
    except BudgetError as error:
        return str(error)
    return ""
