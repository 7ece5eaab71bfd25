"""A :class:`Request` on the worker, and how far it is: :class:`Progress`, the count of its tokens and slots."""

from __future__ import annotations

from dataclasses import dataclass

from kvpolicy.adapters.vllm.settings import Settings
from kvpolicy.eviction import is_end
from kvpolicy.policy import EvictionPolicy, LayerPlan
from kvpolicy.row import Row

__all__ = ["Progress", "Request"]


@dataclass(eq=False)
class Request:
    """Know a request on the worker.

    Attributes:
        place: where its positions, queries and state are held.
        prompt: tokens of its prompt.
        settings: what it follows.
        again: it was preempted, and its tokens are computed again.
        tokens: vLLM's own list of its prompt's tokens, the same list as long as the request lives; of runner V1.
        output: vLLM's own list of its output tokens; of runner V1.
    """

    place: int
    prompt: int
    settings: Settings
    again: bool = False
    tokens: list[int] | None = None
    output: list[int] | None = None


@dataclass(eq=False)
class Progress:
    """Count the tokens and slots of a request that evicts.

    Attributes:
        request: whose they are.
        policy: what it follows.
        plan: of each layer.
        row: with the tokens of the last step.
        before: the row as it was before that step.
        turn: that step ended a turn.
        begun: the policy has seen the request.
    """

    request: Request
    policy: EvictionPolicy
    plan: LayerPlan
    row: Row
    before: Row
    turn: bool = False
    begun: bool = False

    @staticmethod
    def of(request: Request) -> Progress:
        """Return that of a request that has no token yet."""
        settings = request.settings
        assert settings.policy is not None
        assert settings.plan is not None
        row = Row(seed=settings.seed)
        return Progress(request, settings.policy, settings.plan, row, row)

    @property
    def over(self) -> bool:
        """Return whether the request holds more than its budget."""
        return self.row.length > self.plan.budget

    def due(self) -> bool:
        """Return whether the last step has made an eviction due, or a look at what is there; asked once a step."""
        end = is_end(self.plan, self.before, self.row, turn=self.turn)
        self.turn = False
        return end and (self.over or "every_query" in self.policy.needs)

    def advance(self, count: int, *, exact: bool) -> None:
        """Count the tokens of a step, which its forward pass will write.

        Args:
            count: tokens.
            exact: all chunks of a prompt are one turn; else each is one.
        """
        prompt = self.request.prompt
        decoding = count == 1 and self.row.seen >= prompt
        self.before, self.row = self.row, self.row.advanced(count, decoding=decoding)
        self.turn = not decoding and (not exact or self.row.seen >= prompt)
