"""What each query pays, and the stages built on it, where a golden conversation does not come."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from kvpolicy import (
    AttentionCount,
    DecayedAttention,
    LastAttended,
    LayerSpec,
    Normalize,
    OutputError,
    PerturbedAttention,
    Policy,
    Recurrence,
    ScoreGuard,
    Scorer,
    Scores,
    Sinks,
    Tier,
    TopK,
    View,
)
from kvpolicy.each_query import each_query
from kvpolicy.scorers.attention import newest
from kvpolicy.scorers.every_query import uncounted
from tests.core.test_scorers import GEN, QUERIES, SPEC, VIEW, B, G, H, S, W, probabilities, score
from tests.core.views import view_of


@pytest.mark.parametrize("extra", [{}, {"softcap": 1.5}, {"sink_logits": torch.randn(B, H * G, generator=GEN)}])
@pytest.mark.parametrize("workspace", [2**20, 9216], ids=["one block", "blocks of two queries"])
def test_probabilities_of_each_query(extra: dict[str, object], workspace: int) -> None:
    view = dataclasses.replace(VIEW, workspace=workspace, **extra)
    expected = probabilities(view, view.valid).flatten(0, 1)
    found, times = [torch.zeros(G, 0, S)] * (B * H), [torch.zeros(0)] * (B * H)
    for at, paid, seen, now in each_query(view, QUERIES, view.query_positions):
        assert torch.equal(seen, torch.arange(S) <= now[..., None])
        for row, pair in enumerate(range(B * H)[at]):
            found[pair], times[pair] = torch.cat([found[pair], paid[row]], 1), torch.cat([times[pair], now[row]])
    assert torch.allclose(torch.stack(found).double(), expected)
    assert times[0].tolist() == list(range(S - W, S))
    members: dict[int, list[torch.Tensor]] = {}
    for at, paid, _, now in each_query(view, QUERIES, view.query_positions, whole=True):
        assert now.shape[1] == W
        for row, pair in enumerate(range(B * H)[at]):
            members.setdefault(pair, []).append(paid[row, 0])
    assert torch.allclose(torch.stack([torch.stack(members[pair]) for pair in range(B * H)]).double(), expected)


def test_blocks_hold_the_keys_that_they_convert_and_what_is_made_of_them() -> None:
    view = dataclasses.replace(VIEW, workspace=8 * (S * 8 * 8 + G * S * 8))
    one = newest(view, 1)
    assert [at.stop - at.start for at, *_ in each_query(view, *one)] == [1] * (B * H)
    wide = dataclasses.replace(view, workspace=2 * view.workspace)
    assert [at.stop - at.start for at, *_ in each_query(wide, *one)] == [2] * (B * H // 2)
    assert [at.stop - at.start for at, *_ in each_query(wide, *one, further=64)] == [1] * (B * H)


def test_only_queries_that_were_not_counted_are_named() -> None:
    assert uncounted(VIEW, W)[1][0].tolist() == [18, 19, 20, 21, 22, 23]
    two = dataclasses.replace(VIEW, fresh=torch.tensor([22, 23, -1]).expand(B, H, 3))
    assert uncounted(two, 3)[1][0].tolist() == [-1, 22, 23]
    none = dataclasses.replace(VIEW, fresh=VIEW.fresh[..., :0])
    assert uncounted(none, 2)[1][0].tolist() == [-1, -1]


@pytest.mark.parametrize(
    "stage", [AttentionCount(), LastAttended(), Recurrence(), PerturbedAttention(), DecayedAttention()], ids=repr
)
def test_nobody_asked(stage: Scorer) -> None:
    """Without any query every token scores alike, or by its age."""
    absent = dataclasses.replace(VIEW, query_positions=torch.full((B, W), -1).int())
    values = score(stage, absent).values[VIEW.candidates]
    assert torch.isfinite(values).all()
    if not isinstance(stage, LastAttended | Recurrence):
        assert values.unique().numel() == 1


def test_equal_tokens_have_uniform_attention_whatever_rounding_says() -> None:
    view = dataclasses.replace(VIEW, keys=torch.ones_like(VIEW.keys) / 3)
    assert (score(AttentionCount(W), view).values == W).all()
    assert (score(LastAttended(W), view).values == S - 1).all()


def test_a_share_is_that_many_however_sharp_a_query_is() -> None:
    """All but one token get 0: the more recent ones of these fill the share."""
    sharp = dataclasses.replace(VIEW, queries=QUERIES * 1e4)
    *_, (at, paid, seen, now) = each_query(sharp, QUERIES * 1e4, sharp.query_positions)
    assert (paid.mean(1) == 0).sum(-1).min() > S // 2
    found = LastAttended(share=0.5).attended(paid.mean(1), seen, VIEW.positions.flatten(0, 1)[at])
    assert torch.equal(found.sum(-1), (now + 1) // 2)
    zero = found & (paid.mean(1) == 0)
    assert (torch.where(zero, torch.arange(S), S).amin(-1) >= now - S // 2).all()


def test_scores_decay_at_an_eviction_of_their_row_alone() -> None:
    stage = DecayedAttention(W, 0.5)
    half = stage.update(VIEW, stage.init(SPEC, B))
    again = dataclasses.replace(VIEW, budget=torch.tensor([[12, 12], [S, S]]), queries=torch.zeros_like(QUERIES))
    later = stage.update(again, half).slots[0]
    assert torch.equal(later[1], half.slots[0][1])
    flat = score(DecayedAttention(W), again).values[0]
    assert torch.equal(later[0], torch.maximum(0.5 * half.slots[0][0], flat))
    assert not later[:, :, -VIEW.recent :].any()  # the last tokens are not rated yet


def test_noise_of_queries_follows_seed_and_not_the_eviction() -> None:
    one = score(PerturbedAttention(W)).values
    assert not torch.equal(one, score(PerturbedAttention(W, seed=1)).values)
    assert torch.equal(
        one, score(PerturbedAttention(W), dataclasses.replace(VIEW, evictions=VIEW.evictions + 3)).values
    )
    assert torch.allclose(one.sum(-1), torch.full((B, H), float(W)))
    hot = score(PerturbedAttention(W, temperature=1e6, highest=1e6)).values
    assert (hot.amax(-1) - hot[..., : S - W].amin(-1) < 1e-3).all()


def rated(weights: list[float], values: list[list[float]], *, fast: bool = False, logits: bool = False) -> list[float]:
    v = torch.tensor(values, dtype=torch.float64)[None, None]
    view = view_of(v, budget=1)
    scores = Scores.of(view, torch.tensor(weights)[None, None], weights=not logits)
    return OutputError(fast).apply(scores, view, None).values[0, 0].tolist()


def test_output_errors() -> None:
    values = [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    # o = (.5, 1) * .5 + ...: weights .5 .25 .25, output (.5, .75)
    expected = [0.5 / 0.5 * 0.3125**0.5, 0.25 / 0.75 * 0.8125**0.5, 0.25 / 0.75 * 0.3125**0.5]
    assert rated([2, 1, 1], values) == pytest.approx(expected)
    assert rated([0.6931472, 0, 0], values, logits=True) == pytest.approx(expected)
    mean = [2 / 3, 2 / 3]
    distance = [((mean[0] - a) ** 2 + (mean[1] - b) ** 2) ** 0.5 for a, b in values]
    assert rated([2, 1, 1], values, fast=True) == pytest.approx([distance[0], distance[1] / 3, distance[2] / 3])


def test_the_plain_mean_is_one_in_the_dtype_of_the_cache() -> None:
    """The last token is the mean itself: thirds in float32 would add up to 4 more."""
    assert rated([1, 1, 1], [[0.0, 0.0], [3e8, 0.0], [1.5e8, 0.0]], fast=True)[2] < 1e-3


def test_output_errors_of_a_token_that_has_nearly_all() -> None:
    """Its change is its distance to what the others mix to, found without a difference of numbers near 1."""
    values = [[3.0, 0.0], [0.0, 4.0], [0.0, 4.0]]
    assert rated([1, 1e-12, 1e-12], values)[0] == pytest.approx(5)
    assert rated([1, 0, 0], values) == [torch.inf, 0, 0]
    assert rated([0, 0, 0], values) == [0, 0, 0]


def test_a_guard_of_scores_leaves_out_what_is_guarded() -> None:
    scores = Sinks(2).apply(Scores.of(VIEW, torch.arange(S).expand(B, H, S).flip(-1), weights=True), VIEW, None)
    tiers = ScoreGuard(0.5).apply(scores, VIEW, None).tier[0, 0].tolist()
    assert tiers == [Tier.SINK] * 2 + [Tier.VALUE] * 3 + [Tier.CANDIDATE] * 13 + [Tier.RECENT] * 6


def test_softmax_of_scores_without_a_finite_one() -> None:
    values = torch.full((B, H, S), -torch.inf)
    values[0, 0, 0] = torch.inf
    found = Normalize("softmax").apply(Scores.of(VIEW, values, weights=False), VIEW, None)
    assert found.weights
    assert found.values[0, 0, 0] == 1
    assert not found.values[1].any()


CHAINS = {
    "times": LastAttended(16, share=0.5) >> OutputError() >> TopK(24),
    "recurrence": Recurrence(16, threshold=0.05) * AttentionCount(16) >> ScoreGuard(0.25) >> TopK(24),
    "remembered": DecayedAttention(8) + PerturbedAttention(16) >> Normalize("softmax") >> TopK(24),
}


@pytest.mark.parametrize("name", CHAINS)
def test_view_to_keep_is_one_graph_that_reads_nothing_back(name: str) -> None:
    policy, generator = Policy(CHAINS[name], interval=8, recent=8), torch.Generator().manual_seed(0)

    def view(evictions: int, device: str = "cpu") -> View:
        keys = torch.randn(2, 2, 32, 8, generator=generator).to(device)
        queries = torch.randn(2, 4, 16, 8, generator=generator).to(device)
        with torch.device(device):
            made = view_of(keys, budget=24, recent=8, queries=queries)
            fresh = torch.arange(24, 32).expand(2, 2, 8)
            return dataclasses.replace(made, fresh=fresh, evictions=torch.full((2,), evictions))

    state = policy.init(LayerSpec(2, 4, 8, 8, 32, torch.float32, torch.device("cpu")), 2)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(policy.select, fullgraph=True, dynamic=False, backend=counter)
    for evictions in range(2):
        one = view(evictions)
        expected, expected_state = policy.select(one, state)
        assert torch.equal(compiled(one, state)[0].mask, expected.mask)
        state = expected_state
    assert counter.frame_count == 1
    meta = policy.init(LayerSpec(2, 4, 8, 8, 32, torch.float32, torch.device("meta")), 2)
    assert policy.select(view(0, "meta"), meta)[0].mask.shape == (2, 2, 32)
