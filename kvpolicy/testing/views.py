"""Random views, described by a few numbers and words so that a failing example can be written down."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvpolicy.output import OutputProjection
from kvpolicy.policy import EvictionPolicy
from kvpolicy.view import LayerSpec, State, View

__all__ = ["Data", "RowSpec", "ViewSpec", "history", "layer_spec", "make_view", "with_state"]

#: What keys, values and queries hold: ``"normal"`` numbers; ``"ties"``, a few tokens again and
#: again; ``"equal"``, one token; ``"zero"``; ``"wide"``, magnitudes from tiny to large;
#: ``"infinite"`` and ``"nan"``, some such elements; ``"huge"``, squares that overflow.
Data = Literal["normal", "ties", "equal", "zero", "wide", "infinite", "nan", "huge"]

#: What stands in the slots that hold no token, which a policy must not read.
Free = Literal["zero", "garbage", "nan"]


@dataclass(frozen=True)
class RowSpec:
    """Describe one row of a view.

    Attributes:
        length: slots in use.
        evicted: tokens that were evicted before; ``length + evicted`` tokens were seen.
        fresh: slots filled since the last eviction.
        budget: slots to keep; None where the row is not due.
        asked: queries present in the window; None for as many as there can be.
        prompt: tokens before the first one-token step.
        evictions: of this row so far.
        request: keys randomness.
        seed: keys randomness.
        layer: which layer this is.
    """

    length: int = 8
    evicted: int = 0
    fresh: int = 8
    budget: int | None = 4
    asked: int | None = None
    prompt: int = 4
    evictions: int = 0
    request: int = 0
    seed: int = 0
    layer: int = 0

    @property
    def seen(self) -> int:
        """Return the tokens seen."""
        return self.length + self.evicted


@dataclass(frozen=True)
class ViewSpec:
    """Describe a view; the same description always makes the same view.

    Attributes:
        rows: one description a row.
        heads: KV heads.
        group: query heads of each.
        head_dim: size of a key.
        value_dim: size of a value, at least 2.
        spare: free slots beside those of the longest row.
        recent: the last tokens, never candidates.
        window: queries; 0 leaves them out.
        num_layers: of the model; None for no more than the rows need.
        num_heads: KV heads of the model; None for no more than these.
        head_offset: the global index of head 0.
        dtype: of keys, values and queries.
        data: what they hold.
        free: what free slots hold.
        softcap: of the logits.
        sinks: add sink logits.
        hidden: size of what output projections make of values.
        shuffle: put each head's tokens into slots in an order of its own.
        generator: seed of every random number.
    """

    rows: tuple[RowSpec, ...] = (RowSpec(), RowSpec(layer=1))
    heads: int = 2
    group: int = 2
    head_dim: int = 4
    value_dim: int = 4
    spare: int = 2
    recent: int = 2
    window: int = 4
    num_layers: int | None = None
    num_heads: int | None = None
    head_offset: int = 0
    dtype: torch.dtype = torch.float32
    data: Data = "normal"
    free: Free = "garbage"
    softcap: float | None = None
    sinks: bool = False
    hidden: int = 3
    shuffle: bool = True
    generator: int = 0

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a view has at least one row")
        for row in self.rows:
            _check_row(row, self.recent)

    def view(self) -> View:
        """Return the view."""
        random = torch.Generator().manual_seed(self.generator)
        b, h = len(self.rows), self.heads
        s = max(1, max(row.length for row in self.rows) + self.spare)
        positions, order = _place(self, s, random)
        lengths = [row.length for row in self.rows]
        budgets = [row.length if row.budget is None else row.budget for row in self.rows]
        used = (positions >= 0)[..., None]
        keys = _fill(self, (b, h, s, self.head_dim), random, used)
        values = _fill(self, (b, h, s, self.value_dim), random, used)
        queries = _fill(self, (b, h * self.group, max(1, self.window), self.head_dim), random)
        sinks = torch.randn(h * self.group, generator=random).expand(b, -1)
        return View(
            keys=keys,
            values=values,
            positions=positions,
            order=order,
            fresh=_fresh(self.rows, order),
            budget=_column(budgets)[:, None].expand(b, h).contiguous(),
            lengths=_column(lengths)[:, None].expand(b, h).contiguous(),
            seen=_column([row.seen for row in self.rows]),
            prompt_length=_column([row.prompt for row in self.rows]),
            evictions=_column([row.evictions for row in self.rows]),
            request=_column([row.request for row in self.rows]),
            seed=_column([row.seed for row in self.rows]),
            layer=_column([row.layer for row in self.rows]),
            recent=self.recent,
            max_budget=max(budgets),
            max_victims=max(0, *(n - kept for n, kept in zip(lengths, budgets, strict=True))),
            queries=queries if self.window else None,
            query_positions=_asked(self.rows, self.window) if self.window else None,
            num_layers=self.num_layers or 1 + max(row.layer for row in self.rows),
            num_heads=self.num_heads or h + self.head_offset,
            head_offset=self.head_offset,
            scaling=self.head_dim**-0.5,
            softcap=self.softcap,
            sink_logits=sinks.contiguous() if self.sinks else None,
            output=_projections(self, random),
            rotary=torch.rand(self.head_dim // 2, generator=random, dtype=torch.float64).expand(b, -1),
        )


def make_view(spec: ViewSpec | None = None, **changes: Any) -> View:
    """Return a random view that is consistent as an engine's cache makes it.

    Every head of a row holds the same number of tokens, the last ``recent`` of a row are all
    there, older ones are a random choice for each head, and ``order`` agrees with ``positions``.

    Args:
        spec: the description; the default one where None.
        changes: fields of the description that differ.

    >>> make_view(heads=3, recent=1).shape
    (2, 3, 10)
    """
    return dataclasses.replace(spec or ViewSpec(), **changes).view()


def layer_spec(view: View) -> LayerSpec:
    """Return the description of the layers that a view shows."""
    _, heads, slots = view.shape
    queries = heads if view.queries is None else view.queries.shape[1]
    dim, value_dim = view.keys.shape[-1], view.values.shape[-1]
    return LayerSpec(heads, queries, dim, value_dim, slots, view.keys.dtype, view.keys.device)


def history(view: View) -> View:
    """Return the view as it was before its fresh slots were filled; no row is due in it."""
    _, _, s = view.shape
    slots = torch.where(view.fresh >= 0, view.fresh, s)
    new = torch.zeros(*view.positions.shape[:-1], s + 1, dtype=torch.bool, device=slots.device)
    new = new.scatter(-1, slots, True)[..., :s]
    positions = torch.where(new, -1, view.positions)
    count = new.sum(-1)
    lengths = view.lengths - count
    seen = view.seen - count[:, 0]
    # Slots in position order again: free ones last, in the order in which they stood.
    free = (positions < 0).gather(-1, view.order.to(torch.int64))
    order = view.order.gather(-1, free.to(torch.int8).argsort(dim=-1, stable=True))
    old = lengths[:, :1].expand_as(lengths).contiguous()
    queries, asked = view.queries, view.query_positions
    if queries is not None and asked is not None:
        asked = torch.where(asked < seen[:, None], asked, -1)
        place = (asked >= 0).to(torch.int8).argsort(dim=-1, stable=True)  # absent ones first
        asked = asked.gather(-1, place)
        queries = queries.gather(2, place[:, None, :, None].expand_as(queries))
    rank = torch.arange(int(lengths.max()), device=order.device)
    fresh = torch.where(rank < lengths[..., None], order[..., : len(rank)].to(torch.int64), -1)
    return dataclasses.replace(
        view,
        positions=positions,
        order=order,
        fresh=fresh,
        budget=old,
        lengths=lengths,
        seen=seen,
        prompt_length=torch.minimum(view.prompt_length, seen),
        max_budget=int(lengths.max()),
        max_victims=0,
        queries=queries,
        query_positions=asked,
    )


def with_state(policy: EvictionPolicy, view: View) -> State:
    """Return the state that a store holds when it shows ``view``: of every slot but the fresh ones.

    The policy has seen the older slots before, when no row was due, and those queries of the
    window that were there then; fresh slots have what ``policy.init`` gives them.
    """
    empty = policy.init(layer_spec(view), view.shape[0])
    before = history(view)
    return empty if before.max_budget == 0 else policy.select(before, empty)[1]


def _check_row(row: RowSpec, recent: int) -> None:
    intact = row.fresh + recent if row.evicted else row.fresh
    if min(row.length, row.evicted, row.fresh, row.evictions, row.prompt) < 0:
        raise ValueError(f"{row}: counts are not negative")
    if intact > row.length:
        raise ValueError(
            f"{row}: fresh tokens, and the last recent={recent} before them where some were "
            f"evicted, are still there: length must be at least {intact}"
        )
    if bool(row.evicted) != bool(row.evictions):
        raise ValueError(f"{row}: tokens were evicted if and only if there was an eviction")
    if row.prompt > row.seen:
        raise ValueError(f"{row}: a prompt is part of the {row.seen} tokens seen")


def _column(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def _place(spec: ViewSpec, slots: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return positions and order, ``[B, H, S]`` int32."""
    shape = (len(spec.rows), spec.heads, slots)
    order = torch.arange(slots).expand(shape)
    if spec.shuffle:
        order = torch.rand(shape, generator=random).argsort(-1)
    held = torch.full(shape, -1)  # in position order
    for r, row in enumerate(spec.rows):
        tail = row.fresh + spec.recent if row.evicted else row.length
        old, before = row.length - tail, row.seen - tail
        chosen = torch.rand(spec.heads, before, generator=random).argsort(-1)[:, :old]
        held[r, :, :old] = chosen.sort(-1).values
        held[r, :, old : row.length] = torch.arange(before, row.seen)
    positions = torch.full(shape, -1).scatter(-1, order, held)
    return positions.to(torch.int32), order.to(torch.int32).contiguous()


def _fresh(rows: tuple[RowSpec, ...], order: Tensor) -> Tensor:
    width = max(row.fresh for row in rows)
    fresh = torch.full((*order.shape[:2], width), -1, dtype=torch.int64)
    for r, row in enumerate(rows):
        fresh[r, :, : row.fresh] = order[r, :, row.length - row.fresh : row.length]
    return fresh


def _asked(rows: tuple[RowSpec, ...], window: int) -> Tensor:
    positions = torch.full((len(rows), window), -1, dtype=torch.int32)
    for r, row in enumerate(rows):
        most = min(window, row.seen)
        count = most if row.asked is None else min(row.asked, most)
        positions[r, window - count :] = torch.arange(row.seen - count, row.seen)
    return positions


def _projections(spec: ViewSpec, random: torch.Generator) -> OutputProjection:
    """Return an output projection for each layer that some row is."""
    layers = sorted({row.layer for row in spec.rows})
    shape = (spec.hidden, spec.heads * spec.group, spec.value_dim)
    weights = tuple(torch.randn(shape, generator=random).to(spec.dtype) for _ in layers)
    return OutputProjection(weights, tuple(layers.index(row.layer) for row in spec.rows))


def _fill(spec: ViewSpec, shape: tuple[int, ...], random: torch.Generator, used: Tensor | None = None) -> Tensor:
    """Return the tensor of one kind of data, in the view's dtype."""
    x = torch.randn(shape, generator=random)
    if spec.data == "ties":
        x = x.flatten(0, -2)[torch.randint(3, shape[:-1], generator=random) % x[..., 0].numel()]
    elif spec.data == "equal":
        x = x.flatten(0, -2)[0].expand(shape)
    elif spec.data == "zero":
        x = torch.zeros(shape)
    elif spec.data == "wide":
        x = (x * torch.exp(2 * torch.randn(*shape[:-1], 1, generator=random))).clamp(-1e4, 1e4)
    elif spec.data in ("infinite", "nan"):
        odd = torch.inf * torch.randn(shape, generator=random).sign()
        odd = torch.full(shape, torch.nan) if spec.data == "nan" else odd
        x = torch.where(torch.rand(shape, generator=random) < 0.1, odd, x)
    x = x.to(spec.dtype)
    if spec.data == "huge":
        x = x.sign() * (torch.finfo(spec.dtype).max / 8)
    if used is not None:
        garbage = 100 * torch.randn(shape, generator=random).to(spec.dtype)
        instead = {"zero": garbage * 0, "garbage": garbage, "nan": garbage * torch.nan}[spec.free]
        x = torch.where(used, x, instead)
    return x.contiguous()
