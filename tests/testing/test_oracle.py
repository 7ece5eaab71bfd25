"""The oracle: what a full cache with a mask holds and attends to, by hand; and stores that attend to others."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import KeyNorm, LayerSpec, ModelSpec, Policy, Recency, Sinks, TopK
from kvpolicy.eviction import LogitSpec
from kvpolicy.testing import CHECKS, MaskedCache
from kvpolicy.testing.replay import StoreCache

POLICY = Policy(Recency() >> Sinks(1) >> TopK(4), interval=2, recent=1)


def cache(policy: Policy = POLICY, logits: LogitSpec | None = None) -> MaskedCache:
    plan = policy.plan(ModelSpec(num_layers=1)).layers[0]
    assert plan is not None
    spec = LayerSpec(1, 2, 4, 4, plan.capacity, torch.float32, torch.device("cpu"))
    return MaskedCache(policy, plan, spec, logits or LogitSpec(0.5))


def tell(oracle: MaskedCache, tokens: int, *, decoding: bool = False) -> torch.Tensor:
    random = torch.Generator().manual_seed(oracle.seen)
    keys, values, queries = (torch.randn(heads, tokens, 4, generator=random) for heads in (1, 1, 2))
    oracle.step(keys, values, queries, decoding=decoding)
    return queries


def test_rows_are_cut_when_they_are_due() -> None:
    oracle = cache()
    lengths = []
    for tokens, decoding in ((3, False), (4, False), (1, True), (1, True), (1, True), (1, False), (1, True)):
        tell(oracle, tokens, decoding=decoding)
        lengths.append(len(oracle.kept[0]))
    # A turn ends within the budget; one ends over it; the interval of two; and again from the next turn on.
    assert lengths == [3, 4, 5, 4, 5, 4, 5]
    assert oracle.kept[0] == {0, 8, 9, 10, 11}
    assert oracle.prompt == 7


def test_attention_sees_what_is_alive_and_nothing_later() -> None:
    oracle = cache(logits=LogitSpec(0.5, softcap=3.0, sinks=torch.tensor([[0.1, -1.0]])))
    queries = tell(oracle, 9)
    found = oracle.attend(queries[:, -2:])
    assert oracle.kept[0] == {0, 6, 7, 8}
    for head in range(2):
        for number, seen in enumerate(([0, 6, 7], [0, 6, 7, 8])):
            logits = 0.5 * oracle.keys[0, 0, seen].double() @ queries[head, 7 + number].double()
            logits = torch.cat([3 * torch.tanh(logits / 3), torch.tensor([0.1, -1.0])[head : head + 1].double()])
            expected = logits.softmax(-1)[:-1] @ oracle.values[0, 0, seen].double()
            torch.testing.assert_close(found[head, number], expected)


def test_what_was_evicted_does_not_matter() -> None:
    oracle = cache()
    query = tell(oracle, 9)[:, -1:]
    before = oracle.attend(query)
    oracle.keys[:, :, 1:6] = 1e6
    oracle.values[:, :, 1:6] = 1e6
    assert torch.equal(oracle.attend(query), before)
    oracle.values[:, :, 7] = 1e6
    assert not torch.equal(oracle.attend(query), before)


def test_a_store_that_attends_to_others_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are right, and a key has been left behind: only attention shows it."""
    policy = Policy(KeyNorm() >> TopK(8), interval=3, recent=2)
    CHECKS["check_oracle"](policy)
    whole = StoreCache.kept

    def kept(self: StoreCache, layer: int, request: int) -> tuple[frozenset[int], ...]:
        self.store.keys[:, :, :, 0] = self.store.keys[:, :, :, 1]
        return whole(self, layer, request)

    monkeypatch.setattr(StoreCache, "kept", kept)
    with pytest.raises(AssertionError, match=r"check_oracle.*away from attention"):
        CHECKS["check_oracle"](policy)
