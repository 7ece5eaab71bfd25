"""What is remembered of caches that their owner writes himself: :class:`EvictionState`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.adapters import planning
from kvpolicy.adapters.flash_attn import arguments
from kvpolicy.adapters.flash_attn.groups import ADAPTER, follow, layers_by_plan, new_rows
from kvpolicy.adapters.flash_attn.owned import OwnedStore
from kvpolicy.errors import BudgetError, UnsupportedError, UsageError
from kvpolicy.eviction import LogitSpec
from kvpolicy.host import on_device
from kvpolicy.policy import EvictionPolicy
from kvpolicy.receipt import Receipt, receipt_of
from kvpolicy.view import DEFAULT_WORKSPACE, LayerSpec

__all__ = ["EvictionState"]


class EvictionState:
    """Remember what :func:`evict_` must know of caches that you own and write.

    Counts, the position of each slot's token, the newest queries, and what the policy remembers; nothing
    of keys and values. In each layer, :meth:`observe` takes the new queries.

    Args:
        policy: what to keep; any :class:`~kvpolicy.EvictionPolicy`, or one for each row of the batch.
        slots: of each row, ``S`` of a dense cache, or pages of a row times their size.
        num_layers: layers of the model.
        num_heads: KV heads.
        num_query_heads: query heads, a multiple of it.
        head_dim: size of a query and a key.
        dtype: of queries, keys and values.
        value_dim: size of a value; ``head_dim`` by default.
        batch_size: rows.
        device: where the caches are.
        max_new_tokens: tokens decoded at most, needed by policies that evict at the end of a turn only.
        scaling: what logits are multiplied by; ``head_dim ** -0.5`` by default.
        softcap: what they are capped with, or None.
        seeds: of each row's randomness; all 0 by default.
        requests: names of the rows, integers that key randomness beside the seeds; all 0 by default.
        lse: queries come with their log-sum-exp, which kernels return; scores are then cheaper.
        workspace: bytes that the temporaries of one eviction may take.

    Raises:
        BindError: the policy cannot be followed, or there is no such device.
        BudgetError: there are fewer slots than it asks for.
        UnsupportedError: layers or heads with budgets of their own.
        ParameterError: a size, a dtype, a scale or a cap that is none.

    Example:
        >>> import torch
        >>> from kvpolicy.adapters.flash_attn import evict_
        >>> from kvpolicy.policies import knorm
        >>> policy = knorm(8, interval=4, recent=2)
        >>> sizes = {"slots": 32, "num_layers": 1, "num_heads": 1, "num_query_heads": 2, "head_dim": 8}
        >>> state = EvictionState(policy, dtype=torch.float32, **sizes)
        >>> k_cache, v_cache = torch.randn(1, 32, 1, 8), torch.randn(1, 32, 1, 8)
        >>> cache_seqlens = torch.tensor([20], dtype=torch.int32)  # a prompt was written
        >>> bool(evict_(k_cache, v_cache, cache_seqlens, policy, state, tokens=20)), cache_seqlens.tolist()
        (True, [8])
    """

    def __init__(
        self,
        policy: EvictionPolicy | Sequence[EvictionPolicy],
        *,
        slots: int,
        num_layers: int,
        num_heads: int,
        num_query_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        value_dim: int | None = None,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        max_new_tokens: int | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        seeds: Sequence[int] | None = None,
        requests: Sequence[int] | None = None,
        lse: bool = False,
        workspace: int = DEFAULT_WORKSPACE,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "num_query_heads": num_query_heads, "slots": slots}
        sizes |= {"head_dim": head_dim, "value_dim": value_dim, "batch_size": batch_size, "workspace": workspace}
        arguments.check_sizes("EvictionState", sizes)
        arguments.check_logits("EvictionState", scaling, softcap)
        arguments.check_dtype("EvictionState", dtype)
        device = arguments.device_of("EvictionState", device)
        self.policies, self.batch_size, self.num_layers = follow(policy, batch_size), batch_size, num_layers
        by_plan = layers_by_plan(self.policies, num_layers, num_heads, max_new_tokens)
        plans, layers = by_plan[0]
        if len(by_plan) > 1 or any(plan.head_wise for plan in plans):
            raise UnsupportedError(
                f"{ADAPTER} knows one length of each row (cache_seqlens), and this policy gives layers or heads "
                "budgets of their own: write TopK(budget), or use FlashCache, where layers may differ"
            )
        needed = max(plan.capacity for plan in plans)
        if slots < needed:
            raise BudgetError(f"the policy fills up to {needed} slots of a row, and there are {slots}: allocate more")
        spec = LayerSpec(num_heads, num_query_heads, head_dim, value_dim, slots, dtype, device)
        self.store = OwnedStore(self.policies, plans, spec, layers, new_rows(batch_size, requests, seeds), lse=lse)
        self.logits = LogitSpec(
            scaling=head_dim**-0.5 if scaling is None else scaling,
            softcap=softcap,
            num_layers=num_layers,
            num_heads=num_heads,
            workspace=workspace,
        )
        self.observed: set[int] = set()  #: layers whose queries of this forward pass are known
        self.counts: list[int] | None = None  #: and their tokens
        self.failed, self.lse = False, lse

    @property
    def seen(self) -> list[int]:
        """Return the tokens of each row, which is the position of its next one."""
        return [row.seen for row in self.store.rows]

    @property
    def lengths(self) -> list[int]:
        """Return the slots in use of each row, which is what ``cache_seqlens`` holds."""
        return [row.length for row in self.store.rows]

    @property
    def asks_queries(self) -> bool:
        """Return whether the policy asks queries, so that each layer must :meth:`observe` them."""
        return self.store.window.size > 0

    def next_positions(self, width: int, counts: Sequence[int] | None = None) -> Tensor:
        """Return the positions of the next tokens, ``[B, width]`` int64 on the device, 0 for pads.

        Args:
            width: columns of the next forward pass.
            counts: tokens of each row, its last columns; all of them by default.
        """
        given = arguments.check_counts(counts, self.batch_size, arguments.checked_width(width))
        return arguments.positions(self.seen, width, given, self.store.spec.device)

    def observe(self, layer: int, q: Tensor, counts: Sequence[int] | None = None, *, lse: Tensor | None = None) -> None:
        """Remember the newest queries of one layer; each layer calls it once a forward pass.

        Args:
            layer: index.
            q: ``[B, T, Hq, D]``, rotated.
            counts: tokens of each row, which are its last columns; all of them by default.
            lse: ``[B, Hq, T]``, for a state made with ``lse=True``: what the kernel returned for them,
                over all that each query saw.

        Raises:
            UsageError: queries of another shape, dtype or device, a layer that does not exist or is
                observed twice, or a policy that has to be asked first; nothing was modified.
        """
        self.check_whole()
        store = self.store
        if layer not in store.layers:
            raise UsageError(f"layer {layer!r}: there are the layers 0 to {self.num_layers - 1}")
        if layer in self.observed:
            raise UsageError(f"layer {layer} was observed in this forward pass: call evict_() at the end of each")
        arguments.check_queries(q, store.spec, self.batch_size)
        given = arguments.check_counts(counts, self.batch_size, q.shape[1])
        if self.counts is not None and given != self.counts:
            raise UsageError(f"layer {layer} has {given} tokens, and other layers of this forward pass {self.counts}")
        unseen = any(row.length > row.settled for row in store.rows)
        if q.shape[1] > 1 and unseen and any("every_query" in policy.needs for policy in self.policies):
            raise UsageError(
                "the policy counts every query, and a turn may push out some that it has not seen: call "
                "evict_(..., tokens=0) before the turn"
            )
        if (lse is not None) != self.lse:
            raise UsageError(
                "the state was made with lse=True: give observe(..., lse=) what the kernel returned"
                if self.lse
                else "observe() was given lse=, and the state has no place for it: make EvictionState(..., lse=True)"
            )
        if lse is not None and (tuple(lse.shape) != (len(q), q.shape[2], q.shape[1]) or lse.device != q.device):
            raise UsageError(f"lse is {tuple(lse.shape)} on {lse.device}; it is [B, Hq, T], beside the queries")
        if self.counts is None and not any(self.seen):
            store.window.align(given)
        store.observe(layer, q.transpose(1, 2), given, lse)
        self.observed.add(layer)
        self.counts = given

    def check_whole(self) -> None:
        """Refuse to go on behind an eviction that failed half-way.

        Raises:
            UsageError: one did.
        """
        if self.failed:
            raise UsageError("an eviction failed half-way; reset() the state and write the caches anew")

    def reset(self) -> None:
        """Forget everything but the rows' names and seeds; set ``cache_seqlens`` to 0 yourself."""
        self.store.reset()
        self.observed, self.counts, self.failed = set(), None, False

    def receipt(self) -> Receipt:
        """Return what happened so far; ``nbytes`` counts what the state holds, and no keys and values."""
        texts = [planning.policy_text(policy) for policy in self.policies]
        return receipt_of(texts, [self.store], [], turn_nbytes=0, other_nbytes=0, skipped={})

    def check_integrity(self) -> None:
        """Check that what is remembered agrees with itself; waits for the device; modifies nothing.

        Raises:
            IntegrityError: two parts contradict each other; the message says which, and where.
        """
        self.store.check_integrity()


def lengths_on_device(state: EvictionState) -> Tensor:
    """Return the slots in use of each row, ``[B]`` int32 on the device."""
    return on_device(state.lengths, state.store.spec.device, torch.int32)
