"""What attention loses by what has been evicted, against attention that is written out."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvpolicy import UsageError
from kvpolicy.adapters.hf import replay, replays, survival
from kvpolicy.adapters.hf.losses import _lost
from kvpolicy.receipt import Receipt
from tests.hf.test_replay import padded_text
from tests.hf.zoo import zoo
from tests.models import tiny


def plain_losses(model: Any, ids: Tensor, kept: dict[int, Tensor], first: int) -> tuple[Tensor, Tensor]:
    """Return mass and output error of the queries from ``first`` on, ``[requests, layers]``, written out."""
    asked: list[Tensor] = []

    def look(module: Any, _: Any, arguments: dict[str, Any]) -> None:
        hidden, (cos, sin) = arguments["hidden_states"], arguments["position_embeddings"]
        queries = module.q_proj(hidden).unflatten(-1, (4, 8)).transpose(1, 2)
        asked.append(apply_rotary_pos_emb(queries, queries, cos, sin)[0])

    hooks = [
        layer.self_attn.register_forward_pre_hook(look, with_kwargs=True, prepend=True) for layer in model.model.layers
    ]
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    mass, error = torch.zeros(2, len(ids), len(asked), dtype=torch.float64)
    for r, layer in itertools.product(range(len(ids)), range(len(asked))):
        lost, apart = [], []
        held: Any = cache.layers[layer]
        for head, at in itertools.product(range(4), range(first, ids.shape[1] - 1)):
            keys, values = (one[r, head // 2, : at + 1] for one in (held.keys, held.values))
            weights = torch.softmax(keys @ asked[layer][r, head, at] / 8**0.5, 0)
            there = [*(p for p in kept[layer][r, head // 2].tolist() if 0 <= p < first), *range(first, at + 1)]
            left, whole = weights[there].sum(), weights @ values
            lost.append(1 - left)
            apart.append((weights[there] / left @ values[there] - whole).norm() / whole.norm())
        mass[r, layer], error[r, layer] = torch.stack(lost).mean(), torch.stack(apart).mean()
    return mass, error


def test_losses_are_those_of_attention_written_out() -> None:
    model, names = tiny("llama", torch.float64), ("vase", "h2o", "streaming_llm")
    ids = torch.randint(2, 97, (2, 101), generator=torch.Generator().manual_seed(3))
    found = replays(model, [zoo(24)[name] for name in names], ids, 40, probe=True)
    for name, one in zip(names, found, strict=True):
        assert one.losses is not None
        assert one.losses.layers == (0, 1, 2)
        # The last 16 that are fed ask, of what was held before them.
        before = replay(model, zoo(24)[name], ids[:, :85], 40).receipt
        mass, error = plain_losses(model, ids, before.kept, 84)
        assert (one.losses.mass - mass).abs().max() <= 1e-5  # both are computed in float32
        assert (one.losses.output - error).abs().max() <= 1e-4
        assert mass.min() > 0.05
        assert error.min() > 0.05
    plain = replays(model, [zoo(24)[name] for name in names], ids, 40)
    for one, other in zip(found, plain, strict=True):
        assert other.losses is None
        assert torch.equal(one.kl, other.kl)


def test_nothing_is_lost_where_nothing_is_evicted() -> None:
    ids = torch.randint(2, 97, (2, 90), generator=torch.Generator().manual_seed(3))
    tight, plenty = replays(tiny("llama"), [zoo(24)["vase"], zoo(200)["vase"]], ids, 30, probe=True)
    assert plenty.losses.mass.abs().max() <= 1e-6
    assert plenty.losses.output.abs().max() <= 1e-5
    assert tight.losses.mass.min() > 0.01


def test_a_query_whose_tokens_have_all_gone_is_wrong_by_its_whole_output() -> None:
    weights = torch.tensor([[[[0.5, 0.5, 0.0, 0.004]]]], dtype=torch.bfloat16)  # rounding: they add up to 1.004
    values = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0], [0.0, 0.0]]]])
    mass, error = _lost(weights, values, torch.tensor([[[2]]]), 3)
    assert mass.item() == pytest.approx(1, abs=0.01)
    assert error.item() == pytest.approx(1, abs=0.01)


def test_a_sink_logit_keeps_its_share() -> None:
    weights = torch.tensor([[[[0.25, 0.25, 0.25]]]])  # and 0.25 for the sink
    values = torch.tensor([[[[1.0], [1.0], [1.0]]]])
    mass, error = _lost(weights, values, torch.tensor([[[0, -1]]]), 2)
    assert mass.item() == pytest.approx(0.25)
    assert error.item() == pytest.approx(abs(0.5 / 0.75 - 0.75) / 0.75)


def test_losses_need_the_full_cache_and_no_pads() -> None:
    model, policy = tiny("llama"), zoo(24)["vase"]
    ids, mask = padded_text()
    for wrong in ({"attention_mask": mask}, {"full": False}):
        with pytest.raises(UsageError, match="probe=True compares with the full cache, without pads"):
            replays(model, [policy], ids, 40, probe=True, **wrong)
    assert replays(model, [policy], ids, 40, probe=True, attention_mask=torch.ones_like(mask))[0].losses is not None


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, policy = tiny("llama"), zoo(24)["vase"]
    ids = torch.randint(2, 97, (1, 90), generator=torch.Generator().manual_seed(3))
    before, logits = model.config._attn_implementation, model(ids).logits
    assert before != "eager"  # which is what losses are asked with
    replays(model, [policy], ids, 30, probe=True)
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids).logits, logits)

    monkeypatch.setattr(model, "forward", functools.partial(_refuse_attentions, model.forward))
    with pytest.raises(MemoryError):
        replays(model, [policy], ids, 30, probe=True)
    assert model.config._attn_implementation == before


def _refuse_attentions(forward: Any, *args: Any, **arguments: Any) -> Any:
    if arguments.get("output_attentions"):
        raise MemoryError
    return forward(*args, **arguments)


def test_survival_of_a_receipt_made_by_hand() -> None:
    kept = {0: torch.tensor([[[0, 2, 9], [0, 3, -1]]]), 2: torch.tensor([[[1, -1, -1], [1, -1, -1]]])}
    receipt = Receipt(("x",), "0", (10,), (3,), 3, (1,), (0,), 0, 0, 0, 0, (0, 2), {1: "sliding"}, kept)
    per_head, union = survival(receipt, 0, 4)
    assert per_head.tolist() == [(2 / 4 + 1 / 4) / 2]
    assert union.tolist() == [(3 / 4 + 1 / 4) / 2]
    per_head, union = survival(receipt, 2, 4)
    assert [per_head.tolist(), union.tolist()] == [[0.25], [0.5]]
