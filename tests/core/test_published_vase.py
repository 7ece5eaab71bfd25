"""The first eviction of VaSE equals the published algorithm, written here from its description.

Nothing of kvpolicy is used to decide: only ``torch.multinomial``, ``topk`` and the formulas.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kvpolicy import LayerSpec, Leverage, View
from kvpolicy.policies import vase, vase_dkv
from tests.core.views import view_of

BUDGET, RECENT, LENGTH, GROUP, DIM = 128, 64, 192, 3, 16
SPEC = LayerSpec(2, 2 * GROUP, DIM, DIM, LENGTH, torch.float32, torch.device("cpu"))


def layer(seed: int, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, 2, LENGTH, DIM, generator=generator) for _ in range(2))
    values = values * torch.rand(1, 2, LENGTH, 1, generator=generator).exp()
    queries = torch.randn(1, 2 * GROUP, 64, DIM, generator=generator) * 2
    return tuple(t.repeat(rows, 1, 1, 1) for t in (keys, values, queries))  # type: ignore[return-value]


def published_attention(keys: Tensor, queries: Tensor) -> Tensor:
    """The 64 newest queries over the candidates alone, mean, average pooling of 5, mean over the group."""
    candidates = keys[:, :, :-RECENT].repeat_interleave(GROUP, 1)
    weights = torch.softmax(queries @ candidates.transpose(2, 3) / math.sqrt(DIM), -1, dtype=torch.float32)
    pooled = F.avg_pool1d(weights.mean(2), kernel_size=5, padding=2, stride=1)
    return pooled.view(keys.shape[0], 2, GROUP, -1).mean(2)


def published_guard(values: Tensor) -> Tensor:
    """A quarter of the budget by the range of the value, the first four tokens first."""
    candidates = values[:, :, :-RECENT]
    magnitude = candidates.max(-1).values - candidates.min(-1).values
    magnitude[..., :4] = torch.inf
    return magnitude.topk(BUDGET // 4, -1).indices


def view(keys: Tensor, values: Tensor, queries: Tensor, **more: Tensor) -> View:
    return view_of(keys, values, budget=BUDGET, recent=RECENT, queries=queries, **more)


def test_the_guard_set_is_exact_and_the_sampled_part_has_the_published_distribution() -> None:
    draws = 3000
    keys, values, queries = layer(0)
    guarded, attention = published_guard(values), published_attention(keys, queries)
    weights = attention.clone().scatter(-1, guarded, 0)
    sampled = BUDGET - RECENT - BUDGET // 4
    torch.manual_seed(0)
    drawn = torch.multinomial(weights[0].repeat(draws, 1), sampled, replacement=False)
    published = F.one_hot(drawn, LENGTH - RECENT).sum(1).view(draws, 2, -1)

    policy = vase(BUDGET)
    many = view(*layer(0, draws), seed=torch.arange(draws))
    keep, _ = policy.select(many, policy.init(SPEC, draws))
    kept = keep.mask[..., : LENGTH - RECENT]

    assert keep.mask[..., -RECENT:].all()
    assert (keep.mask.sum(-1) == BUDGET).all()
    assert kept.gather(-1, guarded.expand(draws, -1, -1)).all()  # the guard set, in every draw
    own = kept.long().scatter(-1, guarded.expand(draws, -1, -1), 0)
    assert (own.sum(-1) == sampled).all()
    # Equal inclusion probabilities, and pairs: two samples of the same size, compared.
    p, q = published.double().mean(0), own.double().mean(0)
    error = (2 * (p + q) / 2 * (1 - (p + q) / 2) / draws).sqrt().clamp(min=2e-3)
    assert ((p - q).abs() / error).max() < 5
    assert ((p - q) / error).square().mean() < 1.35  # about 1 for equal distributions
    pairs = [x.double().transpose(0, 1).transpose(1, 2) @ x.double().transpose(0, 1) / draws for x in (published, own)]
    mean = (pairs[0] + pairs[1]) / 2
    assert ((pairs[0] - pairs[1]) / (2 * mean * (1 - mean) / draws).sqrt().clamp(min=2e-3)).abs().max() < 6


def test_without_noise_the_rest_is_the_top_of_the_published_scores() -> None:
    policy = vase(BUDGET, tau=0)
    for seed in range(10):
        keys, values, queries = layer(seed)
        guarded, attention = published_guard(values), published_attention(keys, queries)
        rest = attention.scatter(-1, guarded, 0).topk(BUDGET - RECENT - BUDGET // 4, -1).indices
        expected = torch.zeros(1, 2, LENGTH, dtype=torch.bool)
        expected.scatter_(-1, guarded, True).scatter_(-1, rest, True)[..., -RECENT:] = True
        keep, _ = policy.select(view(keys, values, queries), policy.init(SPEC, 1))
        assert torch.equal(keep.mask, expected)


@pytest.mark.parametrize("evictions", [0, 3])
def test_dkv_is_exact_for_a_given_projection(evictions: int) -> None:
    policy, stage = vase_dkv(BUDGET), Leverage()
    for seed in range(10):
        keys, values, queries = layer(seed)
        many = view(keys, values, queries, evictions=torch.tensor([evictions]))
        projection = stage.projection(many, DIM)[0].float()
        assert projection.shape == (DIM, 20)
        scores = (keys[:, :, :-RECENT] @ projection).square().sum(-1)
        scores *= (values[:, :, :-RECENT] @ projection).square().sum(-1)
        scores /= scores.sum(-1, keepdim=True)
        scores[..., :4] = 1.0
        chosen = scores.topk(BUDGET - RECENT, -1).indices
        expected = torch.zeros(1, 2, LENGTH, dtype=torch.bool).scatter(-1, chosen, True)
        expected[..., -RECENT:] = True
        keep, _ = policy.select(many, policy.init(SPEC, 1))
        assert torch.equal(keep.mask, expected)


def test_the_projection_is_gaussian_shared_by_heads_and_drawn_anew() -> None:
    keys, values, queries = layer(0, 400)
    many = view(keys, values, queries, seed=torch.arange(400))
    matrix = Leverage().projection(many, DIM)
    n = matrix.numel()
    assert abs(matrix.mean().item()) < 5 * (1 / 20 / n) ** 0.5
    assert abs(matrix.var().item() * 20 - 1) < 0.02
    first = view(keys[:1], values[:1], queries[:1])
    later = view(keys[:1], values[:1], queries[:1], evictions=torch.tensor([1]))
    assert not torch.equal(Leverage().projection(first, DIM), Leverage().projection(later, DIM))
    fixed = Leverage(resample=False)
    assert torch.equal(fixed.projection(first, DIM), fixed.projection(later, DIM))
