"""Random sequences of everything that can be asked of a cache; each row is then its own oracle's run."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy import Allocator, PerLayer, Policy, Pyramid, UsageError
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.hf.compat import ANNOUNCES_DRAFTS
from tests.hf.zoo import zoo
from tests.models import sharpen
from tests.oracle import Oracle


def policies(*budgets: int | Allocator) -> list[Policy]:
    """Return some methods with each of these budgets."""
    names = ("vase", "h2o", "tova", "random_eviction")
    return [zoo(budget, interval=3, recent=3, window=4)[name] for budget in budgets for name in names]


#: What rows of one batch follow: they leave the same layers alone.
TOGETHER = [
    policies(8),
    policies(8, PerLayer((8, 11)), Pyramid(9, 2)),
    policies(PerLayer((None, 8))),
    policies(PerLayer((8, None)), PerLayer((11, None))),
]
KINDS = st.integers(0, 2**32 - 1)
History = list[tuple[Tensor, int]]  # tokens of one pass, and how many were taken back


@functools.cache
def model() -> Any:
    """Return the smallest model that has two layers and grouped heads."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    return sharpen(LlamaForCausalLM(config)).to(torch.float64).eval()


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="kvpolicy-machine-"))


class CacheMachine(RuleBasedStateMachine):
    """Ask a cache for everything in any order, remembering what each row was given."""

    cache: EvictionCache

    @initialize(rows=st.integers(1, 3), drafts=st.sampled_from([0, 0, 2] if ANNOUNCES_DRAFTS else [0]), data=st.data())
    def begin(self, rows: int, drafts: int, data: st.DataObject) -> None:
        together = data.draw(st.sampled_from(TOGETHER))
        self.policies: list[Policy] = [data.draw(st.sampled_from(together)) for _ in range(rows)]
        self.seeds = [data.draw(st.integers(0, 2)) for _ in range(rows)]
        self.drafts = drafts
        self.cache = EvictionCache(model(), self.policies, seeds=self.seeds, max_draft_tokens=drafts)
        self.forget()

    def forget(self) -> None:
        self.histories: list[History] = [[] for _ in self.policies]
        self.mask = torch.zeros(len(self.policies), 0, dtype=torch.long)
        self.logits: Tensor | None = None

    @property
    def used(self) -> bool:
        return self.mask.shape[1] > 0

    # Tokens

    @rule(data=st.data(), seed=KINDS)
    def turn(self, data: st.DataObject, seed: int) -> None:
        low = self.drafts + 2
        counts = [data.draw(st.integers(low, 14)) for _ in self.policies]
        if self.drafts:
            self.cache.activate_past_recording()
        self._give(counts, seed)

    @precondition(lambda self: self.used)
    @rule(steps=st.integers(1, 5), seed=KINDS)
    def decode(self, steps: int, seed: int) -> None:
        for step in range(steps):
            self._give([1] * len(self.policies), seed + step)

    @precondition(lambda self: self.used and self.drafts)
    @rule(width=st.integers(1, 3), back=st.integers(0, 2), seed=KINDS)
    def draft(self, width: int, back: int, seed: int) -> None:
        back = min(back, width - 1)
        self._give([width] * len(self.policies), seed)
        self.cache.crop(-back)
        self._took_back(back)
        self.logits = None

    def _give(self, counts: list[int], seed: int) -> None:
        width, random = max(counts), torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, 31, (len(counts), width), generator=random)
        new = (torch.arange(width) >= width - torch.tensor(counts)[:, None]).long()
        mask = torch.cat([self.mask, new], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        out = model()(tokens, attention_mask=mask, position_ids=positions, past_key_values=self.cache)
        self.mask, self.logits = mask, out.logits[:, -1]
        for row, history in enumerate(self.histories):
            history.append((tokens[row : row + 1, width - counts[row] :], 0))

    def _took_back(self, back: int) -> None:
        if back:
            self.mask = self.mask[:, :-back]
            for history in self.histories:
                history[-1] = (history[-1][0], back)

    # Rows

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = range(len(self.policies))
        alike = [[r for r in rows if self._same_band(r, row)] for row in rows]
        named = [data.draw(st.sampled_from(like)) for like in alike]
        self.cache.reorder_cache(torch.tensor(named))
        self._renamed(named)

    def _same_band(self, a: int, b: int) -> bool:
        low, high = sorted((a, b))
        return all(self.policies[r] == self.policies[a] for r in range(low, high + 1))

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        rows = st.integers(0, len(self.policies) - 1)
        named = data.draw(st.lists(rows, min_size=1, max_size=3))
        fork, old = self.cache.fork(named), self.cache
        old.unbind()
        self.cache = fork
        self._renamed(named)

    def _renamed(self, named: list[int]) -> None:
        self.policies, self.seeds = [self.policies[r] for r in named], [self.seeds[r] for r in named]
        self.histories = [list(self.histories[r]) for r in named]
        self.mask = self.mask[named]
        self.logits = None if self.logits is None else self.logits[named]

    # The whole

    @precondition(lambda self: self.used)
    @rule()
    def save_and_load(self) -> None:
        path = folder() / "cache.safetensors"
        self.cache.save(path)
        loaded = EvictionCache.load(path, model())
        self.cache.unbind()
        self.cache = loaded

    @rule()
    def reset(self) -> None:
        if self.used:
            self.cache.reset()
            self.forget()

    # Refusals

    @precondition(lambda self: self.used)
    @rule()
    def wrong_calls(self) -> None:
        before, rows = self.cache.receipt(), len(self.policies)
        width = self.drafts + 2
        for wrong in (
            {"input_ids": torch.ones(rows + 1, 1, dtype=torch.long)},
            {"input_ids": torch.ones(rows, 1, dtype=torch.long), "attention_mask": torch.ones(rows, 1)},
            {"input_ids": torch.ones(rows, width, dtype=torch.long), "attention_mask": torch.cat(
                [self.mask, torch.ones(rows, width, dtype=torch.long)], 1),
             "position_ids": torch.arange(width).expand(rows, -1)},
        ):  # fmt: skip
            with pytest.raises(UsageError):
                model()(**wrong, past_key_values=self.cache)
        with pytest.raises(UsageError, match=r"certainly|would remove"):
            self.cache.crop(-100)
        assert self.cache.receipt() == before

    # What always holds

    @invariant()
    def slots_agree(self) -> None:
        if not self.used:
            return
        for group in self.cache.groups:
            assert group.store is not None
            group.store.check_integrity()
            for row, plan in zip(group.store.rows, group.store.plans, strict=True):
                assert row.length <= plan.capacity + self.drafts

    def teardown(self) -> None:
        try:
            if self.used:
                self._rows_are_their_oracles()
        finally:
            self.cache.unbind()

    def _rows_are_their_oracles(self) -> None:
        if self.drafts:
            self.cache.crop(0)  # what is there may stay
        receipt = self.cache.receipt()
        for row, history in enumerate(self.histories):
            oracle = Oracle(model(), self.policies[row], seeds=[self.seeds[row]], drafts=self.drafts)
            expected = torch.zeros(0)
            for tokens, back in history:
                expected = oracle.forward(tokens)
                if self.drafts:
                    oracle.crop(back)
            for layer in receipt.layers:
                kept = receipt.positions(layer)[row]
                assert torch.equal(kept[:, : oracle.kept(layer).shape[2]], oracle.kept(layer)[0]), f"row {row}"
            if self.logits is not None:
                assert (self.logits[row] - expected[0]).abs().max() <= 1e-9


TestCache = CacheMachine.TestCase
THOROUGH = os.environ.get("KVPOLICY_HYPOTHESIS") == "thorough"
TestCache.settings = settings(max_examples=10_000 if THOROUGH else 200, stateful_step_count=15, deadline=None)
