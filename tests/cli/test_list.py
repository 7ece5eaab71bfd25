"""`kvpolicy list`: what is told of every policy and stage, and that nothing installed breaks it."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from kvpolicy import KeyNorm, LayerPlan, ModelSpec, Plan, Policy, TopK, catalog, policies, registry
from kvpolicy.catalog import PolicyFacts
from tests.cli.tools import Command, Install


class Own:
    """Keep the newest.

    Source: none; an exercise after https://arxiv.org/abs/2309.17453 and https://github.com/o/n.
    """

    needs = frozenset({"queries", "telepathy"})

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def __repr__(self) -> str:
        return f"Own({self.budget})"

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((LayerPlan(self.budget, self.budget + 64, None, 1, 7),) * model.num_layers)

    def init(self, spec: Any, rows: int) -> tuple[()]:
        return ()

    def select(self, view: Any, state: Any) -> Any:
        raise NotImplementedError


def deep(budget: int, *, depth: int) -> Policy:
    """Return a policy of some depth. And more.

    Source: arXiv 2404.14469 and 2606.03928, section 2.
    """
    raise NotImplementedError


def angry(budget: int) -> Policy:
    """Return nothing."""
    raise ZeroDivisionError("it divides\nby zero")


def number(budget: int) -> int:
    return budget


def cramped(budget: int) -> Policy:
    return Policy(KeyNorm() >> TopK(budget), recent=2 * budget)


def told(name: str) -> PolicyFacts:
    return next(one for one in catalog.policies() if one.name == name)


def test_every_name_is_listed(kvpolicy: Command) -> None:
    result = kvpolicy("list")
    assert result.code == 0
    rows = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    assert {*registry.policies(), *registry.stages()} <= set(rows)
    for words in ("2606.03928", "prefill, decode", "newest 64 queries, 4 bytes more a slot", "kvpolicy"):
        assert words in rows["vase"]
    assert "prefill (decode)" in rows["snapkv"]
    assert "–" in rows["recommended"]
    assert "scorer" in rows["Attention"]
    assert "transform" in rows["ValueGuard"]
    assert "selector" in rows["TopK"]
    assert "allocator" in rows["Pyramid"]
    assert "the attention sinks" in rows["Sinks"]


def test_facts_are_those_of_the_recipes() -> None:
    assert told("vase_dkv").sources == ("https://arxiv.org/abs/2606.03928", "https://arxiv.org/abs/2509.15038")
    assert told("rkv").sources[1:] == ("https://arxiv.org/abs/2606.03928", "https://arxiv.org/abs/2609.03430")
    assert told("recommended").paper is None
    assert told("recommended").sources
    assert told("tova").needs == ("cross_heads", "queries")
    assert told("tova").needs_in_words == "newest query, all heads of a layer"
    assert told("knorm").remembers == 4
    assert told("keydiff").needs_in_words == "nothing"
    for one in catalog.policies():
        assert one.problem is None
        assert one.text is not None
        assert Policy.parse(one.text) == catalog.built(registry.policies()[one.name].load())


def test_a_policy_of_another_package_that_is_no_chain(install: Install) -> None:
    install(own=Own)
    one = told("own")
    assert (one.paper, one.phase, one.text, one.problem) == (None, "prefill", "Own(1024)", None)
    assert one.sources == ("https://arxiv.org/abs/2309.17453", "https://github.com/o/n")
    assert one.needs_in_words == "newest 7 queries, telepathy"
    assert one.summary == "Keep the newest."
    assert one.package == "unknown"


def test_what_is_broken_is_listed_with_the_reason(install: Install, kvpolicy: Command) -> None:
    install(
        angry=angry, cramped=cramped, deep=deep, lost="no_such_module:lost", missing="third_party:nobody", number=number
    )
    result = kvpolicy("list")
    assert result.code == 0
    rows = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    assert "a budget alone: missing a required" in rows["deep"]
    assert "it divides by zero" in rows["angry"]
    assert "it makes no policy, but 1024" in rows["number"]
    assert "is not larger than recent=2048" in rows["cramped"]
    assert "no_such_module" in rows["lost"]
    assert "nobody" in rows["missing"]
    assert all("broken" in rows[name] for name in registry.policies())
    assert "ValueGuard" in rows


def test_the_reason_of_what_is_broken_is_one_line(
    install: Install, kvpolicy: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    install(cramped=cramped, knorm=policies.knorm)
    lines = kvpolicy("list").out.splitlines()
    at = lines.index(f"cramped  broken, from unknown: {told('cramped').problem}")
    assert any(line.startswith("knorm") for line in lines[:at])
    assert not lines[at + 1].strip()


def test_a_package_may_fail_as_it_likes_when_it_is_loaded(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(lost="third_party:lost")

    def load(self: EntryPoint) -> Any:
        raise RuntimeError("no GPU")

    monkeypatch.setattr(EntryPoint, "load", load)
    assert "which cannot be loaded: no GPU" in (told("lost").problem or "")
    assert all(one.role == "" and "no GPU" in (one.problem or "") for one in catalog.stages())


def test_json(kvpolicy: Command, install: Install) -> None:
    install(deep=deep)
    found = json.loads(kvpolicy("list", "--json").out)
    [policy] = found["policies"]
    assert policy["paper"] == "2404.14469"
    assert policy["sources"] == ["https://arxiv.org/abs/2404.14469", "https://arxiv.org/abs/2606.03928"]
    assert "depth" in policy["problem"]
    assert {one["name"]: one["role"] for one in found["stages"]}["TopK"] == "selector"


def test_markdown(kvpolicy: Command) -> None:
    lines = kvpolicy("list", "--markdown").out.splitlines()
    assert lines[0] == "| name | paper | phase | needs | from |"
    assert (
        "| keydiff | [2504.15364](https://arxiv.org/abs/2504.15364) | prefill, decode | nothing | kvpolicy |" in lines
    )
    assert any(line.startswith("| Sinks | transform | Protect the first n tokens") for line in lines)


def test_one_form_at_a_time(kvpolicy: Command) -> None:
    result = kvpolicy("list", "--json", "--markdown")
    assert result.code == 2
    assert "give one of them" in result.error
