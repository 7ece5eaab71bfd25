"""What a generation was seen to keep: :class:`Trace`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import UsageError
from kvpolicy.receipt import size
from kvpolicy.tracing.packing import packed, packed_floats, unpacked

__all__ = ["Trace", "ranges"]

FORMAT, VERSION = "kvpolicy trace", 1
WHOLE = ("dropped", "protected_first", "protected_last", "tier")  #: arrays of small integers


def ranges(numbers: Iterable[int]) -> str:
    """Return whole numbers in words, without those inside of a run.

    >>> ranges([0, 1, 2, 3]), ranges([0, 5, 6, 11])
    ('0 to 3', '0, 5 to 6, 11')
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


@dataclass(frozen=True, eq=False)
class Trace:
    """Hold what every KV head kept of a text while a model wrote it.

    A head is one KV head of one layer that evicts; arrays have a line for each, in the order of ``heads``.
    Evictions are numbered from 1: a forward pass after which some layer holds less is one. What was
    dropped never returns, so that one number a token says all that happened to it.

    Attributes:
        run: what it takes to run it again: ``model``, ``policy`` (every parameter written out), ``prompt``,
            ``chat``, ``system``, ``max_new_tokens``, ``temperature``, ``seed``, ``dtype``, ``device`` and
            ``versions``.
        ids: the tokens, prompt and text; the last one written was never given to the model.
        pieces: the text of each token. A character of several tokens stands with the first of them.
        prompt_length: tokens of the prompt.
        heads: layer and KV head of each line of the arrays.
        evictions: the tokens seen when each eviction happened.
        steps: the tokens seen after each forward pass.
        nbytes: bytes allocated for the cache after each forward pass.
        used_nbytes: those of them that hold a key or a value of a token.
        full_nbytes: what a cache that keeps every token would hold.
        norm: how large a value is: ``"range"``, ..., as in :class:`~kvpolicy.ValueGuard`.
        dropped: ``[heads, tokens seen]`` int32, the eviction that dropped the token, 0 while it is held.
        values: ``[heads, tokens seen]`` float32, how large the token's value is.
        protected_first: ``[heads, tokens seen]`` int32, the first eviction at which a guard protected it, or 0.
        protected_last: the last such eviction. What guards protect at one eviction and not at a later one, they
            may drop; between the two they protect it.
        tier: ``[heads, tokens seen]`` int32, the highest protection that a guard gave it: 2 for its value,
            3 as part of the prompt, 4 as a sink, 0 for none.
    """

    run: dict[str, Any]
    ids: tuple[int, ...] = field(repr=False)
    pieces: tuple[str, ...] = field(repr=False)
    prompt_length: int
    heads: tuple[tuple[int, int], ...] = field(repr=False)
    evictions: tuple[int, ...] = field(repr=False)
    steps: tuple[int, ...] = field(repr=False)
    nbytes: tuple[int, ...] = field(repr=False)
    used_nbytes: tuple[int, ...] = field(repr=False)
    full_nbytes: tuple[int, ...] = field(repr=False)
    norm: str
    dropped: Tensor = field(repr=False)
    values: Tensor = field(repr=False)
    protected_first: Tensor = field(repr=False)
    protected_last: Tensor = field(repr=False)
    tier: Tensor = field(repr=False)

    @property
    def seen(self) -> int:
        """Return the tokens that went through the model."""
        return self.dropped.shape[1]

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layers that evict."""
        return tuple(dict.fromkeys(layer for layer, _ in self.heads))

    def dropped_at(self) -> Tensor:
        """Return the tokens seen when each was dropped, ``[heads, tokens]`` int64; beyond all where it is held."""
        never = torch.iinfo(torch.int64).max
        return torch.tensor([never, *self.evictions])[self.dropped.long()]

    def held(self, seen: int | None = None) -> Tensor:
        """Return which tokens each head holds once so many were seen, and what was due was evicted.

        Args:
            seen: tokens; all by default.

        Returns:
            ``[heads, tokens]`` bool.
        """
        now = self.seen if seen is None else seen
        return (torch.arange(self.seen) < now) & (self.dropped_at() > now)

    def kept(self, layer: int, seen: int | None = None) -> Tensor:
        """Return the positions that each head of a layer holds, as :meth:`~kvpolicy.Receipt.positions` does.

        Args:
            layer: one that evicts.
            seen: tokens; all by default.

        Returns:
            ``[KV heads, slots]`` int32, ascending, -1 behind the last one of a shorter head.

        Raises:
            UsageError: this layer does not evict.
        """
        lines = [line for line, (of, _) in enumerate(self.heads) if of == layer]
        if not lines:
            raise UsageError(f"layer {layer} does not evict; those that do are {ranges(self.layers)}")
        positions = [one.nonzero().flatten().to(torch.int32) for one in self.held(seen)[lines]]
        return torch.nn.utils.rnn.pad_sequence(positions, batch_first=True, padding_value=-1)

    def lifetimes(self) -> Tensor:
        """Return for how many tokens each token was held, itself among them: ``[heads, tokens]`` int64.

        Of those that are held to the end, until then: they may have lived longer.
        """
        return self.dropped_at().clamp(max=self.seen) - torch.arange(self.seen)

    def slots(self) -> Tensor:
        """Return how many tokens each head holds after each forward pass, ``[heads, steps]`` int64."""
        steps = torch.tensor(self.steps)
        starts = torch.searchsorted(steps, torch.arange(self.seen), right=True)
        change = torch.zeros(len(self.heads), len(steps) + 1, dtype=torch.int64)
        ends = torch.searchsorted(steps, self.dropped_at())
        change.scatter_add_(1, starts.expand_as(ends), torch.ones_like(ends))
        change.scatter_add_(1, ends, -torch.ones_like(ends))
        return change.cumsum(1)[:, :-1]

    def __str__(self) -> str:
        """Return what happened, in a few lines."""
        written, held = len(self.ids) - self.prompt_length, self.held()
        cells, some = int(held.sum()), int(held.any(0).sum())
        return "\n".join(
            [
                f"policy      {self.run['policy']}",
                f"model       {self.run['model']}",
                f"tokens      {self.prompt_length:,} of the prompt, {written:,} written",
                f"heads       {len(self.heads):,} in {len(self.layers):,} layers that evict",
                f"evictions   {len(self.evictions):,}",
                f"held        {cells:,} of {held.numel():,} tokens x heads, and {some:,} of {self.seen:,} tokens "
                "by some head",
                f"memory      {size(self.nbytes[-1])} allocated, {size(self.full_nbytes[-1])} with the full cache",
            ]
        )

    # Files

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can write."""
        found: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        for one in fields(self):
            value = getattr(self, one.name)
            found[one.name] = packed(value) if one.name in WHOLE else value
        return {**found, "values": packed_floats(self.values)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as JSON: about ten bytes for each token and ten heads.

        Args:
            path: of the file.
        """
        Path(path).write_text(json.dumps(self.to_dict(), separators=(",", ":")), "utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read what :meth:`save` wrote. Magnitudes of values are within a thousandth of what they were.

        Args:
            path: of the file.

        Raises:
            UsageError: the file is no trace, or of a newer version.
        """
        try:
            what = json.loads(Path(path).read_text("utf-8"))
        except ValueError as error:
            raise UsageError(f"{path} is not JSON, and so no trace: {error}") from error
        if not isinstance(what, dict) or what.get("format") != FORMAT:
            raise UsageError(f"{path} is no trace; Trace.save() and kvpolicy trace --json write one")
        if what.get("version") != VERSION:
            raise UsageError(f"{path} is a trace of version {what.get('version')}; this kvpolicy reads {VERSION}")
        try:
            return cls(**{one.name: _read(one.name, what[one.name]) for one in fields(cls)})
        except (KeyError, TypeError) as error:
            raise UsageError(f"{path} is a trace that is not whole: {error!r}; record it again") from error


def _read(name: str, value: Any) -> Any:
    """Return the value of an attribute as JSON has it."""
    if name in WHOLE or name == "values":
        return unpacked(value)
    if name == "heads":
        return tuple((layer, head) for layer, head in value)
    return tuple(value) if isinstance(value, list) else value
