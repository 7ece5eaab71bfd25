"""How many blocks a request needs: what the scheduler and the worker both know, so that neither asks the other."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Reservation"]


@dataclass(frozen=True)
class Reservation:
    """Say how many blocks a request holds at most, from its admission to its end.

    A worker never fills more slots, whatever the scheduler does with a request: a prompt is cut before the step
    that decodes behind it, and an eviction is due before a token for which there would be no slot.

    Attributes:
        slots: of a request that decodes: budget + interval.
        budget: slots that an eviction leaves.
        block_size: slots of a block.
        chunk: prompt tokens of one step at most, where prompts are bounded; None where they are exact.

    >>> exact = Reservation(slots=160, budget=128, block_size=32, chunk=None)
    >>> exact.prefill(939), exact.decode
    (30, 5)
    >>> Reservation(slots=160, budget=128, block_size=32, chunk=256).prefill(939)
    12
    """

    slots: int
    budget: int
    block_size: int
    chunk: int | None

    @property
    def decode(self) -> int:
        """Return the blocks of a request that decodes."""
        return -(-self.slots // self.block_size)

    def prefill(self, tokens: int) -> int:
        """Return the blocks that a request is given when it is admitted, and holds until its prompt is cut.

        Args:
            tokens: of the prompt, and what was decoded before a preemption.
        """
        slots = tokens if self.chunk is None else min(tokens, self.budget + self.chunk)
        return max(-(-slots // self.block_size), self.decode)
