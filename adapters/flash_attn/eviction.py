"""Evicting from caches that belong to the caller, in place: :func:`evict_`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvpolicy.adapters.flash_attn import given, pages
from kvpolicy.adapters.flash_attn.memory import Dense, Paged
from kvpolicy.adapters.flash_attn.state import EvictionState, lengths_on_device
from kvpolicy.errors import UsageError
from kvpolicy.eviction import due_rows, evict
from kvpolicy.policy import EvictionPolicy

__all__ = ["Evicted", "evict_"]


@dataclass(frozen=True, eq=False)
class Evicted:
    """Say what one call of :func:`evict_` did; true where a row was cut.

    Attributes:
        rows: which rows were cut to their budget.
        freed: ``[n]`` int32 on the device, the pages that rows no longer use, each as often as a row gave
            it up; None for dense caches.
    """

    rows: tuple[bool, ...]
    freed: Tensor | None = None

    def __bool__(self) -> bool:
        return any(self.rows)


def evict_(
    k_cache: Tensor | Sequence[Tensor],
    v_cache: Tensor | Sequence[Tensor],
    cache_seqlens: Tensor,
    policy: EvictionPolicy | Sequence[EvictionPolicy],
    state: EvictionState,
    *,
    tokens: int | Sequence[int] | None = None,
    block_table: Tensor | None = None,
    page_refs: Tensor | Sequence[Sequence[int]] | None = None,
    allocate: Callable[[int], Tensor | Sequence[int]] | None = None,
) -> Evicted:
    """Count the tokens of a forward pass, and evict where it is due: in place, in all layers at once.

    Call it at the end of each forward pass, once its keys and values are written and ``cache_seqlens``
    counts them. The first forward pass is a prompt; of later ones, those of one token a row are decoded,
    and others are turns. Survivors move from the tail into the holes, so that as much is copied as is
    evicted. Nothing waits for the device.

    Modifies the caches, ``cache_seqlens``, ``state``, and ``block_table`` where shared pages are copied.

    Args:
        k_cache: ``[B, S, Hkv, D]`` with any strides whose last is 1, a list of them, one a layer, or
            ``[L, B, S, Hkv, D]``. With a ``block_table``: pages ``[blocks, page, Hkv, D]``, a list of
            them, or ``[L, blocks, page, Hkv, D]``.
        v_cache: the same, with ``Dv`` in place of ``D``.
        cache_seqlens: ``[B]`` int32, the tokens that each row holds, the new ones among them; reduced
            where a row is cut. Compared with what the state has counted, on a GPU without waiting.
        policy: the one that the state was made with.
        state: what is remembered of these caches.
        tokens: new tokens of each row, or their number where it is the same. As many as were observed
            by default, or one. 0 counts nothing, and lets the policy see queries before a turn.
        block_table: ``[B, max_blocks]`` int32, the pages of each row, in order; the same for all layers.
            Behind the pages in use it may hold anything.
        page_refs: ``[B, max_blocks]`` integers on the host: how many hold each page of the table, in
            this batch and elsewhere. Where a row is cut, those of its pages that others hold, too, are
            copied first. Without it no page may stand in the table twice.
        allocate: called with a number, returns as many free pages, for these copies.

    Returns:
        Which rows were cut, and which pages they gave up.

    Raises:
        BindError: the policy is none; nothing was modified.
        UsageError: something does not fit together; nothing was modified. What only the device knows
            (lengths, pages) stops the device instead, where that is a GPU.

    Example:
        See :class:`EvictionState`.
    """
    given.check_state(state, policy)
    state.check_whole()
    store, before = state.store, state.store.rows
    given.check_policy(policy, state)
    keys, values = given.caches(k_cache, v_cache, state, paged=block_table is not None)
    if block_table is None and page_refs is not None:
        raise UsageError("page_refs= counts the pages of a block_table, and none was given: write block_table=, too")
    counts = given.tokens(tokens, state)
    asked = any(counts)
    turn = not (set(counts) == {1} and min(state.seen) > 0)
    after = [row.advanced(n, decoding=not turn) for row, n in zip(before, counts, strict=True)] if asked else before
    given.check_lengths(cache_seqlens, [row.length for row in after], state)
    due, shown = due_rows(store, before, after, turn=turn) if asked else ([False] * len(counts), [True] * len(counts))
    kept = [min(row.length, plan.budget) if cut else row.length
            for row, plan, cut in zip(after, store.plans, due, strict=True)]  # fmt: skip
    freed = None
    if block_table is not None:
        lengths = [row.length for row in after]
        book = pages.Book(block_table, page_refs, keys[0].shape[1:3], lengths, kept, due)
        book.check(state)
        freed = book.copy_shared_(keys, values, allocate)
        store.memory = Paged(keys, values, block_table)
    else:
        store.memory = Dense(keys, values)
    state.failed = True  # a policy that raises leaves slots half moved
    if asked:
        store.advance(after)
        state.observed, state.counts = set(), None
    if any(due) or any(shown):
        evict(store, due, state.logits, shown)
    store.memory = None
    state.failed = False
    if any(due):
        cache_seqlens.copy_(lengths_on_device(state))
    return Evicted(tuple(due), freed)
