"""One batch whose rows follow different policies: each row is its own single run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import BindError, EvictionPolicy, Policy, Prompt, Stochastic, TopK, UnsupportedError, UsageError
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.policies import snapkv
from tests.families import KINDS, ROUNDING
from tests.hf.test_oracle import padded
from tests.hf.zoo import zoo
from tests.models import tiny

MIXES: dict[str, list[Policy]] = {
    "methods": [zoo(24)[name] for name in ("vase", "h2o", "streaming_llm", "vase_dkv")],
    "budgets": [zoo(budget)["vase"] for budget in (24, 40, 20, 24)],
    "intervals": [zoo(24, interval=interval)["h2o"] for interval in (8, 5, 16, 5)],
    "recent": [zoo(24, recent=recent)["tova"] for recent in (8, 1, 12, 8)],
    "windows": [zoo(24, window=window)["mixture"] for window in (16, 8, 16, 32)],
    "neighbours": [zoo(24)["vase"], zoo(24)["vase"], zoo(30)["vase"], zoo(30)["vase"]],
    "never due": [zoo(24)["vase"], zoo(300)["vase"], zoo(24)["vase"], zoo(300)["h2o"]],
}
LENGTHS = [40, 33, 9, 26]


def rows_alone(
    model: Any, policies: list[Any], seeds: list[int], prompts: Tensor, mask: Tensor, text: Tensor
) -> list[tuple[Tensor, dict[int, Tensor], int]]:
    """Return logits, kept positions and evictions of each row, run alone and without pads."""
    found = []
    for r, policy in enumerate(policies):
        ids = prompts[r : r + 1, mask[r].bool()]
        with EvictionCache(model, policy, seeds=[seeds[r]]) as cache:
            logits = [model(ids, past_key_values=cache).logits[:, -1]]
            logits += [model(one, past_key_values=cache).logits[:, -1] for one in text[r : r + 1].split(1, 1)]
            receipt = cache.receipt()
        found.append((torch.cat(logits), {i: receipt.positions(i)[0] for i in receipt.layers}, receipt.evictions[0]))
    return found


def together(
    model: Any, policies: list[Any], seeds: list[int], prompts: Tensor, mask: Tensor, text: Tensor
) -> tuple[Tensor, Any]:
    with EvictionCache(model, policies, seeds=seeds) as cache:
        logits, ids = [], prompts
        for step in range(text.shape[1] + 1):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            logits.append(model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1])
            if step < text.shape[1]:
                ids, mask = text[:, step : step + 1], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        for group in cache.groups:
            assert group.store is not None
            group.store.check_integrity()
        return torch.stack(logits, 1), cache.receipt()


@pytest.mark.parametrize(
    ("family", "mix"), [*(("llama", mix) for mix in MIXES), *((family, "methods") for family in KINDS)]
)
def test_each_row_equals_its_single_run(family: str, mix: str) -> None:
    model, policies, seeds = tiny(family, torch.float64), MIXES[mix], [0, 7, 0, 3]
    prompts, mask = padded(LENGTHS, 97)
    text = torch.randint(2, 97, (4, 50), generator=torch.Generator().manual_seed(5))
    alone = rows_alone(model, policies, seeds, prompts, mask, text)
    logits, receipt = together(model, policies, seeds, prompts, mask, text)
    most = ROUNDING.get(family, 1e-9)
    for r, (expected, kept, evictions) in enumerate(alone):
        assert (logits[r] - expected).abs().max() <= most, f"row {r}"
        assert receipt.evictions[r] == evictions
        for layer, positions in kept.items():
            mine = receipt.positions(layer)[r]
            assert torch.equal(mine[:, : positions.shape[1]], positions), f"row {r}, layer {layer}"
            assert (mine[:, positions.shape[1] :] == -1).all()
    assert receipt.policy == tuple(policy.text(full=True) for policy in policies)


def test_any_order_of_rows() -> None:
    model, policies, seeds = tiny("llama", torch.float64), MIXES["methods"], [0, 7, 0, 3]
    prompts, mask = padded(LENGTHS, 97)
    text = torch.randint(2, 97, (4, 30), generator=torch.Generator().manual_seed(5))
    logits, _ = together(model, policies, seeds, prompts, mask, text)
    order = [2, 0, 3, 1]
    again, _ = together(
        model, [policies[r] for r in order], [seeds[r] for r in order], prompts[order], mask[order], text[order]
    )
    assert (again - logits[order]).abs().max() <= 1e-9


def test_several_turns_and_a_prompt_beyond_the_capacity() -> None:
    model, policies = tiny("llama", torch.float64), MIXES["methods"]
    ids = torch.randint(2, 97, (4, 150), generator=torch.Generator().manual_seed(3))
    turns = [90, 1, 1, 1, 9, 1, 30, *[1] * 17]
    assert sum(turns) == 150
    alone = []
    for r, policy in enumerate(policies):
        with EvictionCache(model, policy) as cache:
            alone.append(
                torch.cat([model(x, past_key_values=cache).logits[:, -1] for x in ids[r : r + 1].split(turns, 1)])
            )
    with EvictionCache(model, policies) as cache:
        found = torch.stack([model(x, past_key_values=cache).logits[:, -1] for x in ids.split(turns, 1)], 1)
        cache.reset()
        again = torch.stack([model(x, past_key_values=cache).logits[:, -1] for x in ids.split(turns, 1)], 1)
    assert (found - torch.stack(alone)).abs().max() <= 1e-9
    assert torch.equal(found, again)


def test_generate_takes_one_policy_a_row() -> None:
    model, policies = tiny("llama", torch.float64), MIXES["budgets"]
    ids = torch.randint(2, 97, (4, 40), generator=torch.Generator().manual_seed(3))
    with EvictionCache(model, policies) as cache:
        found = model.generate(ids, max_new_tokens=30, do_sample=False, past_key_values=cache)
        assert cache.receipt().slots == tuple(min(slots, 69) for slots in (24 + 5, 40 + 5, 20 + 5, 24 + 5))
    for r, policy in enumerate(policies):
        with EvictionCache(model, policy) as cache:
            alone = model.generate(ids[r : r + 1], max_new_tokens=30, do_sample=False, past_key_values=cache)
            assert torch.equal(found[r : r + 1], alone)


def test_equal_policies_are_one() -> None:
    model = tiny("llama")
    with EvictionCache(model, [zoo(24)["vase"], zoo(24)["vase"], zoo(25)["vase"]]) as cache:
        model(torch.full((3, 5), 7), past_key_values=cache)
        assert cache.groups[0].store is not None
        assert [band.count for band in cache.groups[0].store.bands] == [2, 1]


class NoLayer:
    """Leaves layer 0 alone."""

    needs: frozenset[str] = frozenset()

    def plan(self, model: Any) -> Any:
        plan = zoo(24)["knorm"].plan(model)
        return type(plan)((None, *plan.layers[1:]))

    init = staticmethod(lambda spec, rows: ())
    select = staticmethod(lambda view, state: zoo(24)["knorm"].select(view, state))


@pytest.mark.parametrize(
    ("policies", "error", "message"),
    [
        ([], BindError, "an empty list of policies"),
        ([zoo(24)["vase"], "vase(24)"], BindError, "is a text; write Policy.parse"),
        ([zoo(24)["vase"], NoLayer()], UnsupportedError, "leaves layer 0 alone, and another one evicts"),
    ],
)
def test_what_cannot_be_bound(policies: list[EvictionPolicy], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EvictionCache(tiny("llama"), policies)


def test_policies_must_fit_the_batch_and_beams_stay_under_theirs() -> None:
    model, ids = tiny("llama"), torch.full((3, 20), 7)
    with EvictionCache(model, [zoo(24)["vase"], zoo(30)["vase"]]) as cache:
        with pytest.raises(UsageError, match="there are 2 policies, and the batch has 3 rows"):
            model(ids, past_key_values=cache)
        cache.reset()
        model(ids[:2], past_key_values=cache)
        with pytest.raises(UsageError, match="follows the same policy"):
            cache.reorder_cache(torch.tensor([1, 0]))


def test_a_policy_that_cuts_the_prompt_alone_beside_one_that_goes_on() -> None:
    model = tiny("llama", torch.float64)
    policies: list[Policy] = [
        snapkv(30, window=8),
        Policy(Prompt() >> Stochastic() >> TopK(24), interval=8, recent=8),
    ]
    ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(3))
    with EvictionCache(model, policies, max_new_tokens=50) as cache:
        model.generate(ids, max_new_tokens=40, do_sample=False, past_key_values=cache)
        assert cache.receipt().evictions == (1, 5)
        assert cache.receipt().slots == (30 + 39, 24 + 7)
