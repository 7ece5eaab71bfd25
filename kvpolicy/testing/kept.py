"""What a policy kept of a view, by position, and whether two answers are the same up to rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpolicy.policy import EvictionPolicy
from kvpolicy.scores import Keep
from kvpolicy.testing.changes import perturbed
from kvpolicy.testing.views import with_state
from kvpolicy.view import State, View

__all__ = [
    "Case",
    "Kept",
    "assert_counts",
    "assert_recent",
    "assert_same",
    "assert_sound",
    "assert_valid",
    "assert_victims",
    "kept_of",
    "select",
    "unsure_positions",
]

_TRIALS = 24  #: perturbations, each of which may turn a choice that rounding decides

Kept = tuple[tuple[frozenset[int], ...], ...]  #: positions, of each row and head


@dataclass(frozen=True)
class Case:
    """Hold a view, the state of its slots, and what a policy answered.

    Attributes:
        view: as an engine shows it.
        state: before it.
        keep: the answer.
        after: the state behind it.
    """

    view: View
    state: State
    keep: Keep
    after: State

    @property
    def kept(self) -> Kept:
        """Return the positions kept."""
        return kept_of(self.view, self.keep)


def select(policy: EvictionPolicy, view: View, state: State | None = None) -> Case:
    """Ask a policy, with the state that a store would hold where none is given."""
    held = with_state(policy, view) if state is None else state
    keep, after = policy.select(view, held)
    return Case(view, held, keep, after)


def kept_of(view: View, keep: Keep) -> Kept:
    """Return the positions kept, of each row and head."""
    positions = torch.where(keep.mask, view.positions, -1).tolist()
    return tuple(tuple(frozenset(head) - {-1} for head in row) for row in positions)


def assert_sound(view: View, keep: Keep) -> None:
    """Assert that an answer is well formed: valid slots, as many as the budget says, each once."""
    assert_valid(view, keep)
    assert_counts(view, keep)
    assert_victims(view, keep)


def assert_valid(view: View, keep: Keep) -> None:
    """Assert that a mask has the shape of the slots and names none that is free."""
    assert keep.mask.shape == view.positions.shape, (
        f"Keep.mask has shape {tuple(keep.mask.shape)}, and the slots {tuple(view.positions.shape)}"
    )
    assert keep.mask.dtype == torch.bool, f"Keep.mask is {keep.mask.dtype}, not bool"
    free = (keep.mask & ~view.valid).nonzero().tolist()
    assert not free, f"free slots are kept: (row, head, slot) {free[:4]}"


def assert_counts(view: View, keep: Keep) -> None:
    """Assert that each head keeps exactly ``min(budget, tokens)`` slots."""
    count, due = keep.mask.sum(-1), torch.minimum(view.budget, view.lengths)
    for row, head in (count != due).nonzero().tolist():
        raise AssertionError(
            f"row {row}, head {head} keeps {int(count[row, head])} slots; the budget is "
            f"{int(view.budget[row, head])} and {int(view.lengths[row, head])} hold tokens, so that "
            f"{int(due[row, head])} must stay"
        )


def assert_recent(case: Case) -> None:
    """Assert that the last ``recent`` tokens of a row stay in every head."""
    view = case.view
    newest = view.valid & (view.positions >= (view.seen - view.recent)[:, None, None])
    gone = (newest & ~case.keep.mask).nonzero().tolist()
    at = [(row, head, int(view.positions[row, head, slot])) for row, head, slot in gone]
    assert not at, f"recent={view.recent}, and (row, head, position) {at[:4]} were dropped"


def assert_victims(view: View, keep: Keep) -> None:
    """Assert that victims, where they are named, are what the mask drops, each once."""
    if keep.victims is None:
        return
    b, h, s = view.shape
    shape = tuple(keep.victims.shape)
    assert len(shape) == 3, f"Keep.victims has shape {shape}"
    assert shape[:2] == (b, h), f"Keep.victims has shape {shape}, and there are {b} rows, {h} heads"
    assert keep.victims.dtype == torch.int64, f"Keep.victims is {keep.victims.dtype}, not int64"
    dropped = view.valid & ~keep.mask
    for row in range(b):
        for head in range(h):
            named = [slot for slot in keep.victims[row, head].tolist() if slot != -1]
            where = f"row {row}, head {head}"
            assert all(0 <= slot < s for slot in named), f"{where}: victims {named} of {s} slots"
            assert len(named) == len(set(named)), f"{where}: a victim is named twice: {named}"
            gone = dropped[row, head].nonzero()[:, 0].tolist()
            assert sorted(named) == gone, f"{where}: victims are {named}, and the mask drops {gone}"


def assert_same(policy: EvictionPolicy, case: Case, other: Kept, change: str) -> None:
    """Assert that two answers keep the same positions wherever rounding does not decide.

    Where they differ, the policy is asked again about views that differ from the first one by
    about the error of rounding. A position may differ if some of these answers differ there, too.

    Args:
        policy: that gave both answers.
        case: the first question and its answer; its state is what :func:`with_state` gives.
        other: the other answer.
        change: what the second question changed.
    """
    first = case.kept
    if first == other:
        return
    unsure = unsure_positions(policy, case)
    for row, (ones, twos) in enumerate(zip(first, other, strict=True)):
        for head, (one, two) in enumerate(zip(ones, twos, strict=True)):
            wrong = (one ^ two) - unsure[row][head]
            assert not wrong, (
                f"{change} changes what row {row}, head {head} keeps: positions {sorted(one)} "
                f"before, {sorted(two)} after, and rounding explains no difference at {sorted(wrong)}"
            )


def unsure_positions(policy: EvictionPolicy, case: Case, *, same_state: bool = False) -> list[list[set[int]]]:
    """Return the positions of each row and head about which errors of rounding decide.

    Args:
        policy: asked some two dozen times.
        case: its view is changed a little each time.
        same_state: with the state of the case, instead of what the policy makes of the past of
            each changed view.
    """
    state = case.state if same_state else None
    answers = [case.kept]
    answers += [select(policy, perturbed(case.view, seed), state).kept for seed in range(_TRIALS)]
    rows, heads, _ = case.view.shape
    return [
        [
            set[int]().union(*(answer[row][head] for answer in answers))
            - set[int](case.kept[row][head]).intersection(*(a[row][head] for a in answers))
            for head in range(heads)
        ]
        for row in range(rows)
    ]
