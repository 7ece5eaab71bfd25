"""What policies read of a model's weights, through the transformers adapter, against the weights themselves."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvpolicy import (
    Constant,
    ExpectedAttention,
    ModelSpec,
    OutputNorm,
    Policy,
    StageState,
    TopK,
    UnsupportedError,
    UsageError,
    View,
    policies,
)
from kvpolicy.adapters.flash_attn import FlashCache
from kvpolicy.adapters.hf import EvictionCache, layer_preferences
from kvpolicy.adapters.vllm.config import followed
from tests.models import tiny

PROMPT, DECODED = 14, 8


def told(model: Any, cache: Any, tokens: Tensor) -> list[dict[str, Tensor]]:
    """Give a prompt, then a token at a time; return what each layer's query projection said of all of them."""
    said: list[dict[str, list[Tensor]]] = [{"q": []} for _ in model.model.layers]
    hooks = []
    for layer, of in zip(model.model.layers, said, strict=True):
        hooks.append(layer.self_attn.q_proj.register_forward_hook(lambda m, a, out, of=of: of["q"].append(out)))
    with torch.no_grad():
        model(tokens[:, :PROMPT], past_key_values=cache)
        for at in range(PROMPT, tokens.shape[1]):
            model(tokens[:, at : at + 1], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return [{name: torch.cat(parts, 1) for name, parts in of.items()} for of in said]


def tokens_of(model: Any, count: int = PROMPT) -> Tensor:
    return torch.randint(2, model.config.vocab_size, (2, count), generator=torch.Generator().manual_seed(3))


def test_output_norm_is_that_of_the_weights() -> None:
    model = tiny("llama", torch.float64)
    policy = Policy(Constant() >> OutputNorm() >> TopK(7), interval=4, recent=2)
    tokens = tokens_of(model)
    plain = DynamicCache(config=model.config)
    told(model, plain, tokens)
    with EvictionCache(model, policy) as cache:
        told(model, cache, tokens)
        kept = {layer: at for group in cache.groups for layer, at in group.positions().items()}
    for number, layer in enumerate(model.model.layers):
        held: Any = plain.layers[number]
        weight = layer.self_attn.o_proj.weight.tolist()  # [hidden][4 query heads of 8]
        for row in range(2):
            for head in range(2):
                norms = []
                for value in held.values[row, head].tolist():
                    of_group = []
                    for member in (2 * head, 2 * head + 1):
                        padded = [0.0] * 8 * member + value + [0.0] * 8 * (3 - member)
                        of_group.append(
                            sum(abs(sum(a * b for a, b in zip(line, padded, strict=True))) for line in weight)
                        )
                    norms.append(sum(of_group) / 2)
                best = sorted(range(PROMPT - 2), key=norms.__getitem__)[-5:]
                assert sorted([*best, PROMPT - 2, PROMPT - 1]) == kept[number][row, head].tolist()


class Watched(Policy):
    """A policy that lets a test look at what it is shown, and what it remembers of it."""

    def select(self, view: View, state: Any) -> Any:
        keep, after = super().select(view, state)
        copied = {
            name: getattr(view, name).clone() for name in ("keys", "values", "positions")
        }  # slots are filled anew
        numbers = [None if one is None else StageState(tuple(t.clone() for t in one.slots), one.rows) for one in after]
        shown.append((dataclasses.replace(view, **copied), numbers))
        return keep, after


shown: list[tuple[View, Any]] = []


def test_output_norm_is_that_of_each_layer_while_decoding() -> None:
    model = tiny("llama", torch.float64)
    shown.clear()
    policy = Watched(Constant() >> OutputNorm() >> TopK(7), interval=4, recent=2)
    with EvictionCache(model, policy) as cache:
        told(model, cache, tokens_of(model, PROMPT + DECODED))
        assert cache.receipt().evictions == (3, 3)
    assert max(len(view.layer) for view, _ in shown) == 6  # layers and requests in one view
    for view, after in shown:
        for row, layer in enumerate(view.layer.tolist()):
            weight = model.model.layers[layer].self_attn.o_proj.weight.view(32, 2, 2, 8)
            made = torch.einsum("nhmd,hsd->hmsn", weight, view.values[row])
            norms = torch.where(view.valid[row], made.abs().sum(-1).mean(1), 0)
            torch.testing.assert_close(after[1].slots[0][row], norms.float(), rtol=1e-5, atol=0)


def test_no_weights_are_copied() -> None:
    model = tiny("llama")
    shown.clear()
    with EvictionCache(model, Watched(Constant() >> OutputNorm() >> TopK(7), interval=4, recent=2)) as cache:
        told(model, cache, tokens_of(model, PROMPT + 4))
        copy = cache.fork()
        assert copy.groups[0].weights is cache.groups[0].weights
        copy.unbind()
    owned = [layer.self_attn.o_proj.weight.data_ptr() for layer in model.model.layers]
    for view, _ in shown:
        for row, layer in enumerate(view.layer.tolist()):
            assert view.output.weights[view.output.rows[row]].data_ptr() == owned[layer]


@pytest.mark.parametrize("prompt", [True, False])
def test_expected_attention_is_that_of_queries_before_their_rotation(prompt: bool) -> None:
    """Queries as the projections give them, never rotated, and rotations written out from the configuration."""
    model, window, future, decoded = tiny("llama", torch.float64), 6, 5, 0 if prompt else 4
    shown.clear()
    scorer = ExpectedAttention(window, future, sinks=2)
    with EvictionCache(model, Watched(scorer >> TopK(9), interval=4, recent=3)) as cache:
        said = told(model, cache, tokens_of(model, PROMPT + decoded))
    view, after = shown[-1]
    seen = PROMPT + decoded
    angles = [10000 ** (-2 * i / 8) for i in range(4)]
    turn = torch.zeros(8, 8, dtype=torch.float64)
    for position in range(seen, seen + future):
        for i, angle in enumerate(angles):
            c, s = math.cos(position * angle), math.sin(position * angle)
            turn[i, i] += c / future
            turn[i, 4 + i] -= s / future
            turn[4 + i, i] += s / future
            turn[4 + i, 4 + i] += c / future
    for row, layer in enumerate(view.layer.tolist()):
        request = row % 2
        plain = said[layer]["q"][request, -window:].view(window, 4, 8)
        for head in range(2):
            held = (view.positions[row, head] >= 2).nonzero()[:, 0]
            keys, shares = view.keys[row, head, held], torch.zeros(len(held), dtype=torch.float64)
            for member in (2 * head, 2 * head + 1):
                mean = plain[:, member].mean(0)
                apart = plain[:, member] - mean
                covariance = turn @ (apart.T @ apart / window) @ turn.T
                quadratic = torch.stack([key @ covariance @ key for key in keys]) / 8 / 2
                shares += torch.softmax(keys @ (turn @ mean) / math.sqrt(8) + quadratic, -1) / 2
            expected = shares * view.values[row, head, held].norm(dim=-1)
            found = scorer.score(view, after[0]).values[row, head, held]
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_layer_preferences_are_those_of_the_attention() -> None:
    model, window = tiny("llama", torch.float64), 5
    model.set_attn_implementation("eager")
    prompts = [tokens_of(model, count)[:1] for count in (14, 19)]
    expected = [0.0] * 3
    for ids in prompts:
        with torch.no_grad():
            weights = model(ids, output_attentions=True).attentions
        numbers = []
        for one in weights:
            older = one[0, :, -window:, :-window]
            entropy = -sum(p * math.log(p + 1e-10) for p in older.flatten().tolist())
            numbers.append(entropy ** (1 / 1.5) * float(older.var(1).sum()) ** (1 / 0.5))
        expected = [total + number / sum(numbers) / 2 for total, number in zip(expected, numbers, strict=True)]
    found = layer_preferences(model, [prompts[0], prompts[1][0]], window=window, tau1=1.5, tau2=0.5)
    assert found == pytest.approx(expected, rel=1e-5)
    budgets = [plan.budget for plan in policies.cake(40, preferences=found, window=5).plan(ModelSpec(3, 8)).layers]
    assert sum(budgets) == 120
    assert len(set(budgets)) > 1
    for bad, why in (([], "there is none"), ([prompts[0][:, :5]], "longer than window=5")):
        with pytest.raises(UsageError, match=why):
            layer_preferences(model, bad, window=5)


READS = {
    "output_projection": policies.criticalkv(24, window=8, interval=4),
    "rotary": policies.expected_attention(24, window=8, recent=4),
}
REFUSED = {
    "output_projection": r"output projections \(OutputNorm\), which the {}; leave out OutputNorm, or use transformers$",
    "rotary": r"rotations \(ExpectedAttention\), which the {}; score without ExpectedAttention, or use transformers$",
}


@pytest.mark.parametrize("need", READS)
def test_engines_without_the_models_weights_refuse(need: str) -> None:
    sizes = {"num_layers": 1, "batch_size": 1, "num_heads": 2, "num_query_heads": 4, "head_dim": 8}
    with pytest.raises(UnsupportedError, match=REFUSED[need].format("flash_attn adapter cannot give")):
        FlashCache(READS[need], dtype=torch.float32, **sizes)
    with pytest.raises(UnsupportedError, match=REFUSED[need].format("vLLM adapter cannot give")):
        followed(repr(READS[need]))


@pytest.mark.parametrize(
    ("need", "family", "why"),
    [
        ("rotary", "phi", "does not rotate queries and keys in every layer, or in a way of its own"),
        ("rotary", "smollm3", "does not rotate queries and keys in every layer"),
        ("rotary", "glm4", "rotates 4 of the 8 numbers of a key"),
        ("rotary", "gemma3", "has 0 rotary embeddings, where one is known"),
        ("rotary", "deepseek_v3", "latent attention"),
        ("output_projection", "deepseek_v3", "latent attention"),
        ("output_projection", "qwen3_next", r"something stands between \(a gate\)"),
    ],
)
def test_models_of_another_kind_are_refused(need: str, family: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=f"needs {need}.*{why}"):
        EvictionCache(tiny(family), READS[need])


def test_weights_that_cannot_be_read_are_refused() -> None:
    class Quantised(nn.Linear):
        pass

    model = tiny("llama")
    model.model.layers[1].self_attn.o_proj = Quantised(32, 32)
    with pytest.raises(UnsupportedError, match="layer 1 of LlamaModel is quantised or wrapped, a Quantised"):
        EvictionCache(model, READS["output_projection"])
    model = tiny("llama")
    model.model.layers[2].self_attn.o_proj.to("meta")
    with pytest.raises(UnsupportedError, match="layer 2 of LlamaModel waits elsewhere"):
        EvictionCache(model, READS["output_projection"])
    long = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedError, match="of the kind 'dynamic', whose frequencies are not fixed"):
        EvictionCache(tiny("llama", rope_parameters=long), READS["rotary"])
