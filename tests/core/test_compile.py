"""From view to keep without a host synchronisation or a data-dependent shape."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from kvpolicy import LayerSpec
from tests.core.views import view_of
from tests.hf.zoo import zoo

ZOO = zoo(24)


@pytest.mark.parametrize("name", ZOO)
def test_view_to_keep_is_one_graph(name: str) -> None:
    policy = ZOO[name]
    generator = torch.Generator().manual_seed(0)

    def view(evictions: int) -> object:
        keys, values = (torch.randn(3, 2, 32, 8, generator=generator) for _ in range(2))
        queries = torch.randn(3, 4, 16, 8, generator=generator)
        made = view_of(keys, values, budget=24, recent=8, queries=queries)
        fresh = torch.arange(24, 32).expand(3, 2, 8)
        return dataclasses.replace(made, fresh=fresh, evictions=torch.full((3,), evictions))

    spec = LayerSpec(2, 4, 8, 8, 32, torch.float32, torch.device("cpu"))
    state = policy.init(spec, 3)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(policy.select, fullgraph=True, dynamic=False, backend=counter)
    for evictions in range(3):
        one = view(evictions)
        expected, expected_state = policy.select(one, state)
        found, _ = compiled(one, state)
        assert torch.equal(found.mask, expected.mask)
        assert found.victims is not None
        assert torch.equal(found.victims, expected.victims)
        state = expected_state
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ZOO)
def test_nothing_is_read_back_to_the_host(name: str) -> None:
    """Tensors of this device hold no data: whatever asks for it fails."""
    policy, device = ZOO[name], torch.device("meta")
    with device:
        keys = torch.randn(3, 2, 32, 8)
        view = view_of(keys, budget=24, recent=8, queries=torch.randn(3, 4, 16, 8))
        spec = LayerSpec(2, 4, 8, 8, 32, torch.float32, device)
        keep, _ = policy.select(view, policy.init(spec, 3))
        assert keep.mask.shape == (3, 2, 32)
