"""What the engine was asked for: :class:`Config`, the part of ``additional_config`` under the key ``kvpolicy``."""

from __future__ import annotations

import difflib
import functools
import json
from dataclasses import dataclass
from typing import Any, Literal

from kvpolicy.adapters import planning
from kvpolicy.errors import BindError, UnsupportedError, nearest
from kvpolicy.grammar import parse_policy, parse_with
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec, Policy

__all__ = ["ADAPTER", "KEY", "Config", "followed", "insist_on_key", "planned"]

KEY = "kvpolicy"
ADAPTER = "the vLLM adapter"
_FIELDS = ("policy", "interval", "prefill", "window", "workspace")
_EXAMPLE = f'additional_config={{"{KEY}": {{"policy": "vase(1024)", "interval": 128}}}}'


@dataclass(frozen=True)
class Config:
    """Say which policy an engine follows, and how.

    Attributes:
        policy: what requests follow that name none, as text.
        interval: decoded tokens between two evictions; that of the policy where it is None.
        prefill: ``"exact"``: full attention inside a prompt, which is cut at its end. ``"bounded"``: each
            chunk of a prompt is cut to the budget, for prompts beyond memory; what is kept depends on where
            the scheduler cuts chunks.
        window: queries that are remembered of each request, for requests whose policy asks for more than
            ``policy`` does; as many as ``policy`` asks by default.
        workspace: bytes that the temporaries of one eviction may take.

    Raises:
        BindError: a value that cannot be.
        ParseError: the policy's text cannot be read.
        UnsupportedError: a policy that vLLM's memory cannot follow.

    >>> Config("vase(1024)", interval=128).plan.capacity
    1152
    """

    policy: str
    interval: int | None = None
    prefill: Literal["exact", "bounded"] = "exact"
    window: int | None = None
    workspace: int = 256 * 2**20

    def __post_init__(self) -> None:
        for name in ("interval", "window", "workspace"):
            given = getattr(self, name)
            if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
                raise BindError(f"{KEY}: {name} is {given!r}; write a whole number of at least 1")
        if self.prefill not in ("exact", "bounded"):
            raise BindError(f'{KEY}: prefill is {self.prefill!r}; write "exact" or "bounded"')
        _, plan = self.default
        if self.window is not None and self.window < plan.window:
            raise BindError(f"{KEY}: window is {self.window}, and {self.policy} asks for {plan.window} queries")

    @property
    def default(self) -> tuple[EvictionPolicy, LayerPlan]:
        """Return the policy of requests that name none, and its plan."""
        return followed(self.policy, self.interval)

    @property
    def plan(self) -> LayerPlan:
        """Return the plan of requests that name no policy: its capacity is what every request may use."""
        return self.default[1]

    @property
    def ring(self) -> int:
        """Return how many queries are remembered of each request."""
        return self.window or self.plan.window

    @property
    def exact(self) -> bool:
        """Return whether attention inside a prompt is full."""
        return self.prefill == "exact"

    @staticmethod
    def of(vllm_config: Any) -> Config | None:
        """Return what an engine was asked for, or None where it was not asked for eviction.

        Args:
            vllm_config: vLLM's configuration.
        """
        asked = vllm_config.additional_config
        if not isinstance(asked, dict) or KEY not in asked:
            insist_on_key(asked, "additional_config")
            return None
        return _read(json.dumps(asked[KEY], sort_keys=True, default=repr))


def insist_on_key(given: Any, where: str) -> None:
    """Refuse a key that is nearly ours: it would be ignored in silence.

    Raises:
        BindError: there is one.
    """
    for name in given if isinstance(given, dict) else ():
        if isinstance(name, str) and name != KEY and difflib.get_close_matches(name.lower(), [KEY], cutoff=0.8):
            raise BindError(f"{where} has {name!r}, which nobody reads: write {KEY!r}")


@functools.cache
def _read(text: str) -> Config:
    given = json.loads(text)
    if isinstance(given, str):
        given = {"policy": given}
    if not isinstance(given, dict) or not isinstance(given.get("policy"), str):
        raise BindError(f"{KEY} in additional_config is {given!r}; write {_EXAMPLE}")
    for name in given:
        if name not in _FIELDS:
            known = ", ".join(_FIELDS)
            raise BindError(f"{KEY} in additional_config has {name!r}{nearest(name, _FIELDS)}; it knows {known}")
    return Config(**given)


@functools.lru_cache(maxsize=1024)  # requests name policies: as many as they like
def followed(text: str, interval: int | None = None) -> tuple[EvictionPolicy, LayerPlan]:
    """Return a policy, one object for equal texts, and the plan of each layer.

    Args:
        text: what ``parse_policy`` reads.
        interval: in place of the policy's own; see :func:`~kvpolicy.grammar.parse_with`.

    Raises:
        ParseError: it is not a policy, or a recipe that takes no interval.
        UnsupportedError: layers or heads have budgets of their own, or nothing is decoded between evictions.
    """
    policy = parse_policy(text) if interval is None else parse_with(text, interval=interval)
    return policy, planned(policy, text)


def planned(policy: EvictionPolicy, text: str) -> LayerPlan:
    """Return the plan of each layer.

    Args:
        policy: what is followed.
        text: what messages call it.

    Raises:
        UnsupportedError: layers or heads have budgets of their own, or nothing is decoded between evictions.
    """
    planning.checked(policy, ADAPTER)
    if "head_budgets" in policy.needs:
        raise _headed(text)
    if isinstance(policy, Policy):
        sharing = policy.chain.selector.sharing()
        if sharing is not None and sharing.layered:
            raise _layered(text)
        if policy.interval is None:
            raise _endless(text)
    # How many layers there are is not known here: what plans them alike plans a few and many alike.
    counts = (2,) if isinstance(policy, Policy) else (1, 2, 96)
    plans = [(count, policy.plan(ModelSpec(count)).layers) for count in counts]
    for count, layers in plans:
        if len(layers) != count:
            raise BindError(f"{text!r} planned {len(layers)} layers, and was asked for {count}")
    first = plans[0][1][0]
    if first is None or any(layer != first for _, layers in plans for layer in layers):
        raise _layered(text)
    if first.head_wise:
        raise _headed(text)
    if first.interval is None:
        raise _endless(text)
    return first


def _headed(text: str) -> UnsupportedError:
    return UnsupportedError(
        f"{text!r} gives heads budgets of their own: vLLM has one block table for all heads of a layer; "
        "write TopK(budget), or use kvpolicy.adapters.flash_attn.FlashCache"
    )


def _layered(text: str) -> UnsupportedError:
    return UnsupportedError(
        f"{text!r} gives layers budgets of their own: vLLM has one block table for all layers of a group; "
        "write TopK(budget)"
    )


def _endless(text: str) -> UnsupportedError:
    return UnsupportedError(
        f"{text!r} evicts at the end of a turn only, so that a request would grow without end: "
        f"write an interval, as in {_EXAMPLE}"
    )
