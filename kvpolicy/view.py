"""What a policy may read about a layer: :class:`View`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from kvpolicy.output import OutputProjection

__all__ = ["LayerSpec", "State", "StageState", "View"]

DEFAULT_WORKSPACE = 256 * 2**20  #: bytes that one eviction may take for temporaries


@dataclass(frozen=True)
class LayerSpec:
    """Describe the layer that a stage remembers things about.

    Attributes:
        num_heads: KV heads.
        num_query_heads: query heads.
        head_dim: size of a key.
        value_dim: size of a value.
        capacity: slots per KV head.
        dtype: of keys and values.
        device: where they live.
        query_dim: size of a query as the window holds it, where it is not a key's.
        values_in_keys: a value is the first ``value_dim`` numbers of its key, and takes no memory.
    """

    num_heads: int
    num_query_heads: int
    head_dim: int
    value_dim: int
    capacity: int
    dtype: torch.dtype
    device: torch.device
    query_dim: int | None = None
    values_in_keys: bool = False


@dataclass(frozen=True, eq=False)
class StageState:
    """Hold what one stage remembers: tensors only.

    Attributes:
        slots: tensors ``[rows, H, S, ...]``; the store moves them together with the keys. A slot
            that holds no token, or one that the stage has not seen, holds zeros.
        rows: tensors ``[rows, ...]``, one entry a row.
    """

    slots: tuple[Tensor, ...] = ()
    rows: tuple[Tensor, ...] = ()


#: The state of a policy: a tuple parallel to its stages, ``None`` where a stage remembers nothing.
State: TypeAlias = tuple[StageState | None, ...]


@dataclass(frozen=True, eq=False)
class View:
    """Show a policy a batch of rows; a row is one layer of one request.

    Nothing in it may be modified. Slots are unordered: everything that a slot's place cannot
    tell is said. Keys and values of free slots may be anything, ``nan`` among them.

    ``B`` rows, ``H`` KV heads, ``Hq`` query heads, ``S`` slots, ``F`` fresh slots, ``W`` queries. What
    reads a field that needs something declares that in ``needs``; an engine which cannot offer it refuses.

    Attributes:
        keys: ``[B, H, S, D]`` in the cache's dtype, as the cache holds them (after RoPE).
        values: ``[B, H, S, Dv]`` in the cache's dtype, of the same tokens.
        positions: ``[B, H, S]`` int32, the logical position of each slot's token, -1 where free.
        order: ``[B, H, S]`` int32, the slots in position order, free slots last.
        fresh: ``[B, H, F]`` int64, the slots filled since the policy last saw the row, -1 padded.
        budget: ``[B, H]`` int64, slots to keep; a row that is not due has its length here.
        lengths: ``[B, H]`` int64, slots in use.
        seen: ``[B]`` int64, tokens seen, which is the position of the next one.
        prompt_length: ``[B]`` int64, tokens before the first decoded one.
        evictions: ``[B]`` int64, evictions of each row so far.
        request: ``[B]`` int64, keys randomness; 0 unless the caller sets it.
        seed: ``[B]`` int64, keys randomness; 0 unless the caller sets it.
        layer: ``[B]`` int64, which layer each row is.
        recent: the last tokens that are never candidates.
        max_budget: the largest budget, known on the host.
        max_victims: the largest number of slots that a head must lose, known on the host.
        queries: ``[B, Hq, W, D]`` in the cache's dtype, the observation window, oldest first, or None
            where the plan has none. Needs ``"queries"``.
        query_positions: ``[B, W]`` int32, -1 where absent, or None without a window. Those present are
            the row's last tokens, and the last of the window. Needs ``"queries"``.
        lse: ``[B, Hq, W]`` float32 (float64 for a float64 cache), the log-sum-exp of each query's
            logits over every slot that is not newer, and the sink logit where there is one; anything
            where the query is absent. None where the engine does not tell, or where something was
            evicted since one of the queries was asked. Needs ``"queries"``.
        num_layers: layers of the model.
        num_heads: KV heads of the model, more than ``H`` under tensor parallelism.
        head_offset: the global index of head 0.
        scaling: what the model multiplies logits by.
        softcap: what the model caps logits with, or None.
        sink_logits: ``[B, Hq]`` float, a logit that takes part in every softmax, or None.
        output: the output projection of each row's layer, or None where no stage asks for it. Needs
            ``"output_projection"``.
        rotary: ``[B, D / 2]`` float64, radians a position by which each pair of elements of queries and keys
            is turned, elements ``i`` and ``D / 2 + i``; or None where no stage asks for it. Needs
            ``"rotary"``.
        all_reduce: returns the sum of a tensor over the ranks that share the model's heads, the
            same on each of them, or None on one device; see :meth:`reduce_heads`. Needs
            ``"cross_heads"``.
        workspace: bytes that temporaries may take.
        sharing: ``[B]`` bool, rows whose heads may keep more or less than ``budget``, as the policy
            decides, as long as the row keeps the sum; None where no row may. Needs ``"head_budgets"``.
        stage: the index of the stage that reads this view; see :meth:`at`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    order: Tensor
    fresh: Tensor
    budget: Tensor
    lengths: Tensor
    seen: Tensor
    prompt_length: Tensor
    evictions: Tensor
    request: Tensor
    seed: Tensor
    layer: Tensor
    recent: int
    max_budget: int
    max_victims: int
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    lse: Tensor | None = None
    num_layers: int = 1
    num_heads: int = 1
    head_offset: int = 0
    scaling: float = 1.0
    softcap: float | None = None
    sink_logits: Tensor | None = None
    output: OutputProjection | None = None
    rotary: Tensor | None = None
    all_reduce: Callable[[Tensor], Tensor] | None = None
    workspace: int = DEFAULT_WORKSPACE
    sharing: Tensor | None = None
    stage: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return ``(B, H, S)``."""
        b, h, s = self.positions.shape
        return b, h, s

    @property
    def valid(self) -> Tensor:
        """Return ``[B, H, S]`` bool: the slot holds a token."""
        return self.positions >= 0

    @property
    def candidates(self) -> Tensor:
        """Return ``[B, H, S]`` bool: the token may be evicted, being older than the last ``recent``."""
        return self.valid & (self.positions < (self.seen - self.recent)[:, None, None])

    @property
    def num_candidates(self) -> Tensor:
        """Return ``[B, H]`` int64: how many candidates each head has."""
        return self.candidates.sum(-1)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype to score in: float64 for a float64 cache, else float32."""
        return torch.float64 if self.keys.dtype == torch.float64 else torch.float32

    @property
    def draw(self) -> Tensor:
        """Return ``[B]`` int64: which draw of randomness this is, the row's eviction count."""
        return self.evictions

    def at(self, stage: int) -> View:
        """Return this view as the stage with index ``stage`` reads it."""
        return self if stage == self.stage else dataclasses.replace(self, stage=stage)

    def reduce_heads(self, t: Tensor) -> Tensor:
        """Sum ``t`` over the ranks that share the heads of this layer: the identity on one device.

        A stage that calls it, or :meth:`gather_heads`, declares ``needs = {"cross_heads"}``. Slots are
        unordered, and one slot may hold other tokens on another rank: sum what does not depend on
        slots, or gather first.
        """
        return t if self.all_reduce is None else self.all_reduce(t)

    def gather_heads(self, t: Tensor) -> Tensor:
        """Return ``t`` of all KV heads of the model, in their order: the identity on one device.

        Args:
            t: ``[B, H, ...]``, of this rank's heads.

        Returns:
            ``[B, num_heads, ...]``, the same on every rank.
        """
        if self.all_reduce is None:
            return t
        # Others add zeros to what is mine, which is exact: the sum holds what each rank put there.
        every = t.new_zeros(t.shape[0], self.num_heads, *t.shape[2:])
        every[:, self.head_offset : self.head_offset + t.shape[1]] = t
        return self.reduce_heads(every)
