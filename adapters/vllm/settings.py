"""What one request asked for: :class:`Settings`, read from ``SamplingParams.extra_args``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from kvpolicy import catalog
from kvpolicy.adapters.vllm.config import KEY, Config, followed, insist_on_key
from kvpolicy.errors import BindError, BudgetError, KVPolicyError, UsageError, nearest
from kvpolicy.grammar import parse_policy, parse_with, with_arguments
from kvpolicy.policy import EvictionPolicy, LayerPlan, Policy
from kvpolicy.selectors import TopK

__all__ = ["Settings"]

_FIELDS = ("policy", "budget", "seed")
_EXAMPLE = f'SamplingParams(extra_args={{"{KEY}": {{"budget": 512, "seed": 7}}}})'
_MOST = 32  #: bytes that a request's policy may remember of each slot of a KV head
_OVER_HTTP = f'"vllm_xargs": {{"{KEY}": "{{\\"budget\\": 512}}"}}'


@dataclass(frozen=True)
class Settings:
    """Say what a request follows.

    Attributes:
        policy: one object for equal texts; None where the request keeps everything.
        plan: of each layer; None where the request keeps everything.
        seed: keys randomness.
    """

    policy: EvictionPolicy | None
    plan: LayerPlan | None
    seed: int

    @property
    def off(self) -> bool:
        """Return whether the request keeps everything."""
        return self.policy is None

    @staticmethod
    def of(config: Config, params: Any) -> Settings:
        """Return what a request asked for.

        Args:
            config: of the engine.
            params: vLLM's ``SamplingParams``. ``extra_args["kvpolicy"]`` is ``"off"``, a policy, or has any of
                ``policy``, ``budget`` and ``seed``; or it is the JSON text of these, for vLLM's HTTP API, whose
                ``vllm_xargs`` has no objects in it. A policy is a text, or a name as ``snapkv``, which then has
                budget and interval of the engine, and no more ``recent`` tokens than it. Where no seed is there,
                ``params.seed`` is it, and 0 where that is None.

        Raises:
            KVPolicyError: the request asks for what is none, or for more than the engine set aside.
        """
        extra = (params.extra_args or {}) if params is not None else {}
        insist_on_key(extra, "extra_args")
        asked = extra.get(KEY)
        own, seed = _read(config, json.dumps(asked, sort_keys=True, default=repr))
        if seed is None:
            seed = getattr(params, "seed", None) or 0
        return Settings(*own, seed)

    @staticmethod
    def served(config: Config, params: Any) -> Settings:
        """Return what an admitted request asked for; what the engine cannot do is logged, and it follows the engine.

        Scheduler and workers ask here: one request must not end an engine that serves others.
        """
        try:
            return Settings.of(config, params)
        except KVPolicyError as error:
            logging.getLogger(__name__).error("a request that was not validated follows the engine's policy: %s", error)
            return Settings(*config.default, 0)


@functools.lru_cache(maxsize=4096)
def _read(config: Config, text: str) -> tuple[tuple[EvictionPolicy | None, LayerPlan | None], int | None]:
    """Return the policy that a request asks for and its plan, None where it keeps everything, and its seed."""
    given = json.loads(text)
    if isinstance(given, str):  # vLLM's HTTP API has no objects in vllm_xargs
        with contextlib.suppress(ValueError, RecursionError):
            given = json.loads(given)
    if given is None:
        return config.default, None
    if given == "off":
        if not config.exact:
            raise UsageError(
                f'{KEY} is "off": the engine prefills in bounded memory and has no room for a request that keeps '
                f'everything; start it with "prefill": "exact"'
            )
        return (None, None), None
    if isinstance(given, str) and given.strip():
        given = {"policy": given}
    if not isinstance(given, dict):
        shown = textwrap.shorten(repr(given), 80)
        raise UsageError(f'{KEY} in extra_args is {shown}; write "off", or as in {_EXAMPLE}; over HTTP, {_OVER_HTTP}')
    for name in given:
        if name not in _FIELDS:
            raise UsageError(f"{KEY} in extra_args has {name!r}{nearest(name, _FIELDS)}; it knows {', '.join(_FIELDS)}")
    seed, budget, wanted = given.get("seed"), given.get("budget"), given.get("policy")
    _check_integer("seed", seed, -(2**63))
    _check_integer("budget", budget, 1)
    if wanted is not None and not isinstance(wanted, str):
        raise UsageError(f"{KEY} in extra_args: policy is {wanted!r}; write a text, as in vase(512)")
    policy, plan = config.default
    if wanted is not None:
        named = re.fullmatch(r"\s*\w+\s*", wanted) is not None
        if budget is not None and not named:
            raise UsageError(f"{KEY} in extra_args: {wanted!r} says its budget itself; leave budget={budget} out")
        policy, plan = _named(config, wanted.strip(), budget) if named else followed(wanted)
    elif budget is not None:
        policy, plan = _with_budget(config, budget)
    if plan.capacity > config.plan.capacity:
        raise BudgetError(
            f"{KEY} in extra_args: {policy!r} fills {plan.capacity} slots, and the engine sets {config.plan.capacity} "
            f"aside for each request ({config.policy}); ask for at most {config.plan.capacity - (plan.interval or 0)}"
        )
    if (remembered := catalog.remembered(policy)) > _MOST:
        raise BindError(f"{KEY} in extra_args: {policy!r} remembers {remembered} bytes of a slot; {_MOST} is most")
    if plan.window > config.ring:
        raise BindError(
            f"{KEY} in extra_args: {policy!r} asks {plan.window} queries, and the engine remembers {config.ring}: "
            f'start it with "window": {plan.window}'
        )
    return (policy, plan), seed


def _check_integer(name: str, given: Any, least: int) -> None:
    if given is None:
        return
    if not isinstance(given, int) or isinstance(given, bool) or not least <= given < 2**63:
        raise UsageError(
            f"{KEY} in extra_args: {name} is {textwrap.shorten(repr(given), 80)}; write a whole number from {least} to "
            f"{2**63 - 1}"
        )


def _named(config: Config, name: str, budget: int | None) -> tuple[EvictionPolicy, LayerPlan]:
    """Return the policy of a recipe's name: what the request leaves open is as the engine has it.

    A policy that is not made of stages has its own interval and recent tokens.
    """
    plan = config.plan
    text = f"{name}({budget or plan.budget})"
    policy = parse_policy(text)
    if not isinstance(policy, Policy):
        return followed(text)
    policy = parse_with(text, interval=plan.interval)
    assert isinstance(policy, Policy)
    if policy.recent > plan.recent:
        policy = parse_with(text, interval=plan.interval, recent=plan.recent)
        assert isinstance(policy, Policy)
    return followed(policy.text(full=True))


def _with_budget(config: Config, budget: int) -> tuple[EvictionPolicy, LayerPlan]:
    """Return the engine's policy with another budget."""
    policy, plan = config.default
    if budget == plan.budget:
        return policy, plan
    if not isinstance(policy, Policy):
        try:
            return followed(with_arguments(config.policy, budget=budget), config.interval)
        except KVPolicyError as error:
            raise UsageError(f"{KEY} in extra_args: budget={budget} does not fit {config.policy}: {error}") from error
    if not isinstance(policy.chain.selector, TopK):
        raise UsageError(f"{KEY} in extra_args: {policy!r} does not end with TopK; write policy= in place of budget=")
    chain = dataclasses.replace(policy.chain, selector=TopK(budget))
    try:
        return followed(dataclasses.replace(policy, chain=chain).text(full=True))
    except KVPolicyError as error:
        raise UsageError(f"{KEY} in extra_args: budget={budget} does not fit {policy!r}: {error}") from error
