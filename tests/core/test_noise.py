"""Counter-based randomness: what it depends on, what it does not, and its distribution."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from kvpolicy import (
    Constant,
    LayerSpec,
    ModelSpec,
    Policy,
    Stochastic,
    TopK,
    ValueNorm,
    View,
    noise,
)
from kvpolicy.eviction import LogitSpec, evict
from kvpolicy.row import Row
from kvpolicy.store import Store
from tests.core.views import view_of

SPEC = LayerSpec(1, 1, 2, 2, 7, torch.float32, torch.device("cpu"))


def rows(n: int, heads: int = 1, slots: int = 6, **more: object) -> View:
    return view_of(torch.ones(n, heads, slots, 2), budget=3, **more)


def bits(view: View, seed: int = 0, **options: bool) -> Tensor:
    return noise.uniform_bits(noise.stream(view, seed, **options), view.positions.clamp(min=0))


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def written_out(seed: int, words: list[int], counter: int) -> int:
    """Return the 32 bits of one number, in Python's own integers."""
    a, b = 0, 0x5851F42D
    for word in (seed, seed >> 32, *words):
        a = mix((a ^ word) % 2**32)
        b = mix((b + a + 0x1E3779B1) % 2**32)
    return mix(mix((counter * 0x1E3779B1 + a) % 2**32) ^ b)


def test_the_integers_are_those_of_the_formula() -> None:
    # Whoever changes the formula changes every seeded run of every user.
    view = dataclasses.replace(
        rows(1, 2), seed=torch.tensor([2**40 + 3]), request=torch.tensor([-5]), layer=torch.tensor([17]),
        evictions=torch.tensor([9]),
    ).at(2)  # fmt: skip
    found = bits(view, 2**35 + 1)
    for head, position in itertools.product(range(2), range(6)):
        words = [3, 2**8, -5 % 2**32, -5 // 2**32 % 2**32, 2, 17, 9, head + 1]
        assert found[0, head, position] == written_out(2**35 + 1, words, position)


def test_each_field_of_the_key_matters() -> None:
    view = rows(1, 2)
    base, n = bits(view), torch.tensor([1])
    others = [
        bits(view, 1),
        bits(view, 2**40),
        bits(view.at(1)),
        *(bits(dataclasses.replace(view, **{name: n})) for name in ("seed", "request", "layer", "evictions")),
        bits(dataclasses.replace(view, seed=n * 2**40)),
        bits(dataclasses.replace(view, head_offset=2)),
    ]
    for a, b in itertools.combinations([base, *others], 2):
        assert not torch.equal(a, b)
    assert not torch.equal(base[:, 0], base[:, 1])  # heads differ
    assert torch.equal(bits(dataclasses.replace(view, evictions=n), redraw=False), bits(view, redraw=False))
    shared = bits(view, per_head=False)
    assert shared.shape[1] == 2
    assert torch.equal(shared[:, 0], shared[:, 1])


def test_it_depends_on_nothing_else() -> None:
    view = rows(5, 4)
    view = dataclasses.replace(
        view,
        layer=torch.tensor([0, 1, 2, 3, 4]),
        seed=torch.tensor([9, 8, 7, 6, 5]),
        evictions=torch.arange(5),
    )
    whole = bits(view)
    state = torch.random.get_rng_state()
    turned = torch.tensor([3, 1, 4, 0, 2])
    again = dataclasses.replace(
        view, layer=view.layer[turned], seed=view.seed[turned], evictions=view.evictions[turned]
    )
    assert torch.equal(bits(again), whole[turned])  # batch order, layers in one view or many
    for r in range(5):  # alone or batched
        alone = dataclasses.replace(
            rows(1, 4),
            layer=view.layer[r : r + 1],
            seed=view.seed[r : r + 1],
            evictions=view.evictions[r : r + 1],
        )
        assert torch.equal(bits(alone), whole[r : r + 1])
    for offset in range(4):  # heads split over devices
        shard = dataclasses.replace(
            rows(5, 1),
            layer=view.layer,
            seed=view.seed,
            evictions=view.evictions,
            head_offset=offset,
        )
        assert torch.equal(bits(shard), whole[:, offset : offset + 1])
    slots = torch.randperm(6)
    moved = dataclasses.replace(view, positions=view.positions[..., slots])
    assert torch.equal(bits(moved), whole[..., slots])
    torch.random.set_rng_state(state)


@pytest.mark.slow
def test_compiled_integers_are_the_same() -> None:
    view = rows(3, 2, slots=64)
    key = noise.stream(view, 12345678901)
    compiled = torch.compile(noise.uniform_bits, fullgraph=True, backend="inductor")
    assert torch.equal(compiled(key, view.positions), noise.uniform_bits(key, view.positions))


def test_bits_are_uniform_and_unrelated() -> None:
    view = dataclasses.replace(rows(64, 4, slots=256), seed=torch.arange(64))
    u = bits(view).double() / 2**32
    n = u.numel()
    assert abs(u.mean().item() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    counts = torch.histc(u.float(), 64, 0, 1)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum().item() < 63 + 4 * (2 * 63) ** 0.5
    single = torch.stack([(bits(view) >> i) & 1 for i in range(32)]).double().mean((1, 2, 3))
    assert (single - 0.5).abs().max().item() < 5 * 0.5 / n**0.5
    flat = u - 0.5
    for a, b in (
        (flat[:, :, 1:], flat[:, :, :-1]),
        (flat[1:], flat[:-1]),
        (flat[:, 1:], flat[:, :-1]),
    ):
        assert abs((a * b).mean().item() * 12) < 5 / a.numel() ** 0.5


def test_gumbel_and_normal_have_their_moments_and_tails() -> None:
    view = dataclasses.replace(rows(64, 4, slots=256), seed=torch.arange(64))
    key = noise.stream(view, 3)
    g, z = noise.gumbel(key, view.positions), noise.normal(key, view.positions)
    n = g.numel()
    assert torch.isfinite(g).all()
    assert torch.isfinite(z).all()
    assert abs(g.mean().item() - 0.5772156649) < 5 * (math.pi**2 / 6 / n) ** 0.5
    assert abs(g.var().item() - math.pi**2 / 6) < 0.05
    assert abs(z.mean().item()) < 5 / n**0.5
    assert abs(z.var().item() - 1) < 0.03
    assert abs((z**4).mean().item() - 3) < 0.2
    ends = torch.tensor([[[0, 2**32 - 1]]])
    extremes = -torch.log(-torch.log1p(-noise._unit(ends)))
    assert torch.isfinite(extremes).all()
    assert extremes.min() < -3
    assert extremes.max() > 22


def sequential(weights: list[float], k: int) -> list[float]:
    """Return each item's chance to be among k drawn one after another without replacement."""
    n, chance = len(weights), [0.0] * len(weights)
    for order in itertools.permutations(range(n), k):
        left, p = sum(weights), 1.0
        for i in order:
            p *= weights[i] / left
            left -= weights[i]
        for i in order:
            chance[i] += p
    return chance


@pytest.mark.parametrize("tau", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    ("weights", "k"),
    [([1, 2, 3, 4, 5, 6], 3), ([1, 1, 8, 1], 2), ([0.01, 5, 5, 0.1, 1], 4), ([2, 1], 1)],
)
def test_top_k_of_perturbed_scores_is_sequential_sampling(weights: list[float], k: int, tau: float) -> None:
    draws, n = 20_000, len(weights)
    # The range of each value is its weight; one newest token more, which is recent and always stays.
    values = torch.tensor([*weights, 0.0])[None, None, :, None] * torch.tensor([0.0, 1.0])
    values = values.expand(draws, 1, n + 1, 2)
    view = view_of(values, budget=k + 1, seed=torch.arange(draws))
    policy = Policy(ValueNorm() >> Stochastic(tau) >> TopK(k + 1), recent=1)
    keep, _ = policy.select(view, policy.init(SPEC, draws))
    assert keep.mask[:, :, -1].all()
    assert (keep.mask.sum(-1) == k + 1).all()
    found = keep.mask[:, 0, :-1].double().mean(0)
    expected = torch.tensor(sequential([w ** (1 / tau) for w in weights], k)).double()
    error = (expected * (1 - expected) / draws).sqrt().clamp(min=1e-4)
    assert ((found - expected).abs() < 5 * error).all(), (found, expected)


def test_a_zero_weight_is_taken_last() -> None:
    values = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0])[None, None, :, None] * torch.tensor([0.0, 1.0])
    view = view_of(values.expand(100, 1, 5, 2), budget=3, seed=torch.arange(100))
    policy = Policy(ValueNorm() >> Stochastic() >> TopK(3), recent=1)
    keep, _ = policy.select(view, policy.init(SPEC, 100))
    assert (keep.mask[:, 0] == torch.tensor([False, True, False, True, True])).all()


def test_kept_noise_makes_many_evictions_one_sample_of_the_whole_history() -> None:
    """With redraw=False a token's number stays with it: what survives depends on the tokens alone."""
    policy = Policy(Constant() >> Stochastic(redraw=False, seed=3) >> TopK(20), interval=8, recent=4)
    plan = policy.plan(ModelSpec(1)).layers[0]
    assert plan is not None
    spec = LayerSpec(2, 2, 2, 2, plan.capacity, torch.float32, torch.device("cpu"))
    store = Store(policy, plan, spec, (0, 1), [Row(), Row(seed=7)])
    for step in range(200):
        for index in range(2):
            token = torch.full((2, 2, 1, 2), float(step))
            store.append(index, token, token, [1, 1])
        store.advance([row.advanced(1, decoding=step > 0) for row in store.rows])
        if store.rows[0].decoded % 8 == 0:
            evict(store, [row.length > 20 for row in store.rows], LogitSpec(1.0, num_heads=2))
    # Cut once more to compare at a boundary: one sample of positions 0 .. 195 and the last 4.
    evict(store, [True, True], LogitSpec(1.0, num_heads=2))
    assert store.rows[0].evictions > 20
    view = view_of(torch.zeros(4, 2, 200, 2), budget=20, recent=4)
    view = dataclasses.replace(view, layer=torch.tensor([0, 0, 1, 1]), seed=torch.tensor([0, 7, 0, 7]))
    keep, _ = policy.select(view, policy.init(spec, 4))
    at = store.order[..., :20].long()
    kept = store.positions.gather(-1, at).flatten(0, 1)
    expected = torch.arange(200).expand(4, 2, -1)[keep.mask].view(4, 2, 20)
    assert torch.equal(kept.long(), expected)
