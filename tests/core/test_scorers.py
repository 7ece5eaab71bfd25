"""Each scorer against its formula, written out in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kvpolicy import (
    AccumulatedAttention,
    Attention,
    BudgetError,
    Constant,
    KeyDifference,
    KeyNorm,
    LastQuery,
    LayerSpec,
    Leverage,
    ModelSpec,
    Normalize,
    ParameterError,
    Policy,
    Prompt,
    Recency,
    Redundancy,
    Scorer,
    Scores,
    Sinks,
    Tier,
    TopK,
    Transform,
    ValueGuard,
    ValueNorm,
    View,
    maximum,
    tiles,
)
from tests.core.views import view_of

B, H, G, S, D, W = 2, 2, 3, 24, 8, 6
GEN = torch.Generator().manual_seed(0)
KEYS, VALUES = (torch.randn(B, H, S, D, generator=GEN, dtype=torch.float64) for _ in range(2))
QUERIES = torch.randn(B, H * G, W, D, generator=GEN, dtype=torch.float64) * 2
SPEC = LayerSpec(H, H * G, D, D, S, torch.float64, torch.device("cpu"))
VIEW = view_of(KEYS, VALUES, budget=12, recent=6, queries=QUERIES)
POSITIONS = torch.arange(S - W, S).int().expand(B, -1)


def score(stage: Scorer, view: View = VIEW) -> Scores:
    held = stage.init(SPEC, B)
    return stage.score(view, stage.update(view, held))


def probabilities(view: View, over: Tensor, temperature: float = 1.0) -> Tensor:
    """Return [B, H, G, W, S]."""
    assert view.queries is not None
    assert view.query_positions is not None
    logits = view.queries.unflatten(1, (H, G)) @ view.keys[:, :, None].transpose(3, 4) * view.scaling
    if view.softcap is not None:
        logits = view.softcap * torch.tanh(logits / view.softcap)
    hidden = ~over[:, :, None, None] | (view.positions[:, :, None, None] > view.query_positions[:, None, None, :, None])
    logits = (logits / temperature).masked_fill(hidden, -torch.inf)
    if view.sink_logits is not None:
        sinks = view.sink_logits.view(B, H, G, 1, 1).expand(B, H, G, W, 1) / temperature
        logits = torch.cat([logits, sinks], -1)
    return torch.nan_to_num(torch.softmax(logits, -1))[..., :S]


def close(found: Scores, expected: Tensor, where: Tensor | None = None) -> None:
    where = VIEW.candidates if where is None else where
    assert torch.allclose(found.values[where].double(), expected.expand(B, H, S)[where], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("over", ["candidates", "all"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("extra", [{}, {"softcap": 1.5}, {"sink_logits": torch.randn(B, H * G, generator=GEN)}])
@pytest.mark.parametrize(
    ("tile", "workspace"),
    [(2**20, 2**20), (1100, 2**20), (2**20, 9216)],
    ids=["one tile", "tiles of 5 slots", "tiles of 2 queries and 10 slots"],
)
def test_attention(
    over: str,
    reduce: str,
    temperature: float,
    extra: dict[str, object],
    tile: int,
    workspace: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "_CPU_TILE", tile)
    view = dataclasses.replace(VIEW, workspace=workspace, **extra)
    stage = Attention(W, pool=1, over=over, reduce=reduce, temperature=temperature)
    p = probabilities(view, view.candidates if over == "candidates" else view.valid, temperature)
    expected = p.mean((2, 3)) if reduce == "mean" else p.amax((2, 3))
    close(score(stage, view), expected, view.candidates if over == "candidates" else view.valid)
    assert score(stage, view).weights


def test_attention_asks_the_newest_queries_and_leaves_absent_ones_out() -> None:
    close(score(Attention(2, pool=1)), probabilities(VIEW, VIEW.candidates)[:, :, :, -2:].mean((2, 3)))
    absent = dataclasses.replace(VIEW, query_positions=torch.tensor([[-1, -1, 20, 21, 22, 23]] * B).int())
    close(
        score(Attention(W, pool=1), absent),
        probabilities(VIEW, VIEW.candidates)[:, :, :, 2:].mean((2, 3)),
    )


@pytest.mark.parametrize("tile", [2**20, 1100])
def test_a_query_older_than_every_slot_pays_nothing(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_CPU_TILE", tile)
    old = torch.arange(W).int().expand(B, -1)
    view = dataclasses.replace(VIEW, query_positions=old, positions=VIEW.positions + 3, seen=VIEW.seen + 3)
    expected = probabilities(view, view.valid)
    assert not expected[:, :, :, :3].any()
    close(score(Attention(W, pool=1, over="all"), view), expected.mean((2, 3)), view.valid)


def test_pooling_means_neighbours_in_position() -> None:
    raw = probabilities(VIEW, VIEW.candidates).mean((2, 3))[..., :18]
    expected = F.pad(F.avg_pool1d(raw, 5, 1, 2), (0, 6))
    close(score(Attention(W)), expected)
    slots = torch.argsort(torch.rand(B, H, S, generator=GEN), -1)
    inverse = torch.argsort(slots, -1)
    wide = slots[..., None].expand(-1, -1, -1, D)
    moved = dataclasses.replace(
        VIEW,
        keys=KEYS.gather(2, wide),
        values=VALUES.gather(2, wide),
        positions=VIEW.positions.gather(2, slots),
        order=inverse.int(),
    )
    found = score(Attention(W), moved).values.gather(2, inverse)
    assert torch.allclose(found, score(Attention(W)).values, atol=1e-7)


def test_accumulated_attention_counts_every_query_once() -> None:
    stage = AccumulatedAttention(W)
    held = stage.init(SPEC, B)
    p = probabilities(VIEW, VIEW.valid)
    first = stage.update(VIEW, held)
    assert torch.allclose(first.slots[0].double(), p.mean(2).sum(2), atol=1e-6)
    again = stage.update(dataclasses.replace(VIEW, fresh=VIEW.fresh[..., :0]), first)
    assert torch.equal(again.slots[0], first.slots[0])
    two = torch.tensor([3, 9, -1]).expand(B, H, 3)
    later = dataclasses.replace(VIEW, query_positions=POSITIONS + 2, seen=VIEW.seen + 2, fresh=two)
    second = stage.update(later, first)
    added = probabilities(later, later.valid).mean(2)[:, :, -2:].sum(2)
    assert torch.allclose((second.slots[0] - first.slots[0]).double(), added, atol=1e-6)


def test_last_query_keeps_one_set_for_all_heads() -> None:
    expected = probabilities(VIEW, VIEW.valid)[:, :, :, -1].mean((1, 2))[:, None]
    close(score(LastQuery()), expected, VIEW.valid)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (KeyNorm(), -KEYS.norm(dim=-1)),
        (ValueNorm("l2"), VALUES.norm(dim=-1)),
        (ValueNorm("l1"), VALUES.abs().sum(-1)),
        (ValueNorm("absmax"), VALUES.abs().amax(-1)),
        (ValueNorm("var"), VALUES.var(-1)),
        (ValueNorm("range"), VALUES.amax(-1) - VALUES.amin(-1)),
        (Recency(), torch.arange(S).double()),
        (Constant(), torch.ones(S).double()),
    ],
    ids=repr,
)
def test_numbers_of_a_token(stage: Scorer, expected: Tensor) -> None:
    close(score(stage), expected, VIEW.valid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["range", "l2", "absmax", "var", "l1"])
def test_scores_are_float32_whatever_the_cache_holds(dtype: torch.dtype, norm: str) -> None:
    view = dataclasses.replace(VIEW, keys=KEYS.to(dtype), values=VALUES.to(dtype), queries=QUERIES.to(dtype))
    stage = ValueNorm(norm)
    wide = dataclasses.replace(view, keys=view.keys.double(), values=view.values.double())
    assert torch.allclose(score(stage, view).values, score(stage, wide).values, rtol=1e-5)
    for other in (Attention(W), KeyNorm(), KeyDifference(), Redundancy(), Leverage()):
        found = score(other, view).values
        assert found.dtype == torch.float32
        assert found.unique().numel() > found.numel() // 3  # not rounded to a few values


def test_key_difference() -> None:
    unit = KEYS / KEYS.norm(dim=-1, keepdim=True)
    close(
        score(KeyDifference()),
        -F.cosine_similarity(KEYS, unit.mean(2, keepdim=True), dim=-1),
        VIEW.valid,
    )


def test_redundancy_is_the_mean_over_all_pairs() -> None:
    unit = (KEYS / KEYS.norm(dim=-1, keepdim=True))[:, :, :18]
    cosine = unit @ unit.transpose(2, 3)
    cosine.diagonal(dim1=2, dim2=3).zero_()
    close(score(Redundancy()), F.pad(-torch.softmax(cosine.mean(2), -1), (0, 6)))


def test_leverage_without_projection() -> None:
    product = KEYS.square().sum(-1) * VALUES.square().sum(-1)
    close(score(Leverage(rank=None)), product / product[..., :18].sum(-1, keepdim=True))


def test_mixtures() -> None:
    def of(stage: Scorer) -> Scores:
        policy = Policy(stage >> TopK(12), recent=6)
        scorer = policy.chain.scorer
        assert scorer is not None
        states = tuple(leaf.update(VIEW, leaf.init(SPEC, B)) for leaf in policy.stages)
        return scorer.score_with(VIEW, states)

    a, b = of(KeyNorm()).values, of(ValueNorm()).values
    mixed = of(0.5 * KeyNorm() + 2 * ValueNorm())
    assert torch.equal(mixed.values, 0.5 * a + 2 * b)
    assert not mixed.weights
    assert torch.equal(of(KeyNorm() * ValueNorm()).values, a * b)
    assert not of(KeyNorm() * ValueNorm()).weights
    assert of(ValueNorm() * Constant()).weights
    assert torch.equal(of(maximum(KeyNorm(), ValueNorm())).values, torch.maximum(a, b))
    assert of(2 * ValueNorm() + Constant()).weights
    assert not of(-2.0 * ValueNorm()).weights


@pytest.mark.parametrize("kind", ["sum", "max", "z", "softmax"])
def test_normalize(kind: str) -> None:
    found = apply(Normalize(kind), score(KeyNorm())).values[..., :18]
    x = -KEYS.norm(dim=-1)[..., :18]
    expected = {
        "sum": x / x.abs().sum(-1, keepdim=True),
        "max": x / x.abs().amax(-1, keepdim=True),
        "z": (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True),
        "softmax": torch.softmax(x, -1),
    }[kind]
    assert torch.allclose(found.double(), expected, atol=1e-6)


def apply(stage: Transform, scores: Scores, view: View = VIEW) -> Scores:
    return stage.apply(scores, view, stage.update(view, stage.init(SPEC, B)))


def test_guards_raise_tiers_and_the_highest_counts() -> None:
    base = Scores.of(VIEW, torch.zeros(B, H, S), weights=False)
    assert base.tier[0, 0].tolist() == [1] * 18 + [7] * 6
    assert apply(Sinks(3), base).tier[0, 0, :5].tolist() == [4, 4, 4, 1, 1]
    assert apply(Sinks(100), base).tier[0, 0].tolist() == [4] * 18 + [7] * 6
    guarded = apply(ValueGuard(share=0.5, sinks=2), base)
    assert (guarded.tier > Tier.CANDIDATE).sum(-1).eq(6 + 6).all()  # half of 12, and the recent ones
    assert guarded.tier[..., :2].eq(Tier.SINK).all()
    extent = VALUES.amax(-1) - VALUES.amin(-1)
    largest = extent[..., 2:18].topk(4, -1).indices + 2
    assert guarded.tier.gather(-1, largest).eq(Tier.VALUE).all()
    assert apply(Sinks(5), guarded).tier[..., 4].eq(Tier.SINK).all()


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, []), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 4, 5]), (7, [0, 1, 2, 4, 5, 6]), (30, [0, 1, 2])],
)
def test_prompt_keeps_all_of_a_short_prompt_and_both_ends_of_a_long_one(length: int, expected: list[int]) -> None:
    view = dataclasses.replace(VIEW, prompt_length=torch.full((B,), length))
    base = Scores.of(view, torch.zeros(B, H, S), weights=False)
    tier = apply(Prompt(0.5), base, view).tier[0, 1]
    assert (tier == Tier.PROMPT).nonzero()[:, 0].tolist() == expected


def test_a_share_below_the_sinks_protects_the_oldest_of_them() -> None:
    base = Scores.of(VIEW, torch.zeros(B, H, S), weights=False)
    tier = apply(ValueGuard(share=0.25, sinks=4), base).tier  # a quarter of 12 is 3
    assert tier[..., :5].tolist() == [[[4, 4, 4, 1, 1]] * H] * B


@pytest.mark.parametrize("tier", [-1, 0, 1, 7, 8])
def test_a_guard_has_a_tier_of_its_own(tier: int) -> None:
    base = Scores.of(VIEW, torch.zeros(B, H, S), weights=False)
    with pytest.raises(ParameterError, match="a guard's tier is 2 to 6"):
        base.guard(VIEW.candidates, tier)


def test_last_query_meets_by_position_where_heads_hold_different_tokens() -> None:
    held = torch.tensor([[0, 1, 4, 5], [2, 3, 4, 5]])
    keys = KEYS[:1, :, :4]
    view = dataclasses.replace(
        view_of(keys, budget=2, queries=QUERIES[:1, :, -1:]),
        positions=held[None].int(),
        seen=torch.tensor([6]),
        query_positions=torch.tensor([[5]]).int(),
    )
    logits = view.queries.unflatten(1, (H, G)) @ keys[:, :, None].transpose(3, 4) * view.scaling
    by_head = torch.softmax(logits, -1)[0, :, :, 0].mean(1)  # [H, 4]
    expected = torch.zeros(6, dtype=torch.float64).index_add(0, held.flatten(), by_head.flatten()) / H
    found = LastQuery().score(view, None).values[0]
    assert torch.allclose(found.double(), expected[held], atol=1e-6)


def test_accumulated_attention_does_not_depend_on_its_neighbours() -> None:
    close(score(AccumulatedAttention(2)), probabilities(VIEW, VIEW.valid).mean(2)[:, :, -2:].sum(2), VIEW.valid)


def test_accumulated_attention_must_hold_an_interval() -> None:
    with pytest.raises(BudgetError, match=r"write AccumulatedAttention\(window=100\), or interval=64"):
        Policy(AccumulatedAttention() >> TopK(256), interval=100).plan(ModelSpec(1))
