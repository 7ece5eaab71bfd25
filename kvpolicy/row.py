"""What happened to one request: :class:`Row`."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Row"]


@dataclass
class Row:
    """Count what happened to one request: host integers, the same for every layer of a store.

    Attributes:
        length: slots in use.
        settled: slots that the policy has seen; those behind were appended since, in order.
        seen: tokens, which is the position of the next one.
        prompt: tokens before the first decoded one.
        decoded: tokens decoded since the last turn.
        evictions: so far.
        intact: the position from which on no head has evicted anything.
        request: keys randomness.
        seed: keys randomness.
    """

    length: int = 0
    settled: int = 0
    seen: int = 0
    prompt: int = 0
    decoded: int = 0
    evictions: int = 0
    intact: int = 0
    request: int = 0
    seed: int = 0

    def advanced(self, count: int, *, decoding: bool) -> Row:
        """Return this row after ``count`` more tokens, which are decoded, or a turn."""
        prompt = self.prompt + count if not decoding and self.prompt == self.seen else self.prompt
        # Every row of every step comes here: `replace` takes three times as long.
        return Row(
            self.length + count,
            self.settled,
            self.seen + count,
            prompt,
            self.decoded + count if decoding else 0,
            self.evictions,
            self.intact,
            self.request,
            self.seed,
        )

    def whole(self, newest: int) -> bool:
        """Return whether nothing was evicted since the newest tokens were there, ``newest`` of them at most.

        All that such a token saw is still in its slots. It is certain of tokens that the policy has
        not seen yet, and of every token before the first eviction.
        """
        return self.evictions == 0 or min(newest, self.seen) <= self.length - self.settled

    def evicted(self, length: int, recent: int) -> Row:
        """Return this row after the policy has seen it and left ``length`` slots of it."""
        if length >= self.length:
            return replace(self, settled=self.length)
        intact = max(self.intact, self.seen - recent)
        return replace(self, length=length, settled=length, evictions=self.evictions + 1, intact=intact)
