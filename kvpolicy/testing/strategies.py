"""Hypothesis strategies for views, scores, budgets and policies.

Structure is drawn, so that it shrinks; tensors are filled from a seeded generator, which is much
faster than drawing elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from kvpolicy.policy import EvictionPolicy, ModelSpec
from kvpolicy.scores import Scores, Tier
from kvpolicy.testing.algebra import budgets, policies, scorers, stages, transforms
from kvpolicy.testing.views import Data, RowSpec, ViewSpec
from kvpolicy.view import View

__all__ = [
    "DTYPES",
    "FINITE",
    "NOT_FINITE",
    "budgets",
    "policies",
    "scorers",
    "scores",
    "stages",
    "transforms",
    "view_specs",
    "view_specs_for",
    "views",
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FINITE: tuple[Data, ...] = ("normal", "ties", "wide", "normal", "ties", "wide", "equal", "zero")
NOT_FINITE: tuple[Data, ...] = ("infinite", "nan", "huge")
_NAMES = (0, 1, 7, 2**40 + 3)  #: requests and seeds


@st.composite
def view_specs(
    draw: DrawFn,
    *,
    budget: int | None = None,
    recent: int | None = None,
    window: int | None = None,
    layers: Sequence[int] = (0, 1, 2),
    num_layers: int | None = None,
    max_rows: int = 3,
    max_length: int = 24,
    dtypes: Sequence[torch.dtype] = DTYPES,
    data: Sequence[Data] = FINITE,
    due: bool | None = None,
) -> ViewSpec:
    """Draw the description of a view.

    Args:
        draw: hypothesis's own.
        budget: of every row that is due; drawn where None.
        recent: the last tokens, never candidates; drawn where None.
        window: queries, 0 for none; drawn where None.
        layers: which layers rows may be.
        num_layers: of the model; None for no more than the rows need.
        max_rows: rows at most.
        max_length: slots in use of a row at most.
        dtypes: of keys, values and queries.
        data: what they hold.
        due: whether rows are due; drawn for each where None.
    """
    b = draw(st.integers(1, 12)) if budget is None else budget
    r = draw(st.integers(1, 4)) if recent is None else recent
    w = draw(st.sampled_from((0, 1, 3, 6))) if window is None else window
    edges = st.sampled_from([n for n in (0, 1, r, b, b + 1) if n <= max_length])
    over = st.integers(min(b + 1, max_length), max_length)
    pick = _Picker(draw)
    lengths = [draw(edges if pick(4) == 3 else over) for _ in range(1 + pick(max_rows))]
    rows = [draw(_rows(length, b, r, w, layers, due)) for length in lengths]
    heads, offset = 1 + pick(3), 2 * pick(2)
    return ViewSpec(
        rows=tuple(rows),
        heads=heads,
        group=1 + pick(3),
        head_dim=(4, 2, 8)[pick(3)],
        value_dim=(4, 2, 6)[pick(3)],
        spare=pick(4),
        recent=r,
        window=w,
        num_layers=num_layers,
        num_heads=heads + offset + pick(2),
        head_offset=offset,
        dtype=dtypes[pick(len(dtypes))],
        data=data[pick(len(data))],
        softcap=(None, 5.0)[pick(2)],
        sinks=bool(pick(2)),
        shuffle=bool(pick(4)),
        generator=draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def _rows(
    draw: DrawFn,
    length: int,
    budget: int,
    recent: int,
    window: int,
    layers: Sequence[int],
    due: bool | None,
) -> RowSpec:
    evicted = draw(st.integers(0, 30)) if length > recent else 0
    fresh = draw(st.integers(0, length - recent if evicted else length))
    seen = length + evicted
    pick = _Picker(draw)
    is_due = pick(4) != 3 if due is None else due
    return RowSpec(
        length=length,
        evicted=evicted,
        fresh=fresh,
        budget=budget if is_due else None,
        asked=(None, 0, 1, window // 2)[pick(4)],
        layer=layers[pick(len(layers))],
        evictions=1 + pick(4) if evicted else 0,
        request=_NAMES[pick(4)],
        seed=_NAMES[pick(4)],
        prompt=pick(seen + 1),
    )


class _Picker:
    """Make small choices, several from one number: drawing each of them is most of the time."""

    def __init__(self, draw: DrawFn) -> None:
        self.draw, self.left, self.room = draw, 0, 1

    def __call__(self, count: int) -> int:
        """Return one of ``count`` choices, the first one where the number has shrunk to 0."""
        if self.room < count:
            # Small numbers are drawn more often than others: spread them over all choices.
            number = self.draw(st.integers(0, 2**24 - 1))
            self.left, self.room = number * 0x9E3779B1 % 2**24, 2**24
        self.left, chosen = divmod(self.left, count)
        self.room //= count
        return chosen


def views(**options: object) -> SearchStrategy[View]:
    """Draw a view; the options are those of :func:`view_specs`."""
    specs: Callable[..., SearchStrategy[ViewSpec]] = view_specs
    return specs(**options).map(lambda spec: spec.view())


def view_specs_for(policy: EvictionPolicy, **options: object) -> SearchStrategy[ViewSpec]:
    """Draw the description of a view as an engine would show it to ``policy``.

    Budget, recent tokens and window are those of the policy's plan. The options are those of
    :func:`view_specs`.
    """
    model = ModelSpec(num_layers=3, max_new_tokens=8)
    plans = policy.plan(model).layers
    specs: Callable[..., SearchStrategy[ViewSpec]] = view_specs
    kinds = [
        specs(
            **{
                "budget": plan.budget,
                "recent": plan.recent,
                "window": plan.window,
                "layers": [index for index, other in enumerate(plans) if other == plan],
                "num_layers": model.num_layers,
                "max_length": plan.budget + (plan.interval or 8) + 6,
                **options,
            }
        )
        for plan in dict.fromkeys(plans)
        if plan is not None
    ]
    return st.one_of(kinds)


@st.composite
def scores(draw: DrawFn, view: View) -> Scores:
    """Draw scores of a view: with ties, infinities, negative zeros or nan, and some guards."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(("normal", "ties", "equal", "infinite", "nan")))
    weights = draw(st.booleans())
    values = torch.randn(view.shape, generator=random)
    if kind == "ties":
        values = values.round() * -0.5
    elif kind == "equal":
        values = torch.zeros_like(values)
    elif kind in ("infinite", "nan"):
        odd = torch.rand(view.shape, generator=random) < 0.2
        values = torch.where(odd, values.sign() * torch.inf if kind == "infinite" else torch.nan, values)
    made = Scores.of(view, values.abs() if weights else values, weights=weights)
    share = draw(st.sampled_from((0.0, 0.3, 1.0)))
    for tier in draw(st.lists(st.sampled_from((Tier.VALUE, Tier.PROMPT, Tier.SINK)), max_size=2)):
        made = made.guard(torch.rand(view.shape, generator=random) < share, tier)
    return made
