"""What transformers' own generation tests say, said of an EvictionCache: each test has the name that it has there.

Where nothing is evicted, the stock cache gives the answer; where much is, a loop of forward passes does.
``docs/transformers-tests.md`` lists every test, and those that do not apply.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from kvpolicy import UsageError
from kvpolicy.adapters.hf import EvictionCache
from tests.hf.plain import NEW, PLENTY, PROMPT, SIX, TIGHT, both, greedy, log_probs, loop, ours, tokens
from tests.models import tiny

ALL: dict[str, Any] = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
ALL["return_dict_in_generate"] = True
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
SAMPLE: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 0.8, "max_new_tokens": NEW}
BEAMS: dict[str, Any] = {"num_beams": 3, "length_penalty": 0.0, "max_new_tokens": NEW}
DRAFTING = [family for family in SIX if family != "qwen3_next"]  # generate() drafts for no stateful model

families = pytest.mark.parametrize("family", SIX)


def same(found: Any, expected: Any, within: float = 1e-5) -> None:
    """Assert that two answers of ``generate()`` agree in all that they hold."""
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for one, other in zip(found[name], expected[name], strict=True):
            assert torch.allclose(one, other, rtol=within, atol=within), name
    for step, other_step in zip(found.hidden_states, expected.hidden_states, strict=True):
        for one, other in zip(step, other_step, strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, rtol=within, atol=within)


# Greedy decoding and sampling


@families
def test_greedy_generate(family: str) -> None:
    model, ids = tiny(family), tokens(2, PROMPT)
    expected, found = both(model, ids, **GREEDY)
    assert torch.equal(found, expected)
    assert torch.equal(ours(model, ids, **GREEDY), loop(model, ids)[0])


@families
def test_greedy_generate_dict_outputs_use_cache(family: str) -> None:
    model, ids = tiny(family), tokens(2, PROMPT)
    expected, found = both(model, ids, **GREEDY, **ALL)
    same(found, expected)
    assert isinstance(found.past_key_values, EvictionCache)
    evicting, (sequences, logits) = ours(model, ids, **GREEDY, **ALL), loop(model, ids)
    assert torch.equal(evicting.sequences, sequences)
    assert torch.allclose(torch.stack(evicting.logits, 1), logits, atol=1e-5)


def test_attentions_of_evicted_tokens_cannot_be_had() -> None:
    model, ids = tiny("llama"), tokens(2, PROMPT)
    with EvictionCache(model, PLENTY) as cache, pytest.raises(UsageError, match="no attention weights to show"):
        model.generate(ids, **GREEDY, **ALL, output_attentions=True, past_key_values=cache)


@pytest.mark.parametrize("mode", [GREEDY, BEAMS])
def test_greedy_generate_dict_outputs(mode: dict[str, Any]) -> None:
    """Without a cache there is nothing to pass: asking for both is an error, and the bound model does without."""
    model, ids = tiny("llama"), tokens(2, PROMPT)
    expected = model.generate(ids, **mode, **ALL, use_cache=False)
    with EvictionCache(model, TIGHT) as cache:
        same(model.generate(ids, **mode, **ALL, use_cache=False), expected)
        with pytest.raises(UsageError, match="leave past_key_values out"):
            model.generate(ids, **mode, use_cache=False, past_key_values=cache)


@families
def test_sample_generate(family: str) -> None:
    model, ids = tiny(family), tokens(2, PROMPT)
    expected, found = both(model, ids, **SAMPLE)
    assert torch.equal(found, expected)

    def draw(logits: torch.Tensor) -> torch.Tensor:
        return torch.multinomial((logits / SAMPLE["temperature"]).softmax(-1), 1)[:, 0]

    assert torch.equal(ours(model, ids, **SAMPLE), loop(model, ids, draw)[0])


@families
def test_sample_generate_dict_output(family: str) -> None:
    model, ids = tiny(family), tokens(2, 12)
    expected, found = both(model, ids, **SAMPLE, **ALL, num_return_sequences=3)
    same(found, expected)
    assert found.sequences.shape == (6, 12 + NEW)


def test_generate_without_input_ids() -> None:
    for family in SIX:
        expected, found = both(tiny(family), **GREEDY)
        assert torch.equal(found, expected), family


# Beams


@families
@pytest.mark.parametrize("do_sample", [False, True])
def test_beam_search_generate(family: str, do_sample: bool) -> None:
    model, ids = tiny(family), tokens(2, PROMPT)
    expected, found = both(model, ids, **BEAMS, do_sample=do_sample)
    assert torch.equal(found, expected)


@families
def test_beam_search_generate_dict_outputs_use_cache(family: str) -> None:
    model, ids = tiny(family), tokens(2, PROMPT)
    options = {**BEAMS, **ALL, "do_sample": False, "num_return_sequences": 2}
    expected, found = both(model, ids, **options)
    same(found, expected)
    assert torch.equal(found.beam_indices, expected.beam_indices)


@families
def test_beam_search_goes_on_after_evictions(family: str) -> None:
    """The score of each sequence is that of its tokens, given one at a time to a cache of their own."""
    model, ids = tiny(family, torch.float64), tokens(2, PROMPT)
    options = {**BEAMS, "do_sample": False, "num_return_sequences": 2}
    found = ours(model, ids, **options, return_dict_in_generate=True, output_scores=True)
    assert any(len(set(beams)) > 1 for beams in found.beam_indices.tolist()), "no beam was reordered"
    alone = torch.cat([log_probs(model, one[None], PROMPT) for one in found.sequences])
    assert torch.allclose(found.sequences_scores, alone.sum(1).to(found.sequences_scores), atol=1e-4)
    steps = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    assert torch.allclose(steps, alone.to(steps), atol=1e-5)


@families
def test_beam_sample_generate_dict_output(family: str) -> None:
    model, ids = tiny(family), tokens(2, 12)
    expected, found = both(model, ids, **BEAMS, **ALL, do_sample=True)
    same(found, expected)


# Drafts


@pytest.mark.parametrize("family", DRAFTING)
@pytest.mark.parametrize("assistant", ["random", "same"])
def test_assisted_decoding_matches_greedy_search(family: str, assistant: str) -> None:
    model, ids = tiny(family, torch.float64), tokens(1, PROMPT)
    torch.manual_seed(7)
    helper = model if assistant == "same" else type(model)(model.config).to(torch.float64).eval()
    helper.generation_config.num_assistant_tokens = 2
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    expected = model.generate(ids, **GREEDY, **ALL)
    _, found = both(model, ids, **GREEDY, **ALL, assistant_model=helper, drafts=2)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found.scores, expected.scores, strict=True))


@pytest.mark.parametrize("family", DRAFTING)
def test_prompt_lookup_decoding_matches_greedy_search(family: str) -> None:
    model, ids = tiny(family, torch.float64), tokens(1, 10).repeat(1, 3)
    expected = model.generate(ids, **GREEDY)
    _, found = both(model, ids, **GREEDY, prompt_lookup_num_tokens=2, drafts=2)
    assert torch.equal(found, expected)


def test_assisted_decoding_sample() -> None:
    model, ids = tiny("llama"), tokens(1, PROMPT)
    model.generation_config.num_assistant_tokens = 4
    expected, found = both(model, ids, **SAMPLE, assistant_model=model, drafts=5)
    assert torch.equal(found, expected)
    with EvictionCache(model, TIGHT, max_draft_tokens=5) as cache:
        out = model.generate(ids, **SAMPLE, assistant_model=model, past_key_values=cache)
        assert out.shape == (1, PROMPT + NEW)
        assert cache.receipt().seen[0] in (PROMPT + NEW - 1, PROMPT + NEW)
        assert cache.receipt().evictions[0] >= 3


def test_assisted_decoding_with_logits_to_keep() -> None:
    model, ids = tiny("llama", torch.float64), tokens(1, PROMPT)
    model.generation_config.num_assistant_tokens = 4
    expected = model.generate(ids, **GREEDY)
    _, found = both(model, ids, **GREEDY, assistant_model=model, logits_to_keep=0, drafts=5)
    assert torch.equal(found, expected)


def test_assisted_generation_early_exit() -> None:
    """The first layers of the bound model draft, with a cache of their own."""
    model, ids = tiny("llama", torch.float64), tokens(1, PROMPT)
    expected = model.generate(ids, **GREEDY)
    _, found = both(model, ids, **GREEDY, assistant_early_exit=2, drafts=20)
    assert torch.equal(found, expected)


# What decides over tokens


class OddAlone(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.index_fill(1, torch.arange(0, 97, 2), -torch.inf)


def test_custom_logits_processor() -> None:
    model, ids, odd = tiny("llama"), tokens(2, PROMPT), OddAlone()
    options = {**GREEDY, "logits_processor": LogitsProcessorList([odd])}
    expected, found = both(model, ids, **options)
    assert torch.equal(found, expected)
    plain, _ = loop(model, ids, lambda logits: greedy(odd(ids, logits)))
    assert torch.equal(ours(model, ids, **options), plain)
    assert bool((plain[:, PROMPT:] % 2 == 1).all())


class AfterColumns(StoppingCriteria):
    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= PROMPT + 21)


def test_custom_stopping_criteria() -> None:
    model, ids = tiny("llama"), tokens(2, PROMPT)
    stop = StoppingCriteriaList([AfterColumns()])
    assert torch.equal(ours(model, ids, **GREEDY, stopping_criteria=stop), loop(model, ids)[0][:, : PROMPT + 21])


def test_per_row_stopping_criteria() -> None:
    """A row that has stopped is padded, and changes nothing in the row that goes on."""
    model, ids = tiny("llama"), tokens(2, PROMPT)
    expected = loop(model, ids)[0]
    said, other = expected[:, PROMPT:].tolist()
    stop = next(i for i, one in enumerate(said) if one not in other)
    assert stop < NEW // 2
    expected[0, PROMPT + stop + 1 :] = model.generation_config.pad_token_id
    assert torch.equal(ours(model, ids, **GREEDY, eos_token_id=said[stop]), expected)


def test_generate_methods_with_logits_to_keep() -> None:
    for family in SIX:
        model, ids = tiny(family), tokens(2, PROMPT)
        expected, found = both(model, ids, **GREEDY, logits_to_keep=0)
        assert torch.equal(found, expected), family
        assert torch.equal(ours(model, ids, **GREEDY, logits_to_keep=0), ours(model, ids, **GREEDY)), family


def test_cfg_mixin() -> None:
    """Guidance runs the bound model on a second text, with a cache of its own."""
    model, ids = tiny("llama"), tokens(1, PROMPT)
    for other in ({}, {"negative_prompt_ids": tokens(1, 5, 3)}):
        expected, found = both(model, ids, **GREEDY, guidance_scale=1.5, **other)
        assert torch.equal(found, expected)
    alone = ours(model, ids, **GREEDY)
    assert not torch.equal(ours(model, ids, **GREEDY, guidance_scale=3.0), alone)
    assert torch.equal(ours(model, ids, **GREEDY), alone)


@pytest.mark.parametrize(
    "mode",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"num_beams": 4, "force_words_ids": [[5]]},
    ],
)
def test_modes_that_live_on_the_hub(mode: dict[str, Any]) -> None:
    """Contrastive search, DoLa, beams in groups and under constraints are code of others now, not of ``generate()``."""
    model = tiny("llama")
    with EvictionCache(model, TIGHT) as cache, pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(tokens(1, PROMPT), **GREEDY, **mode, past_key_values=cache)
