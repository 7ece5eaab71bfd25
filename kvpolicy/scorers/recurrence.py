"""Scorers that ask when, and how often, a token was attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import _check
from kvpolicy.each_query import each_query
from kvpolicy.errors import ParameterError
from kvpolicy.scorers.attention import newest
from kvpolicy.scorers.every_query import EveryQuery, uncounted
from kvpolicy.scores import Scores, order_key, part
from kvpolicy.stage import Scorer
from kvpolicy.view import LayerSpec, StageState, View

__all__ = ["AttentionCount", "LastAttended", "Recurrence"]

_SLACK = 1 - 1e-5  #: rounding must not decide whether one of n equal tokens has its n-th part


@dataclass(frozen=True, repr=False)
class _Attended(Scorer):
    """Say which queries attend to which tokens."""

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    window: int = 64
    threshold: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        _check.integer(self, "window", self.window, 1)
        if self.threshold is not None and self.share is not None:
            raise ParameterError(
                f"{type(self).__name__}(threshold={self.threshold}, share={self.share}): a threshold or a share says "
                "what is attended to; write one of them"
            )
        if self.threshold is not None:
            _check.number(self, "threshold", self.threshold, 0, 1, above=True)
        if self.share is not None:
            _check.number(self, "share", self.share, 0, 1, above=True)

    def queries_read(self, interval: int | None) -> int:
        """Return the window."""
        return self.window

    @property
    def _further(self) -> int:
        """Return how many bytes are made of each probability: keys of 64 bits, and their order."""
        return 0 if self.share is None else 24

    def attended(self, paid: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        """Return which slots each query attends to, of ``[n, w, S]`` probabilities and slots that it sees.

        Of a share it is exactly that many, the more recent of equal ones: one sharp query leaves 0 to most tokens.
        """
        count = seen.sum(-1, keepdim=True)
        if self.share is not None:
            key = torch.where(seen, order_key(paid, positions[:, None]), -1)
            rank = part(count, self.share).clamp(min=1)
            return seen & (key >= key.sort(-1, descending=True).values.gather(-1, rank - 1))
        least = self.threshold if self.threshold is not None else 1 / count.clamp(min=1).to(paid.dtype)
        return seen & (paid >= least * _SLACK)


@dataclass(frozen=True, repr=False)
class AttentionCount(_Attended):
    """Score a token by how many of the newest queries did not find it unimportant.

    A query counts for a token to which it attends, and for every token that is newer than the
    query, about which it says nothing. It attends to a token to which it gives at least the
    ``threshold``. Probabilities are those over the slots held now, averaged over the query heads
    of a group. The counts are whole numbers; among equal ones the more recent token stays.

    Args:
        window: how many of the newest queries are asked.
        threshold: a probability; where None, the uniform one, 1 over the slots that a query sees.
        share: instead of a threshold, the part of those slots to which a query attends, rounded down and 1 at
            least: the ones with the highest probabilities, the more recent of equal ones.

    Source: Scissorhands (arXiv 2305.17118), whose importance record counts how often a token had
    less than uniform attention within a history window.

    >>> from kvpolicy import Policy, TopK
    >>> Policy(AttentionCount(400) >> TopK(1024), recent=10)
    Policy(AttentionCount(window=400) >> TopK(1024), recent=10)
    """

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the counts, as weights."""
        queries, positions = newest(view, self.window)
        b, h, s = view.shape
        low, places = torch.zeros(b * h, s, device=view.positions.device), view.positions.flatten(0, 1)
        for at, paid, seen, _ in each_query(view, queries, positions, further=self._further):
            low[at] += (seen & ~self.attended(paid.mean(1), seen, places[at])).sum(1)
        asked = (positions >= 0).sum(-1)[:, None, None]
        return Scores.of(view, asked - low.view(b, h, s), weights=True)


@dataclass(frozen=True, repr=False)
class LastAttended(EveryQuery, _Attended):
    """Score a token by the time when it was last attended to: least recently used leaves first.

    Time is counted in positions, and a token counts as attended to when it comes. Every query is
    asked once: those of decoded tokens all, of a turn of several tokens the newest ``window``. So
    an eviction every ``interval`` tokens finds the times that a look at every step would have
    found. Among equal times the more recent token stays.

    Args:
        window: queries that the window holds, at least the policy's interval.
        threshold: a query attends to tokens to which it gives at least this probability, averaged
            over the query heads of a group; where None, 1 over the slots that it sees.
        share: instead of a threshold, the part of those slots to which a query attends, rounded down and 1 at
            least: the ones with the highest probabilities, the more recent of equal ones.

    Raises:
        BudgetError: when planned, the window is smaller than the interval.

    Source: the timestamps of RaaS (arXiv 2502.11147).

    >>> from kvpolicy import Policy, TopK
    >>> Policy(LastAttended(share=0.5) >> TopK(1024))
    Policy(LastAttended(share=0.5) >> TopK(1024))
    """

    def init(self, spec: LayerSpec, rows: int) -> StageState:
        """Return times of 0."""
        return StageState((_zeros(spec, rows),))

    def update(self, view: View, state: StageState | None) -> StageState:
        """Return the times after the queries that are new."""
        assert state is not None
        queries, positions = uncounted(view, self.window)
        times, places = state.slots[0].flatten(0, 1).clone(), view.positions.flatten(0, 1)
        for at, paid, seen, now in each_query(view, queries, positions, further=self._further):
            attended = self.attended(paid.mean(1), seen, places[at])
            times[at] = torch.maximum(times[at], torch.where(attended, now[..., None], 0).amax(1))
        return StageState((times.view(view.shape),))

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the times, as logits."""
        assert state is not None
        return Scores.of(view, torch.maximum(state.slots[0], view.positions), weights=False)


@dataclass(frozen=True, repr=False)
class Recurrence(EveryQuery, _Attended):
    """Score a token by how likely it is attended to again, given the longest pause it has made so far.

    With ``age`` the tokens since it was last attended to, and ``pause`` the longest time between
    two such moments, the score is ``2 sigmoid(-1 - age / pause) + 2 sigmoid(1 - pause)``; without
    the second term where there was no second moment yet. So a token may be silent for as long as
    it has been before, and those that come back often are preferred.

    Queries are asked as :class:`LastAttended` asks them. A token that is older than every query
    asked so far counts as attended to just before the first of these.

    Args:
        window: queries that the window holds, at least the policy's interval.
        threshold: a query attends to tokens to which it gives at least this probability, averaged
            over the query heads of a group; where None, 1 over the slots that it sees.
        share: instead of a threshold, the part of those slots to which a query attends, rounded down and 1 at
            least: the ones with the highest probabilities, the more recent of equal ones.

    Raises:
        BudgetError: when planned, the window is smaller than the interval.

    Source: the Maximum Recurrence Interval of LazyEviction (arXiv 2506.15969).

    >>> from kvpolicy import Policy, TopK
    >>> Policy(Recurrence(threshold=1e-4) >> TopK(1024))
    Policy(Recurrence(threshold=0.0001) >> TopK(1024))
    """

    def init(self, spec: LayerSpec, rows: int) -> StageState:
        """Return, for each slot, when its token was last attended to and its longest pause: nothing yet."""
        return StageState((_zeros(spec, rows), _zeros(spec, rows)))

    def update(self, view: View, state: StageState | None) -> StageState:
        """Return times and pauses after the queries that are new."""
        assert state is not None
        queries, positions = uncounted(view, self.window)
        # A slot that nobody has seen holds 0: times are kept 2 higher, since the earliest is -1.
        far = torch.iinfo(torch.int32).max
        first = torch.where(positions >= 0, positions, far).amin(-1)[:, None, None]
        began = torch.where(first < far, torch.maximum(view.positions, first) + 1, 0)
        held = torch.where(view.valid & (state.slots[0] == 0), began, state.slots[0]).to(torch.int32)
        times, pauses = held.flatten(0, 1).clone(), state.slots[1].flatten(0, 1).clone()
        places = view.positions.flatten(0, 1)
        for at, paid, seen, now in each_query(view, queries, positions, further=self._further):
            moments = torch.where(self.attended(paid.mean(1), seen, places[at]), now[..., None] + 2, 0)
            latest = torch.cat([times[at, None], moments], 1).cummax(1).values
            pause = torch.where(moments > 0, moments - latest[:, :-1], 0).amax(1)
            pauses[at] = torch.maximum(pauses[at], pause)
            times[at] = latest[:, -1]
        return StageState((times.view(view.shape), pauses.view(view.shape)))

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the scores, as weights."""
        assert state is not None
        times, pauses = state.slots
        age = (view.seen[:, None, None] + 1 - times).to(torch.float64)
        pause = pauses.to(torch.float64)
        again = torch.sigmoid(-1 - age / (pause + 1e-5)) + torch.where(pauses > 0, torch.sigmoid(1 - pause), 0)
        return Scores.of(view, 2 * again, weights=True)


def _zeros(spec: LayerSpec, rows: int) -> Tensor:
    return torch.zeros(rows, spec.num_heads, spec.capacity, dtype=torch.int32, device=spec.device)
