"""What transformers' own tests say of texts: the real model, its tokenizer, streamers and pipelines.

Each test has the name that it has there; ``docs/transformers-tests.md`` lists them all.
"""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM, TextIteratorStreamer, TextStreamer, pipeline

from kvpolicy import KVPolicyError, UsageError
from kvpolicy.adapters.hf import EvictionCache
from tests.hf.zoo import zoo
from tests.models import real, tokenizer

PLENTY, TIGHT = zoo(512)["vase"], zoo(24)["vase"]
TEXTS = ["A sequence: 1, 2, 3, 4, 5", "A sequence: A, B, C"]
LONG = "The tide rose, and the tide fell, and seven ships sailed north into the fog. " * 3

pytestmark = pytest.mark.model


def read(texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
    words = tokenizer()
    words.padding_side = "left"
    return dict(words(texts, return_tensors="pt", padding=True, **options))


def both(**given: Any) -> tuple[Any, Any]:
    """Generate with the stock cache, and with ours where nothing is evicted."""
    torch.manual_seed(0)
    expected = real().generate(**given)
    torch.manual_seed(0)
    with EvictionCache(real(), PLENTY) as cache:
        return expected, real().generate(**given, past_key_values=cache)


def test_cache_batched() -> None:
    expected, found = both(**read(TEXTS), do_sample=False, max_new_tokens=10)
    assert torch.equal(found, expected)


def test_cache_beam_search() -> None:
    options = {"do_sample": False, "max_new_tokens": 10, "num_beams": 2, "num_return_sequences": 2}
    expected, found = both(**read(["Blue is"]), **options, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.beam_indices, expected.beam_indices)
    assert any(len(set(beams)) > 1 for beams in found.beam_indices.tolist()), "no beam was reordered"


def test_cache_extra_left_padding() -> None:
    few, many = read(["The cat"]), read(["The cat"], pad_to_multiple_of=32)
    width = few["input_ids"].shape[1]
    assert width < many["input_ids"].shape[1]
    answers = []
    for inputs in (few, many):
        with EvictionCache(real(), TIGHT) as cache:
            out = real().generate(**inputs, do_sample=False, max_new_tokens=48, past_key_values=cache)
            assert cache.receipt().evictions[0] >= 3
            answers.append(out[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(*answers)


@pytest.mark.slow
def test_dynamic_cache_hard() -> None:
    """Long and sampled: the same tokens, and the same sum of their scores."""
    inputs = read(["Here's everything I know about cats. Cats"])
    options = {"do_sample": True, "max_new_tokens": 128, "return_dict_in_generate": True, "output_scores": True}
    expected, found = both(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    sums = []
    for out in (expected, found):
        said = out.sequences[0, inputs["input_ids"].shape[1] :]
        sums.append(sum(float(score[0, one]) for score, one in zip(out.scores, said, strict=True)))
    assert sums[1] == pytest.approx(sums[0], abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_static_cache_greedy_decoding_pad_left(implementation: str) -> None:
    model, options = real(), {"do_sample": False, "max_new_tokens": 40}
    inputs = read(["The best color is", "We should not undermind the issues at hand"])
    before, answers = model.config._attn_implementation, []
    model.set_attn_implementation(implementation)
    try:
        expected, found = both(**inputs, **options)
        assert torch.equal(found, expected)
        for static in (False, True):
            with EvictionCache(model, TIGHT, static=static) as cache:
                answers.append(model.generate(**inputs, **options, past_key_values=cache))
    finally:
        model.set_attn_implementation(before)
    assert torch.equal(*answers)


def test_cache_gptj_model() -> None:
    """GPT-J attends by code of its own, which no cache can follow: a clear error, and no wrong token."""
    config = GPTJConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    model: Any = GPTJForCausalLM(config)
    ids = torch.arange(2, 14)[None]
    with pytest.raises(KVPolicyError), EvictionCache(model, TIGHT) as cache:
        model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache)


# Streamers


def test_text_streamer_matches_non_streaming(capsys: pytest.CaptureFixture[str]) -> None:
    inputs, words, printed = read([LONG]), tokenizer(), []
    for streamer in (None, TextStreamer(words)):
        with EvictionCache(real(), TIGHT) as cache:
            out = real().generate(
                **inputs, do_sample=False, max_new_tokens=24, streamer=streamer, past_key_values=cache
            )
        printed.append(out)
    assert torch.equal(*printed)
    assert capsys.readouterr().out.removesuffix("\n") == words.decode(printed[0][0])


def test_iterator_streamer_matches_non_streaming() -> None:
    inputs, words = read([LONG]), tokenizer()
    options = {"do_sample": False, "max_new_tokens": 24}
    with EvictionCache(real(), TIGHT) as cache:
        expected = words.decode(real().generate(**inputs, **options, past_key_values=cache)[0])
        cache.reset()
        streamer = TextIteratorStreamer(words, timeout=120)
        given = {**inputs, **options, "past_key_values": cache, "streamer": streamer}
        thread = Thread(target=real().generate, kwargs=given)
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert cache.receipt().evictions[0] >= 3
    assert text == expected


# Pipelines


def pipe() -> Any:
    return pipeline("text-generation", model=real(), tokenizer=tokenizer())


OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


def test_pipeline_text_generation() -> None:
    """A text, a batch of texts, and a conversation that goes on in the same cache."""
    generate = pipe()
    with EvictionCache(real(), PLENTY) as cache:
        assert generate(LONG, **OPTIONS, past_key_values=cache) == generate(LONG, **OPTIONS)
        cache.reset()
        read(TEXTS)  # pads on the left
        batch = {**OPTIONS, "batch_size": 2}
        assert generate(TEXTS, **batch, past_key_values=cache) == generate(TEXTS, **batch)
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    with EvictionCache(real(), PLENTY) as cache:
        chat = generate(chat, **OPTIONS, past_key_values=cache)[0]["generated_text"]
        seen = cache.receipt().seen[0]
        chat.append({"role": "user", "content": "And at night?"})
        assert generate(chat, **OPTIONS, past_key_values=cache) == generate(chat, **OPTIONS)
        assert cache.receipt().seen[0] > seen


def test_pipeline_text_generation_with_evictions() -> None:
    generate, inputs = pipe(), read([LONG])
    with EvictionCache(real(), TIGHT) as cache:
        expected = tokenizer().decode(
            real().generate(**inputs, **OPTIONS, past_key_values=cache)[0], skip_special_tokens=True
        )
        cache.reset()
        assert generate(LONG, **OPTIONS, past_key_values=cache) == [{"generated_text": expected}]
        assert cache.receipt().evictions[0] >= 2


def test_texts_one_after_the_other_need_a_reset_between_them() -> None:
    """Without ``batch_size``, a pipeline gives every text of a list to the same cache."""
    generate = pipe()
    with EvictionCache(real(), PLENTY) as cache, pytest.raises(UsageError, match=r"reset\(\) the cache"):
        generate(TEXTS, **OPTIONS, past_key_values=cache)
