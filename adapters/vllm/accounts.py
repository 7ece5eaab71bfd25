"""What a request has cost, from its lengths: :func:`account`, since vLLM's outputs have no place for a receipt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvpolicy.adapters.vllm.config import followed, planned
from kvpolicy.adapters.vllm.progress import Progress, Request
from kvpolicy.adapters.vllm.settings import Settings
from kvpolicy.errors import UsageError
from kvpolicy.policy import EvictionPolicy, Policy
from kvpolicy.row import Row

__all__ = ["Account", "account", "rows_of"]


@dataclass(frozen=True)
class Account:
    """Count what happened to a request that was served.

    Attributes:
        seen: tokens whose keys and values were made: all but the last one of the answer.
        slots: that it used in the end, in each layer and head.
        most: that it used at once while it decoded, in each layer and head.
        evictions: times that it was cut to its budget.
        evicted: tokens that left the cache, in each layer and head.
    """

    seen: int
    slots: int
    most: int
    evictions: int
    evicted: int


def account(policy: EvictionPolicy | str, *, prompt: int, output: int, interval: int | None = None) -> Account:
    """Return what a request has cost that was neither preempted nor prefilled in bounded memory.

    The scheduler and the workers count in the same way: when an eviction is due, and how many slots it leaves,
    follow from lengths alone.

    Args:
        policy: what it followed.
        prompt: tokens of its prompt.
        output: tokens of its answer.
        interval: of the engine's configuration, in place of the policy's.

    Raises:
        UsageError: no token, or fewer.
        UnsupportedError: a policy that vLLM's memory cannot follow.

    >>> account("vase(1024)", prompt=3000, output=2000)
    Account(seen=4999, slots=1039, most=1088, evictions=32, evicted=3960)
    """
    if not (isinstance(prompt, int) and isinstance(output, int) and prompt > 0 and output > 0):
        raise UsageError(f"prompt={prompt!r} and output={output!r}: write how many tokens each had, at least 1")
    rows = list(rows_of(policy, prompt, output, interval))
    last, most = rows[-1], max((row.length for row in rows[1:]), default=0)
    return Account(last.seen, last.length, most, last.evictions, last.seen - last.length)


def rows_of(policy: EvictionPolicy | str, prompt: int, output: int, interval: int | None = None) -> Iterator[Row]:
    """Yield the count of tokens and slots that each token of an answer was predicted from; see :func:`account`."""
    if isinstance(policy, str | Policy):
        policy, plan = followed(policy if isinstance(policy, str) else policy.text(full=True), interval)
    elif interval is None:
        plan = planned(policy, repr(policy))
    else:
        raise UsageError(f"interval={interval} goes to the text of a policy, and {policy!r} has its own")
    one = Progress.of(Request(0, prompt, Settings(policy, plan, 0)))
    one.advance(prompt, exact=True)
    yield one.row
    for _ in range(output - 1):  # an eviction comes before the step that writes the next token
        if one.due() and one.over:
            one.row = one.row.evicted(plan.budget, plan.recent)
        one.advance(1, exact=True)
        yield one.row
