"""A turn, several tokens at once: attended in full one layer at a time, and cut at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from kvpolicy.eviction import LogitSpec, evict, evict_due, fill_from
from kvpolicy.row import Row
from kvpolicy.store import Store

__all__ = ["begin_turn", "end_turn", "take_turn"]


def begin_turn(store: Store, counts: Sequence[int], logits: Callable[[], LogitSpec]) -> list[Row]:
    """Prepare a store for a turn, before any of its layers runs.

    Policies that count every query are shown what is there: a turn may push queries out of the window.

    Args:
        store: settled; what policies remember may be modified.
        counts: new tokens of each row.
        logits: what the model's attention does; called only if a policy is asked.

    Returns:
        Every row with the new tokens, before any is dropped.
    """
    if store.longest:
        shown = ["every_query" in band.policy.needs for band in store.bands for _ in range(band.count)]
        if any(shown):
            evict(store, [False] * len(shown), logits(), shown)
        store.settle()
    return [row.advanced(count, decoding=False) for row, count in zip(store.rows, counts, strict=True)]


def take_turn(
    store: Store,
    index: int,
    keys: Tensor,
    values: Tensor,
    counts: Sequence[int],
    after: Sequence[Row],
    logits: Callable[[], LogitSpec],
    tail: int = 0,
) -> None:
    """Put a turn's tokens of one layer into its slots: all of them, or what the policies keep.

    Args:
        store: one layer of it is modified; its queries are in the window already.
        index: the layer, counted within the store.
        keys: ``[requests, H, S_old + T, D]``: the slots in use, up to the longest row, then the
            new tokens, left-padded.
        values: ``[requests, H, S_old + T, Dv]``.
        counts: new tokens of each row.
        after: what :func:`begin_turn` returned for them, but for the tail.
        logits: what the attention of this layer does; called only if a policy is asked.
        tail: the last tokens, which are no part of the turn and stay behind it.
    """
    if not any(store.over_budget(after)):
        old = store.longest_in(index)
        store.append(index, keys[:, :, old:], values[:, :, old:], counts)
        return
    end = keys.shape[2] - tail
    turned = [count - tail for count in counts]
    fill_from(store, index, keys[:, :, :end], values[:, :, :end], turned, after, logits())
    if tail:
        behind = [row.length for row in store.cut_rows(after)]
        store.append(index, keys[:, :, end:], values[:, :, end:], [tail] * len(counts), behind)


def end_turn(store: Store, after: Sequence[Row], logits: Callable[[], LogitSpec]) -> None:
    """Make a turn count, and evict where it has not been cut.

    Args:
        store: modified; every layer has taken the turn.
        after: what :func:`begin_turn` returned.
        logits: what the model's attention does; called only if a policy is asked.
    """
    before, filled = store.rows, any(store.over_budget(after))
    store.advance(store.cut_rows(after) if filled else after)
    if not filled:  # policies were shown a turn that was cut
        evict_due(store, before, logits, turn=True)
