"""What the engine was asked for: :class:`Config`, the part of ``additional_config`` under the key ``kvpolicy``."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from dataclasses import dataclass
from typing import Any, Literal

from kvpolicy.adapters import planning
from kvpolicy.allocators import PerLayer, Proportional, Pyramid
from kvpolicy.errors import BindError, UnsupportedError, nearest
from kvpolicy.policy import LayerPlan, ModelSpec, Policy

__all__ = ["ADAPTER", "KEY", "Config", "followed", "insist_on_key"]

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
    def default(self) -> tuple[Policy, LayerPlan]:
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
def followed(text: str, interval: int | None = None) -> tuple[Policy, LayerPlan]:
    """Return a policy, one object for equal texts, and the plan of each layer.

    Args:
        text: what ``Policy.parse`` reads.
        interval: in place of the policy's own.

    Raises:
        ParseError: it is not a policy.
        UnsupportedError: layers or heads have budgets of their own, or nothing is decoded between evictions.
    """
    policy = Policy.parse(text)
    if interval is not None:
        policy = dataclasses.replace(policy, interval=interval)
    planning.checked(policy, ADAPTER)
    if "head_budgets" in policy.needs:
        raise UnsupportedError(
            f"{text!r} gives heads budgets of their own: vLLM has one block table for all heads of a layer; "
            "write TopK(budget), or use kvpolicy.adapters.flash_attn.FlashCache"
        )
    layered = UnsupportedError(
        f"{text!r} gives layers budgets of their own: vLLM has one block table for all layers of a group; "
        "write TopK(budget)"
    )
    if isinstance(policy.chain.selector.sharing(), PerLayer | Proportional | Pyramid):
        raise layered
    if policy.interval is None:
        raise UnsupportedError(
            f"{text!r} evicts at the end of a turn only, so that a request would grow without end: "
            f"write an interval, as in {_EXAMPLE}"
        )
    layers = policy.plan(ModelSpec(2)).layers
    if layers[0] is None or layers[1] != layers[0]:
        raise layered
    return policy, layers[0]
