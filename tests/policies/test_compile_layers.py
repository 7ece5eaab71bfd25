"""Methods that look at partitions, single queries and weights: one graph, and nothing read back to the host."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from kvpolicy import (
    CompositionError,
    LagRelative,
    LayerSpec,
    OutputNorm,
    OutputProjection,
    Policy,
    Recency,
    TopK,
    policies,
)
from tests.core.views import view_of

METHODS = {
    "lagkv": policies.lagkv(24, lag=4, recent=8),
    "curdkv": policies.curdkv(24, recent=8),
    "cake": policies.cake(24, window=8),
    "criticalkv": policies.criticalkv(24, window=8),
    "defensivekv": policies.defensivekv(24, window=8),
    "expected_attention": policies.expected_attention(24, window=8, future=5, recent=8),
}
# How many slots a head gets is decided elsewhere.
POLICIES = {
    name: Policy(dataclasses.replace(one.chain, selector=TopK(24)), recent=one.recent) for name, one in METHODS.items()
}


def shown(device: str, seed: int = 0) -> object:
    torch.manual_seed(seed)
    with torch.device(device):
        keys, values = torch.randn(3, 2, 32, 8), torch.randn(3, 2, 32, 8)
        output = OutputProjection((torch.randn(5, 4, 8), torch.randn(5, 4, 8)), (0, 0, 1))
        rotary = torch.rand(4, dtype=torch.float64).expand(3, -1)
        made = view_of(
            keys, values, budget=24, recent=8, queries=torch.randn(3, 4, 16, 8), output=output, rotary=rotary
        )
        return dataclasses.replace(made, fresh=torch.arange(24, 32).expand(3, 2, 8))


def test_view_to_keep_is_one_graph() -> None:
    """Partitions and a tuple of weights; that the others read nothing back is tried below, where it costs less."""
    policy = Policy(LagRelative(4) >> OutputNorm() >> TopK(24), recent=8)
    state = policy.init(LayerSpec(2, 4, 8, 8, 32, torch.float32, torch.device("cpu")), 3)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(policy.select, fullgraph=True, dynamic=False, backend=counter)
    for seed in range(2):
        view = shown("cpu", seed)
        assert torch.equal(compiled(view, state)[0].mask, policy.select(view, state)[0].mask)
    assert counter.frame_count == 1


def test_an_epsilon_is_not_added_to_logits() -> None:
    view = shown("cpu")
    stage = OutputNorm(5.0)
    state = stage.update(view, stage.init(LayerSpec(2, 4, 8, 8, 32, torch.float32, torch.device("cpu")), 3))
    logits = Recency().score(view, None)
    assert not logits.weights
    with pytest.raises(CompositionError, match=r"OutputNorm\(epsilon=5.0\) stands behind a scorer of logits"):
        stage.apply(logits, view, state)
    assert stage.apply(dataclasses.replace(logits, weights=True), view, state).weights
    assert OutputNorm().needs == {"output_projection"}
    assert OutputNorm(relative=True).needs == {"output_projection", "cross_heads"}


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_read_back_to_the_host(name: str) -> None:
    """Tensors of this device hold no data: whatever asks for it fails."""
    policy = POLICIES[name]
    state = policy.init(LayerSpec(2, 4, 8, 8, 32, torch.float32, torch.device("meta")), 3)
    with torch.device("meta"):
        assert policy.select(shown("meta"), state)[0].mask.shape == (3, 2, 32)
