"""Scorers that remember attention otherwise than by its sum: with decay, or perturbed by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvpolicy import _check, noise
from kvpolicy.each_query import each_query
from kvpolicy.scorers.attention import Attention
from kvpolicy.scorers.every_query import EveryQuery, uncounted
from kvpolicy.scores import Scores
from kvpolicy.stage import Scorer
from kvpolicy.transforms import Normalize
from kvpolicy.view import LayerSpec, StageState, View

__all__ = ["DecayedAttention", "PerturbedAttention"]


@dataclass(frozen=True, repr=False)
class DecayedAttention(Scorer):
    """Score a token by the largest attention it has received at an eviction, older ones decayed.

    At each eviction of a row its newest queries are asked as :class:`Attention` asks them, and
    each head's answer is divided by its largest over the candidates. The score is the larger of
    that and ``decay`` times the score at the eviction before.

    Args:
        window: how many of the newest queries are asked.
        decay: what is left of a score at the next eviction, from 0 (nothing) to 1 (all).
        pool: width of the average over neighbouring positions; odd, 1 for none.
        reduce: ``"mean"`` or ``"max"`` over window and group.
        over: softmax over the ``"candidates"`` alone, or over ``"all"`` slots.

    Source: the global score of G-KV (arXiv 2512.00504).

    >>> from kvpolicy import Policy, TopK
    >>> Policy(DecayedAttention() >> TopK(1024), recent=16)
    Policy(DecayedAttention() >> TopK(1024), recent=16)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    window: int = 16
    decay: float = 0.8
    pool: int = 1
    reduce: Literal["mean", "max"] = "mean"
    over: Literal["candidates", "all"] = "all"

    def __post_init__(self) -> None:
        _check.number(self, "decay", self.decay, 0, 1)
        _check.integer(self, "window", self.window, 1)
        _check.odd(self, "pool", self.pool)
        _check.choice(self, "reduce", self.reduce, ("mean", "max"))
        _check.choice(self, "over", self.over, ("candidates", "all"))

    def queries_read(self, interval: int | None) -> int:
        """Return the window."""
        return self.window

    def init(self, spec: LayerSpec, rows: int) -> StageState:
        """Return scores of 0."""
        return StageState((torch.zeros(rows, spec.num_heads, spec.capacity, device=spec.device),))

    def update(self, view: View, state: StageState | None) -> StageState:
        """Return the scores of the rows that lose something, and the old ones of the others.

        A row that is shown because another one is due must not decay for it.
        """
        assert state is not None
        attention = Attention(self.window, self.pool, self.reduce, self.over).score(view, None)
        now = torch.where(view.candidates, Normalize("max").apply(attention, view, None).values, 0)
        due = (view.lengths > view.budget).any(-1)[:, None, None]
        old = state.slots[0]
        return StageState((torch.where(due, torch.maximum(self.decay * old, now), old),))

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the scores, as weights."""
        assert state is not None
        return Scores.of(view, state.slots[0], weights=True)


@dataclass(frozen=True, repr=False)
class PerturbedAttention(EveryQuery):
    """Score a token by all the attention it has received so far, the logits perturbed by Gumbel noise.

    Each query's probabilities are ``softmax((logits + noise) / temperature)``, with noise of its
    own for each query, query head and token. The temperature is ``temperature`` for the queries of
    the prompt; it grows by ``growth`` with each token after the prompt, up to ``highest``. Queries
    are counted as :class:`AccumulatedAttention` counts them.

    Args:
        window: queries that the window holds, at least the policy's interval.
        temperature: of the prompt's queries.
        highest: temperature at most.
        growth: of the temperature with each token.
        seed: of the noise, beside the seed of each row.

    Raises:
        BudgetError: when planned, the window is smaller than the interval.

    Source: the score of Keyformer (arXiv 2403.09054).

    >>> from kvpolicy import Policy, TopK
    >>> Policy(PerturbedAttention() >> TopK(1024))
    Policy(PerturbedAttention() >> TopK(1024))
    """

    window: int = 64
    temperature: float = 1.0
    highest: float = 2.0
    growth: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        _check.integer(self, "window", self.window, 1)
        _check.number(self, "temperature", self.temperature, 0, above=True)
        _check.number(self, "highest", self.highest, self.temperature)
        _check.number(self, "growth", self.growth, 0)
        _check.integer(self, "seed", self.seed, 0, 2**63 - 1)

    def init(self, spec: LayerSpec, rows: int) -> StageState:
        """Return zero sums."""
        return StageState((torch.zeros(rows, spec.num_heads, spec.capacity, device=spec.device),))

    def update(self, view: View, state: StageState | None) -> StageState:
        """Return the sums with the queries added that are new."""
        assert state is not None
        queries, asked = uncounted(view, self.window)
        b, h, s = view.shape
        group = queries.shape[1] // h
        steps = (asked - view.prompt_length[:, None] + 1).clamp(min=0)
        temperature = (self.temperature + self.growth * steps).clamp(max=self.highest)
        # A query is counted once, and its position tells it from others: no draw has to.
        key = noise.stream(view, self.seed, redraw=False)
        heads = tuple(word.flatten()[:, None] for word in key)
        by_query = noise.extend((heads[0], heads[1]), asked.to(torch.int64).repeat_interleave(h, 0) & 0xFFFFFFFF)
        members = torch.arange(group, device=asked.device)[:, None]
        words = noise.extend((by_query[0][:, None], by_query[1][:, None]), members)  # [B * H, group, W]
        places = view.positions.flatten(0, 1).clamp(min=0)

        def drawn(at: slice, some: slice) -> Tensor:
            chosen = words[0][at, :, some], words[1][at, :, some]
            return noise.gumbel(chosen, places[at, None, None]).to(view.compute_dtype)

        added = torch.zeros(b * h, s, dtype=view.compute_dtype, device=asked.device)
        for at, paid, _, _ in each_query(view, queries, asked, noise=drawn, temperature=temperature):
            added[at] += paid.mean(1).sum(1)
        return StageState((state.slots[0] + added.view(b, h, s).to(torch.float32),))

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the sums, as weights."""
        assert state is not None
        return Scores.of(view, state.slots[0], weights=True)
