"""What is installed, as data: every policy with its paper, phase and needs, and every stage with its role.

Nothing is written here that stands elsewhere. A recipe's docstring names its paper, in the paragraph that
begins with ``Source:``; phase and needs are those of the policy that it makes for a plain budget. So a
recipe of another package is listed like one that comes with kvpolicy. What cannot be loaded or built is
listed, too, with the reason.

**Phase** says when a policy forgets, as it is built here, whatever its paper does:

* ``prefill``: it cuts a prompt, and each later turn of several tokens, at its end;
* ``prefill (decode)``: the same, and while decoding, too, if it is given an ``interval``;
* ``prefill, decode``: it cuts prompts and, every ``interval`` decoded tokens, what was decoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvpolicy import docstrings, registry
from kvpolicy.errors import KVPolicyError, PolicyError
from kvpolicy.grammar import parse_policy
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec, Plan, Policy
from kvpolicy.registry import Registered
from kvpolicy.view import LayerSpec

__all__ = [
    "BUDGET",
    "NEEDS",
    "PolicyFacts",
    "StageFacts",
    "built",
    "needs_in_words",
    "policies",
    "remembered",
    "stages",
]

BUDGET = 1024  #: the plain budget that a recipe is built with
#: What a policy needs of an engine, in words; see ``Stage.needs``.
NEEDS = {
    "queries": "newest queries",
    "every_query": "every query counted",
    "cross_heads": "all heads of a layer",
    "head_budgets": "budgets of heads",
    "output_projection": "output projections",
    "rotary": "rotations",
}
#: Models to plan for: the first that a policy plans, since one that names layers and heads fits no other.
_MODELS = tuple(ModelSpec(num_layers=layers, max_new_tokens=64) for layers in (8, 3, 2, 1))
_PAPER = re.compile(r"https://arxiv\.org/abs/(\d{4}\.\d{4,5})")
_ORDER = {"scorer": 0, "transform": 1, "selector": 2, "allocator": 3}  #: in which a chain has them

Phase = Literal["prefill", "prefill (decode)", "prefill, decode"]


@dataclass(frozen=True)
class PolicyFacts:
    """Say what an installed recipe is.

    Attributes:
        name: as it is written in a policy text.
        package: that declares it.
        summary: the first sentence of its docstring.
        paper: the arXiv number that its ``Source:`` begins with; None where that names none, or says ``none``.
        sources: every address in its ``Source:``.
        text: the policy that it makes for a budget of 1024.
        phase: when it forgets; see the module.
        needs: names of what an engine must offer.
        queries: how many of the newest queries it reads.
        remembers: bytes that it remembers of each slot, beside key, value and position.
        problem: why it cannot be loaded, or built with a budget alone; what depends on that is then empty.
    """

    name: str
    package: str
    summary: str = ""
    paper: str | None = None
    sources: tuple[str, ...] = ()
    text: str | None = None
    phase: Phase | None = None
    needs: tuple[str, ...] = ()
    queries: int = 0
    remembers: int = 0
    problem: str | None = None

    @property
    def needs_in_words(self) -> str:
        """Return what it needs beyond keys and values, ``nothing`` among it."""
        return needs_in_words(self.needs, self.queries, self.remembers)


@dataclass(frozen=True)
class StageFacts:
    """Say what an installed stage is.

    Attributes:
        name: as it is written in a policy text.
        package: that declares it.
        role: ``"scorer"``, ``"transform"``, ``"selector"`` or ``"allocator"``; empty where it cannot be loaded.
        summary: the first sentence of its docstring.
        problem: why it cannot be loaded.
    """

    name: str
    package: str
    role: str = ""
    summary: str = ""
    problem: str | None = None


def policies() -> tuple[PolicyFacts, ...]:
    """Return what every installed recipe is, by name.

    Raises:
        PolicyError: two packages declare one name.

    >>> from kvpolicy import catalog
    >>> [snapkv] = [one for one in catalog.policies() if one.name == "snapkv"]
    >>> snapkv.paper, snapkv.phase, snapkv.needs_in_words
    ('2404.14469', 'prefill (decode)', 'newest 64 queries')
    """
    return tuple(_policy(entry) for _, entry in sorted(registry.policies().items()))


def stages() -> tuple[StageFacts, ...]:
    """Return what every installed stage is, in the order in which a chain has them.

    Raises:
        PolicyError: two packages declare one name.
    """
    found = [_stage(entry) for entry in registry.stages().values()]
    return tuple(sorted(found, key=lambda one: (_ORDER.get(one.role, len(_ORDER)), one.name)))


def needs_in_words(needs: Iterable[str], queries: int, remembers: int) -> str:
    """Return what a policy needs beyond keys and values.

    Args:
        needs: names of what an engine must offer.
        queries: how many of the newest it reads.
        remembers: bytes of each slot.

    >>> needs_in_words({"queries", "every_query"}, queries=64, remembers=4)
    'newest 64 queries, every query counted, 4 bytes more a slot'
    """
    known = [name for name in NEEDS if name in needs] + sorted(set(needs) - set(NEEDS))
    words = [f"newest {queries} queries" if name == "queries" else NEEDS.get(name, name) for name in known]
    words = [word.replace("newest 1 queries", "newest query") for word in words]
    words += [f"{remembers} bytes more a slot"] if remembers else []
    return ", ".join(words) or "nothing"


def remembered(policy: EvictionPolicy) -> int:
    """Return how many bytes a policy remembers of each slot of a KV head, beside key, value and position.

    Raises:
        PolicyError: its ``init`` returns None in place of a tuple.

    >>> from kvpolicy.policies import knorm
    >>> remembered(knorm(1024))
    4
    """
    spec = LayerSpec(1, 1, 8, 8, 1, torch.bfloat16, torch.device("meta"))
    state = policy.init(spec, 1)
    if state is None:
        raise PolicyError(f"{type(policy).__name__}.init returns None; write return (), where nothing is remembered")
    return sum(math.prod(t.shape) * t.element_size() for one in state if one is not None for t in one.slots)


def _stage(entry: Registered) -> StageFacts:
    try:
        role = entry.role
        return StageFacts(entry.name, entry.distribution, role, docstrings.summary(entry.load()))
    except PolicyError as error:
        return StageFacts(entry.name, entry.distribution, problem=_said(error))


def _policy(entry: Registered) -> PolicyFacts:
    try:
        recipe = entry.load()
    except PolicyError as error:
        return PolicyFacts(entry.name, entry.distribution, problem=_said(error))
    told = docstrings.source(recipe)
    own = re.match(r"none\b", told, re.IGNORECASE) is None
    links = tuple(docstrings.links(told))
    papers = [match[1] for link in links if (match := _PAPER.fullmatch(link))]
    facts = PolicyFacts(
        name=entry.name,
        package=entry.distribution,
        summary=docstrings.summary(recipe),
        paper=papers[0] if papers and own else None,
        sources=links,
    )
    try:
        return _built(recipe, facts)
    except Exception as error:  # a recipe of another package raises what it likes
        return dataclasses.replace(facts, problem=_said(error))


def built(recipe: Callable[..., Any]) -> EvictionPolicy:
    """Return the policy that a recipe makes for a budget of 1024, or that of its docstring's example if it wants more.

    Raises:
        PolicyError: it needs more than a budget and gives no example, or makes no policy.
    """
    try:
        inspect.signature(recipe).bind(BUDGET)
    except TypeError as error:
        text = docstrings.example(recipe)
        if text is None:
            raise PolicyError(f"it cannot be built with a budget alone: {error}") from error
        return parse_policy(text)
    policy = recipe(BUDGET)
    if not isinstance(policy, EvictionPolicy) or isinstance(policy, type):
        raise PolicyError(f"it makes no policy, but {policy!r}")
    return policy


def _planned(policy: EvictionPolicy) -> Plan:
    for model in _MODELS[:-1]:
        with contextlib.suppress(KVPolicyError):
            return policy.plan(model)
    return policy.plan(_MODELS[-1])


def _built(recipe: Callable[..., Any], facts: PolicyFacts) -> PolicyFacts:
    """Return the facts with what can be told from the policy that a recipe makes."""
    policy = built(recipe)
    layers = [layer for layer in _planned(policy).layers if layer is not None]
    return dataclasses.replace(
        facts,
        text=policy.text() if isinstance(policy, Policy) else repr(policy),
        phase=_phase(layers, "interval" in inspect.signature(recipe).parameters),
        needs=tuple(sorted(policy.needs)),
        queries=max((layer.window for layer in layers), default=0),
        remembers=remembered(policy),
    )


def _phase(layers: list[LayerPlan], may_go_on: bool) -> Phase:
    if any(layer.interval is not None for layer in layers):
        return "prefill, decode"
    return "prefill (decode)" if may_go_on else "prefill"


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
