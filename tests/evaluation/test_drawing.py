"""How tokens are drawn, and what is measured on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.evaluation import answering
from kvpolicy.evaluation.answering import Drawing, TransformersEngine
from tests.evaluation.models import asked, loaded
from tests.evaluation.test_answering import POLICIES, answers, engine, same

# --- sampling


def test_a_sample_depends_on_the_seed_and_the_name_alone() -> None:
    drawing = Drawing(temperature=1.0, seed=3)
    some = [asked(20), asked(31, seed=1), asked(20)]
    names = [7, 8, 9]
    for policy in (POLICIES["vase"], None):
        found = answers(some, policy, drawing, names)
        assert found == answers(some, policy, drawing, names)
        again = answers(some[::-1], policy, drawing, names[::-1])[::-1]
        same(again, found)
        for one, name, expected in zip(some, names, found, strict=True):
            same(answers([one], policy, drawing, [name]), [expected])
        assert found[0].tokens != found[2].tokens  # the same prompt under another name
        other = answers(some, policy, replace(drawing, seed=4), names)
        assert all(one.tokens != two.tokens for one, two in zip(found, other, strict=True))


def test_names_and_seeds_are_told_apart_up_to_their_largest() -> None:
    states = {
        torch.rand(1, generator=answering._generator(Drawing(seed=seed), name)).item()
        for seed in (0, 1, 2**31 - 1)
        for name in (0, 1, 2**32 - 1)
    }
    assert len(states) == 9


def pick(logits: list[float], drawing: Drawing, times: int = 300) -> dict[int, int]:
    """Return how often each token is drawn."""
    row = answering._Row(1, torch.Generator().manual_seed(0))
    drawn = [answering._pick(torch.tensor([logits]), [row], drawing)[0] for _ in range(times)]
    return {token: drawn.count(token) for token in sorted(set(drawn))}


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().tolist()
    assert set(pick(logits, Drawing(1.0))) == {0, 1, 2, 3}
    counts = pick(logits, Drawing(1.0), 2000)
    for token, share in enumerate([0.1, 0.4, 0.3, 0.2]):
        assert counts[token] / 2000 == pytest.approx(share, abs=0.05)
    cold = pick(logits, Drawing(0.5), 2000)  # squares of the probabilities: 1, 16, 9, 4 of 30
    assert cold[1] / 2000 == pytest.approx(16 / 30, abs=0.05)
    assert pick(logits, Drawing(0.0)) == {1: 300}


@pytest.mark.parametrize(
    ("top_p", "tokens"), [(1.0, {0, 1, 2, 3}), (0.95, {0, 1, 2, 3}), (0.85, {1, 2, 3}), (0.5, {1, 2}), (0.3, {1})]
)
def test_top_p_keeps_the_fewest_that_make_up_the_share(top_p: float, tokens: set[int]) -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().tolist()
    assert set(pick(logits, Drawing(1.0, top_p))) == tokens


# --- what is measured


def test_compression_is_counted_by_hand() -> None:
    one, new = asked(40, new=30), 30
    held, shares = 24, [1.0]  # the first token is chosen by one that saw all of the prompt
    for token in range(1, new):  # the others when so many tokens more have been fed, before something is evicted
        shares.append((held + 1) / (40 + token))
        held = 24 if token % 8 == 0 else held + 1
    (found,) = answers([one], POLICIES["vase"])
    assert found.compression == pytest.approx(sum(shares) / new, abs=1e-12)
    assert found.evictions == 1 + 3
    (whole,) = answers([one], None)
    assert (whole.compression, whole.evictions) == (1.0, 0)


def test_bytes_of_the_full_cache_are_those_of_the_rows_own_tokens() -> None:
    a_token = 3 * 2 * 2 * 8 * 8  # layers, KV heads, keys and values, width, float64
    alone = [answers([one], None)[0].peak_nbytes for one in (asked(40, new=10), asked(9, new=10))]
    assert alone == [49 * a_token, 18 * a_token]  # the last token is never fed
    assert [one.peak_nbytes for one in answers([asked(40, new=10), asked(9, new=10)], None)] == alone


def test_bytes_of_an_evicting_cache_are_a_rows_share_of_its_receipt() -> None:
    (found,) = answers([asked(40)], POLICIES["vase"])
    with EvictionCache(engine().model, POLICIES["vase"], max_new_tokens=24) as cache:
        engine().model.generate(
            torch.tensor(asked(40).pieces), past_key_values=cache, max_new_tokens=24, do_sample=False
        )
        assert found.peak_nbytes == cache.receipt().peak_nbytes
    both = answers([asked(40), asked(40, seed=1)], POLICIES["vase"])
    assert [one.peak_nbytes for one in both] == [found.peak_nbytes] * 2


def test_bytes_do_not_depend_on_rows_that_have_been_dropped() -> None:
    rows = [asked(40, new=2), asked(40, new=2, seed=1), asked(40, new=2, seed=2), asked(40, seed=3)]
    (alone,) = answers(rows[3:], POLICIES["vase"])
    assert [one.peak_nbytes for one in answers(rows, POLICIES["vase"])] == [alone.peak_nbytes] * 4


def test_a_model_ends_where_it_or_its_tokenizer_says() -> None:
    made = loaded()
    assert TransformersEngine(made).ends == {made.tokenizer.eos_token_id}
    made.model.generation_config.eos_token_id = [5, 6]
    assert TransformersEngine(made).ends == {5, 6, made.tokenizer.eos_token_id}
