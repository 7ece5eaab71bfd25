"""Checks that an answer depends on the question alone, and that asking changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
import random
from typing import Any

import torch
from torch import Tensor

from kvpolicy import registry
from kvpolicy.policy import EvictionPolicy, Policy
from kvpolicy.testing.changes import selected_rows
from kvpolicy.testing.kept import assert_same, select
from kvpolicy.testing.running import check, for_all
from kvpolicy.testing.strategies import view_specs_for
from kvpolicy.testing.views import ViewSpec, layer_spec
from kvpolicy.view import StageState, State, View

__all__ = [
    "check_copies",
    "check_deterministic",
    "check_global_random_state",
    "check_nothing_modified",
    "check_policy_unchanged",
    "check_seeds",
    "check_state",
    "check_text",
]


@check
def check_deterministic(policy: EvictionPolicy) -> None:
    """Check that the same view gives the same answer: a second time, and from a copy of the policy."""

    def test(spec: ViewSpec) -> None:
        view = spec.view()
        fresh = copy.deepcopy(policy)
        case = select(policy, view)
        assert select(policy, view, case.state).kept == case.kept, "a second call keeps others"
        again = select(fresh, view)
        assert again.kept == case.kept, "a copy of the policy keeps others"
        assert _same(again.after, case.after), "a copy of the policy remembers something else"

    for_all(view_specs_for(policy), test, name="check_deterministic")


@check
def check_global_random_state(policy: EvictionPolicy) -> None:
    """Check that the generators of torch and Python are neither read nor moved on."""

    def test(spec: ViewSpec) -> None:
        view = spec.view()
        before = torch.random.get_rng_state(), random.getstate()
        try:
            answers = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                random.seed(seed)
                ours = torch.random.get_rng_state(), random.getstate()
                answers.append(select(policy, view).kept)
                same = torch.equal(torch.random.get_rng_state(), ours[0])
                assert same, "torch's global generator was moved on"
                assert random.getstate() == ours[1], "Python's global generator was moved on"
            assert answers[0] == answers[1], "the seed of a global generator changes the answer"
        finally:
            torch.random.set_rng_state(before[0])
            random.setstate(before[1])

    for_all(view_specs_for(policy), test, name="check_global_random_state")


@check
def check_seeds(policy: EvictionPolicy) -> None:
    """Check that two requests of one seed, name and content are treated the same in a batch."""

    def test(spec: ViewSpec) -> None:
        case = select(policy, spec.view())
        rows = [*range(case.view.shape[0]), 0, 0]
        answer = select(policy, *selected_rows(case.view, case.state, rows)).kept
        for twin in answer[-2:]:
            assert_same(policy, case, (twin, *case.kept[1:]), "another place in the batch")

    for_all(view_specs_for(policy), test, name="check_seeds")


@check
def check_nothing_modified(policy: EvictionPolicy) -> None:
    """Check that neither the view nor the state it comes with is written to."""

    def test(spec: ViewSpec) -> None:
        case = select(policy, spec.view())
        told = {**_tensors_of(case.view), **_tensors_of_state(case.state)}
        before = {name: (t._version, t.clone()) for name, t in told.items()}
        policy.select(case.view, case.state)
        for name, (version, copied) in before.items():
            assert told[name]._version == version, f"{name} was written to"
            assert torch.equal(_bits(told[name]), _bits(copied)), f"{name} was written to"

    for_all(view_specs_for(policy), test, name="check_nothing_modified")


@check
def check_policy_unchanged(policy: EvictionPolicy) -> None:
    """Check that asking a policy leaves it as it was, so that caches cannot meet in it."""
    before = _fingerprint(policy)

    def test(spec: ViewSpec) -> None:
        select(policy, spec.view())
        assert _fingerprint(policy) == before, "select() changed the policy object"

    for_all(view_specs_for(policy), test, name="check_policy_unchanged")


@check
def check_state(policy: EvictionPolicy) -> None:
    """Check that what a policy remembers keeps its shapes and types, as a store needs it to."""

    def test(spec: ViewSpec) -> None:
        view = spec.view()
        state = policy.init(layer_spec(view), view.shape[0])
        b = view.shape[0]
        for held in state:
            assert held is None or isinstance(held, StageState), f"a state is {held!r}"
            for slots in () if held is None else held.slots:
                assert slots.shape == view.shape, f"slots {tuple(slots.shape)} of {view.shape}"
            for rows in () if held is None else held.rows:
                assert rows.shape[:1] == (b,), f"rows {tuple(rows.shape)} of {b}"
        for after in (select(policy, view, state).after, select(policy, view).after):
            assert _form(after) == _form(state), (
                f"select() returns a state of the form {_form(after)}, and init() {_form(state)}"
            )

    for_all(view_specs_for(policy), test, name="check_state")


@check
def check_copies(policy: EvictionPolicy) -> None:
    """Check that a policy can be pickled and copied, and that its copies answer the same."""
    twins = {"unpickled": pickle.loads(pickle.dumps(policy)), "copied": copy.deepcopy(policy)}

    def test(spec: ViewSpec) -> None:
        case = select(policy, spec.view())
        for name, twin in twins.items():
            assert select(twin, case.view, case.state).kept == case.kept, f"{name} keeps others"

    for_all(view_specs_for(policy), test, name="check_copies")


@check
def check_text(policy: EvictionPolicy) -> None:
    """Check that the text of a policy evaluates back to an equal one, and is read without ``eval``.

    A policy that is no ``kvpolicy.Policy`` has no such text. ``Policy.parse`` knows the names of
    registered stages alone, and is not asked where another one stands.
    """
    if not isinstance(policy, Policy):
        return
    names: dict[str, Any] = dict(vars(importlib.import_module("kvpolicy")))
    names |= {type(stage).__name__: type(stage) for stage in policy.stages}
    known = all(type(stage).__name__ in registry.stages() for stage in policy.stages)
    for text in (repr(policy), policy.text(full=True)):
        assert eval(text, names) == policy, f"{text} evaluates to another policy"
        assert hash(eval(text, names)) == hash(policy), f"{text} has another hash"
        if known:
            assert Policy.parse(text) == policy, f"{text} is read as {Policy.parse(text)!r}"


def _bits(t: Tensor) -> Tensor:
    """Return a tensor's bytes, by which nan equals itself."""
    return t.contiguous().flatten().view(torch.uint8) if t.numel() else t


def _tensors_of(view: View) -> dict[str, Tensor]:
    values = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
    return {f"view.{name}": value for name, value in values.items() if isinstance(value, Tensor)}


def _tensors_of_state(state: State) -> dict[str, Tensor]:
    return {
        f"state[{stage}].{kind}[{index}]": tensor
        for stage, held in enumerate(state)
        if held is not None
        for kind, tensors in (("slots", held.slots), ("rows", held.rows))
        for index, tensor in enumerate(tensors)
    }


def _form(state: State) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(t.shape), t.dtype) for name, t in _tensors_of_state(state).items()}


def _same(one: State, two: State) -> bool:
    ones, twos = _tensors_of_state(one), _tensors_of_state(two)
    return ones.keys() == twos.keys() and all(torch.equal(_bits(t), _bits(twos[name])) for name, t in ones.items())


def _fingerprint(thing: object, seen: frozenset[int] = frozenset()) -> object:
    """Return nested tuples that differ when anything inside ``thing`` differs."""
    if id(thing) in seen or thing is None or isinstance(thing, type):
        return None if thing is None else id(thing)
    if isinstance(thing, bool | int | float | complex | str | bytes):
        return (type(thing).__name__, repr(thing))
    seen = seen | {id(thing)}
    if isinstance(thing, Tensor):
        return (tuple(thing.shape), str(thing.dtype), bytes(_bits(thing.detach().cpu()).tolist()))
    if isinstance(thing, dict):
        return tuple((repr(key), _fingerprint(value, seen)) for key, value in thing.items())
    if isinstance(thing, list | tuple):
        return tuple(_fingerprint(item, seen) for item in thing)
    if isinstance(thing, set | frozenset):
        return tuple(sorted(repr(item) for item in thing))
    slots = {
        name: getattr(thing, name, None) for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())
    }
    return (type(thing).__name__, _fingerprint({**slots, **getattr(thing, "__dict__", {})}, seen))
