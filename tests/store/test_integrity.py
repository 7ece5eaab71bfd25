"""A store that contradicts itself says what contradicts what; and two ways in which one once did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvpolicy import Attention, IntegrityError, KeyNorm, LayerSpec, ModelSpec, Policy, TopK
from kvpolicy.eviction import LogitSpec, evict
from kvpolicy.integrity import check_integrity
from kvpolicy.row import Row
from kvpolicy.store import Store

LOGITS = LogitSpec(0.5)


def filled(tokens: int, requests: int = 2) -> Store:
    """A store whose rows hold so many tokens, none of them settled."""
    policy = Policy(Attention(3) + KeyNorm() >> TopK(6), interval=4, recent=2)
    plan = policy.plan(ModelSpec(num_layers=1)).layers[0]
    assert plan is not None
    spec = LayerSpec(2, 4, 4, 4, plan.capacity, torch.float32, torch.device("cpu"))
    store = Store(policy, plan, spec, [5], [Row() for _ in range(requests)])
    append(store, tokens)
    return store


def append(store: Store, tokens: int) -> None:
    random = torch.Generator().manual_seed(tokens)
    count, counts = len(store.rows), [tokens] * len(store.rows)
    made = [torch.randn(count, heads, tokens, 4, generator=random) for heads in (2, 2, 4)]
    store.append(0, made[0], made[1], counts)
    store.observe(0, made[2], counts)
    store.advance([row.advanced(tokens, decoding=False) for row in store.rows])


def positions(store: Store, slot: int, position: int) -> None:
    store.positions[0, 1, 1, slot] = position


def order(store: Store, place: int, slot: int) -> None:
    store.order[0, 1, 1, place] = slot


def row(store: Store, name: str, value: int) -> None:
    setattr(store.rows[1], name, value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: positions(s, 0, 9), "layer 5, request 1, head 1: slot 0 .* position 9, outside"),
        (lambda s: positions(s, 0, -1), "slot 0 is in use and has position -1"),
        (lambda s: positions(s, 0, int(s.positions[0, 1, 1, 1])), "is held by two slots"),
        (lambda s: positions(s, 7, 3), "slot 7 lies behind length=6"),
        (lambda s: order(s, 0, int(s.order[0, 1, 1, 1])), "order is no permutation"),
        (lambda s: s.order[0, 1, 1].copy_(s.order[0, 1, 1].flip(0)), "they should ascend"),
        (lambda s: row(s, "length", 11), "length=11, and there are 10 slots"),
        (lambda s: row(s, "settled", 7), "settled=7 of length=6"),
        (lambda s: row(s, "intact", 9), "intact=9, and seen=8"),
        (lambda s: row(s, "intact", 0), "every token from intact=0"),
        (lambda s: row(s, "intact", 2), "tokens from intact=2 on are there"),
        (lambda s: row(s, "prompt", 9), "prompt=9, and seen=8"),
        (lambda s: s.window.positions[0, 1].fill_(7), "the window's queries have positions"),
        (lambda s: s.window.at.__setitem__(1, 3), "goes to place 3 of 3"),
        (lambda s: setattr(s, "keys", s.keys.double()), "keys: torch.float64"),
        (lambda s: setattr(s, "values", s.values[..., :2]), "values: shape"),
        (lambda s: setattr(s, "order", s.order.mT.contiguous().mT), "order: not contiguous"),
    ],
)
def test_a_contradiction_is_named(spoil: Callable[[Store], object], said: str) -> None:
    store = filled(8)
    evict(store, [True, True], LOGITS)
    store.check_integrity()
    spoil(store)
    with pytest.raises(IntegrityError, match=said):
        store.check_integrity()


def test_nothing_is_modified() -> None:
    store = filled(5)
    before = [t.clone() for t in store.tensors()]
    check_integrity(store)
    assert all(torch.equal(a, b) for a, b in zip(before, store.tensors(), strict=True))


def test_a_row_that_is_due_and_short_keeps_everything() -> None:
    store = filled(3)
    evict(store, [True, True], LOGITS)
    store.check_integrity()
    assert [one.length for one in store.rows] == [3, 3]


def test_crop_forgets_positions_that_were_settled_but_not_seen_by_the_policy() -> None:
    store = filled(4)
    store.settle()
    store.crop([2, 0])
    store.check_integrity()
    assert (store.positions[0, 0, :, 2:] == -1).all()
