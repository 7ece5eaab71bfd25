"""What is followed, and the sizes that follow from it: policies and plans, checked when they are bound."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType

from kvpolicy.errors import BindError, UnsupportedError
from kvpolicy.policy import EvictionPolicy, LayerPlan, Plan, Policy
from kvpolicy.stage import Chain, Stage, Transform

__all__ = [
    "OFFERS",
    "TRANSFORMERS",
    "WEIGHTS",
    "by_plan",
    "checked",
    "integers",
    "plans_of_layers",
    "policy_text",
]

OFFERS = frozenset({"queries", "every_query", "cross_heads", "head_budgets"})  #: what every adapter here can give
WEIGHTS = frozenset({"output_projection", "rotary"})  #: what those can give besides that hold the model
TRANSFORMERS = OFFERS | WEIGHTS  #: what the transformers adapter can give; said here, so that nobody must load it


def checked(
    policy: EvictionPolicy | Sequence[EvictionPolicy], adapter: str, offers: frozenset[str] = OFFERS
) -> tuple[EvictionPolicy, ...]:
    """Return the policies, one object for equal ones, or say why one of them cannot be followed here.

    Args:
        policy: one, or one a request.
        adapter: to be named, as ``"the transformers adapter"``.
        offers: what it can give.
    """
    if isinstance(policy, Sequence) and not isinstance(policy, str):
        if not policy:
            raise BindError("an empty list of policies: give one policy, or one for each row of the batch")
        found: list[EvictionPolicy] = []
        for one in policy:
            same = next((other for other in found if other == one), one)
            found.append(_checked_one(same, adapter, offers))
        return tuple(found)
    return (_checked_one(policy, adapter, offers),)


def _checked_one(policy: EvictionPolicy, adapter: str, offers: frozenset[str]) -> EvictionPolicy:
    """Return the policy, or say why it is none, or why the adapter cannot give what it needs."""
    if isinstance(policy, Stage | Chain):
        raise BindError(f"{policy!r} is not a policy yet; write Policy({policy!r})")
    if isinstance(policy, str):
        raise BindError(f"{policy!r} is a text; write Policy.parse({policy!r})")
    if isinstance(policy, FunctionType):
        raise BindError(f"{policy.__name__} is a function that makes a policy: call it, {policy.__name__}(1024)")
    if isinstance(policy, type) or not isinstance(policy, EvictionPolicy):
        raise BindError(
            f"{policy!r} is not an EvictionPolicy: write one with vase(1024) or Policy(...), or give your class the "
            "attribute needs and the methods plan(model), init(spec, rows) and select(view, state)"
        )
    if policy.needs - offers:
        raise UnsupportedError(_cannot_give(policy, policy.needs - offers, adapter))
    return policy


def _cannot_give(policy: EvictionPolicy, missing: frozenset[str], adapter: str) -> str:
    """Say which stages need what an adapter lacks, and what to write instead."""
    from kvpolicy.catalog import NEEDS

    stages = policy.stages if isinstance(policy, Policy) else ()
    needs, instead = [], list[str]()
    for need in sorted(missing):
        asking = {type(stage).__name__: stage for stage in stages if need in stage.needs}
        needs.append(NEEDS.get(need, need) + (f" ({', '.join(asking)})" if asking else ""))
        for name, stage in asking.items():
            instead.append(f"leave out {name}" if isinstance(stage, Transform) else f"score without {name}")
    instead += ["use transformers"] if missing <= TRANSFORMERS else []
    advice = f"; {', or '.join(dict.fromkeys(instead))}" if instead else ""
    return f"{policy!r} needs {' and '.join(needs)}, which {adapter} cannot give{advice}"


def policy_text(policy: EvictionPolicy) -> str:
    """Return a policy with every parameter written out, the name of its class where it has no ``repr``."""
    if isinstance(policy, Policy):
        return policy.text(full=True)
    kind = type(policy)
    return f"{kind.__module__}.{kind.__qualname__}" if kind.__repr__ is object.__repr__ else repr(policy)


def integers(name: str, given: Sequence[int] | None) -> list[int] | None:
    """Return one 64-bit integer a row, or None where nothing is given."""
    if given is None:
        return None
    numbers = list(given) if isinstance(given, Sequence) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and -(2**63) <= n < 2**63 for n in numbers):
        raise BindError(f"{name}={given!r}: write one 64-bit integer for each row of the batch")
    return [int(n) for n in numbers if n is not None]


def plans_of_layers(plans: Sequence[Plan], evicting: tuple[int, ...]) -> dict[int, tuple[LayerPlan, ...]]:
    """Return the plans of each layer, one a policy, none where the layer is left alone.

    Raises:
        BindError: a policy planned another number of layers, or leaves all of them alone.
        UnsupportedError: one policy leaves a layer alone and another one does not.
    """
    found: dict[int, tuple[LayerPlan, ...]] = {}
    for plan in plans:
        if len(plan.layers) != len(evicting):
            raise BindError(
                f"the policy planned {len(plan.layers)} layers, and the model has {len(evicting)} that evict"
            )
    for number, layer in enumerate(evicting):
        given = tuple(one for plan in plans if (one := plan.layers[number]) is not None)
        if given and len(given) < len(plans):
            raise UnsupportedError(
                f"one policy leaves layer {layer} alone, and another one evicts from it: a layer holds all rows in "
                "slots that grow, or in slots that do not; let all policies of a batch leave the same layers alone, or "
                "give the layer a budget beyond the longest text"
            )
        found[layer] = given
    if not any(found.values()):
        raise BindError("the policy leaves every layer alone: nothing would be evicted; use an ordinary cache")
    return found


def by_plan(
    group: tuple[int, ...], by_layer: dict[int, tuple[LayerPlan, ...]]
) -> list[tuple[tuple[LayerPlan, ...], list[int]]]:
    """Return the layers of a device, by their plans: those of one plan share an arena.

    A layer without a plan has an arena of its own, so that one layer at a time is copied as it grows.
    """
    same: dict[tuple[LayerPlan, ...], list[int]] = {}
    alone: list[tuple[tuple[LayerPlan, ...], list[int]]] = []
    for layer in group:
        if by_layer[layer]:
            same.setdefault(by_layer[layer], []).append(layer)
        else:
            alone.append(((), [layer]))
    return [*same.items(), *alone]
