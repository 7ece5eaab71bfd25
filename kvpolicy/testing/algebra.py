"""Hypothesis strategies for stages, budgets and policies: whatever is registered is drawn, by its fields."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from kvpolicy import registry
from kvpolicy.allocators import Allocator
from kvpolicy.errors import BindError, ParameterError
from kvpolicy.policy import ModelSpec, Policy
from kvpolicy.selectors import TopK
from kvpolicy.stage import Scorer, Transform, maximum

__all__ = ["budgets", "policies", "registered", "scorers", "stages", "transforms"]

_T = TypeVar("_T")
LAYERS = 3  #: of the models that drawn policies are for

#: What a field of this name may hold, small enough for views of some twenty slots. Others hold their default, or
#: each word of a ``Literal``. The first one is the simplest.
_VALUES: dict[str, tuple[Any, ...]] = {
    "beta": (1, 1.25),
    "decay": (0.8, 0, 0.1),
    "epsilon": (0.0,),  # can be added to weights alone, and what stands before is drawn freely
    "floor": (1.0, 0.75),
    "future": (1, 5, 9),
    "gamma": (200.0, 0.0),
    "growth": (0.01, 0.0, 0.5),
    "highest": (2.0, 1.0),
    "lag": (4, 2, 3),
    "local": (1, 3),
    "n": (1, 0, 2),
    "pool": (1, 3, 5),
    "rank": (2,),
    "refresh": (1,),
    "seed": (0, 1, 3),
    "share": (0.25, 0.5),
    "sinks": (0, 1, 2),
    "tau": (1.0, 0.0, 0.3),
    "temperature": (1.0, 0.5),
    "threshold": (0.1,),
    "window": (4, 2, 3, 6),
}


@functools.cache
def registered(role: type[_T], package: str = "kvpolicy") -> tuple[type[_T], ...]:
    """Return the registered stages of a role that a package declares, by name.

    Args:
        role: ``Scorer``, ``Transform``, ``Selector`` or ``Allocator``.
        package: its distribution's name.
    """
    loaded = [entry.load() for _, entry in sorted(registry.stages().items()) if entry.distribution == package]
    return tuple(one for one in loaded if isinstance(one, type) and issubclass(one, role))


@st.composite
def stages(draw: DrawFn, /, kind: type[_T], **values: SearchStrategy[Any]) -> _T:
    """Draw a stage or an allocator of one class, with small parameters that it allows.

    Each field is drawn by its name (``window``, ``share``, ``seed`` and so on), or as one of the words of its
    ``Literal``, or True or False; a number that nothing is known of stays at its default.

    Args:
        draw: hypothesis's own.
        kind: a dataclass, yours or one of kvpolicy's.
        values: of fields, where they are to be others.

    Raises:
        TypeError: a field has no default, and nothing is known of it.

    >>> from hypothesis import find
    >>> from kvpolicy import Sinks
    >>> find(stages(Sinks), lambda stage: stage.n > 1)
    Sinks(2)
    """
    known: Any = kind  # a class is hashable, which the types of caches do not see
    chosen = {
        name: draw(values[name] if name in values else _values(known, field, hint))
        for name, (field, hint) in _fields(known).items()
    }
    try:
        return kind(**chosen)
    except ParameterError:  # parameters that exclude each other
        reject()


@functools.cache
def _fields(kind: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Return the parameters of a dataclass and their types, which take long to read."""
    hints = get_type_hints(kind)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(kind) if field.init}


@functools.cache
def _values(kind: type, field: dataclasses.Field[Any], hint: Any) -> SearchStrategy[Any]:
    first = () if field.default is dataclasses.MISSING else (field.default,)
    if field.name in _VALUES:
        known = _VALUES[field.name]
        return st.sampled_from((None, *known) if first == (None,) else known)
    if get_origin(hint) is Literal:
        return st.sampled_from(tuple(dict.fromkeys((*first, *get_args(hint)))))
    if hint is bool:
        return st.sampled_from((*first, not first[0]) if first else (False, True))
    if first:
        return st.just(first[0])
    name = kind.__name__
    raise TypeError(f"{name}.{field.name}: no values are known; write stages({name}, {field.name}=a strategy)")


@functools.cache
def budgets(low: int = 1, high: int = 16) -> SearchStrategy[int | Allocator]:
    """Draw what ``TopK`` takes: slots, or an allocator that shares them out over three layers."""
    slots = st.integers(low, high)
    known: dict[str, SearchStrategy[Any]] = {
        "budget": slots,
        "heads": st.tuples(slots, slots),
        "layers": st.tuples(slots, st.one_of(slots, st.none()), slots),
        "preferences": st.sampled_from(((1.0, 1.0, 1.0), (1.5, 1.25, 1.0))),
    }

    def shared(kind: type[Allocator]) -> SearchStrategy[Allocator]:
        own = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        return stages(kind, **{name: values for name, values in known.items() if name in own})

    return st.one_of(slots, *map(shared, registered(Allocator)))


@functools.cache
def scorers() -> SearchStrategy[Scorer]:
    """Draw a scorer: one of those that kvpolicy has, or a mixture of them."""
    return st.recursive(_one_of(registered(Scorer)), _mixtures, max_leaves=3)


def _mixtures(inner: SearchStrategy[Scorer]) -> SearchStrategy[Scorer]:
    factors = st.sampled_from((0.5, 2, -1.0, 0))
    combine: tuple[Callable[[Scorer, Scorer], Scorer], ...] = (
        lambda left, right: left + right,
        lambda left, right: left * right,
        maximum,
    )
    return st.one_of(
        *(st.builds(both, inner, inner) for both in combine),
        st.builds(lambda factor, scorer: factor * scorer, factors, inner),
        st.builds(lambda scorer, transform: scorer >> transform, inner, transforms()),
    )


@functools.cache
def transforms() -> SearchStrategy[Transform]:
    """Draw a guard, a sampler, a normalisation or another of kvpolicy's transforms."""
    return _one_of(registered(Transform))


def _one_of(kinds: tuple[type[_T], ...]) -> SearchStrategy[_T]:
    return st.sampled_from(kinds).flatmap(stages)


@st.composite
def policies(draw: DrawFn) -> Policy:
    """Draw a policy from the whole algebra, small enough for views of some twenty slots.

    Every stage that kvpolicy registers is drawn. A policy for layers one by one is for three.
    """
    recent = draw(st.integers(1, 3))
    chosen = draw(budgets(2 * recent + 4, 12))  # half of it, or 2, beside the recent tokens
    scorer: Scorer = draw(scorers())
    for transform in draw(st.lists(transforms(), max_size=3)):
        scorer = scorer >> transform
    chain, interval = scorer >> TopK(chosen), draw(st.sampled_from((4, 1, 6, 2, None)))
    try:
        policy = Policy(chain, interval=interval, recent=recent)
        policy.plan(ModelSpec(num_layers=LAYERS, max_new_tokens=8))
    except BindError:  # a window shorter than the interval, or guards that do not fit
        reject()
    return policy
