"""Problems as tokens."""

from __future__ import annotations

from typing import Any

import pytest

from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.problem import Message, Problem
from kvpolicy.evaluation.rendering import Asked, render
from kvpolicy.evaluation.tasks import RECALL, passcode, turns
from tests.cli.tools import TEMPLATE, byte_tokenizer


def problem(*texts: str, **options: Any) -> Problem:
    """Return a conversation, user and assistant in turn."""
    messages = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
    return Problem("p", messages, ("42",), 5, **options)


def said(asked: Asked, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(piece) for piece in asked.pieces]


def test_a_chat_template_is_used_where_there_is_one() -> None:
    chat, bare = byte_tokenizer(TEMPLATE), byte_tokenizer(None)
    assert said(render(problem("a", "b", "c"), chat), chat) == ["<user>a\n<assistant>b\n<user>c\n<assistant>"]
    assert said(render(problem("a", "b", "c"), bare), bare) == ["a\n\nb\n\nc"]
    asked = render(problem("abc"), bare)
    assert (asked.behind, asked.max_new_tokens) == ((), 5)
    assert (asked.shape, asked.length) == ((3, 0), 3)


def test_what_a_template_refuses_is_an_error_that_names_the_problem() -> None:
    tokenizer = byte_tokenizer("{{ raise_exception('no such role\nhere') }}")
    with pytest.raises(EvaluationError, match=r"the chat template of this model refuses p: .*no such role") as caught:
        render(problem("a"), tokenizer)
    assert "\n" not in str(caught.value)


def test_turns_are_the_whole_conversation_in_pieces() -> None:
    tokenizer = byte_tokenizer(TEMPLATE)
    conversation = problem("a", "b", "c", "d", "e", turns=True)
    assert said(render(conversation, tokenizer), tokenizer) == [
        "<user>a\n<assistant>b\n",
        "<user>c\n<assistant>d\n",
        "<user>e\n<assistant>",
    ]
    for some in turns(rounds=5, length=60, count=3).problems(None):
        asked = render(some, tokenizer)
        whole = render(Problem(some.id, some.messages, some.answers, some.max_new_tokens), tokenizer)
        assert len(asked.pieces) == 5
        assert (sum(asked.pieces, ()),) == whole.pieces
        assert asked.length == whole.length


def test_turns_that_a_template_rewrites_are_refused() -> None:
    rewriting = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(EvaluationError, match=r"rewrites earlier turns.* p cannot be fed a turn at a time"):
        render(problem("a", "b", "c", turns=True), byte_tokenizer(rewriting))
    assert len(render(problem("a", turns=True), byte_tokenizer(rewriting)).pieces) == 1


def test_text_behind_is_cut_from_the_front_to_one_length() -> None:
    tokenizer = byte_tokenizer(None)
    whole = render(problem("a", behind="x is 42."), tokenizer)
    assert tokenizer.decode(whole.behind) == "x is 42."
    assert (whole.shape, whole.length) == ((1, 8), 9)
    assert tokenizer.decode(render(problem("a", behind="x is 42.", behind_tokens=3), tokenizer).behind) == "42."
    assert render(problem("a", behind="x is 42.", behind_tokens=8), tokenizer) == whole


def test_text_behind_that_is_too_short_or_has_lost_the_fact_is_refused() -> None:
    tokenizer = byte_tokenizer(None)
    with pytest.raises(EvaluationError, match="p has 8 tokens, fewer than 9, with this tokenizer"):
        render(problem("a", behind="x is 42.", behind_tokens=9), tokenizer)
    with pytest.raises(EvaluationError, match="p: the fact is not in the last 2 tokens"):
        render(problem("a", behind="x is 42.", behind_tokens=2), tokenizer)


def test_text_behind_gets_no_special_tokens() -> None:
    tokenizer = byte_tokenizer(TEMPLATE)

    class Marking:
        """Put an end before every text, unless it is told not to."""

        chat_template = None
        decode = tokenizer.decode

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + tokenizer(text)["input_ids"]}

    asked = render(problem("a", behind="42"), Marking())
    assert asked.pieces[0][0] == 1
    assert tokenizer.decode(asked.behind) == "42"


def test_all_passcodes_have_one_shape_and_begin_the_answer() -> None:
    class Words:
        """Have a token for a word: what is close to a real tokenizer."""

        chat_template = None
        words: dict[str, int]

        def __init__(self) -> None:
            self.words = {}

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [self.words.setdefault(word, len(self.words)) for word in text.split(" ")]}

        def decode(self, tokens: Any) -> str:
            return " ".join(list(self.words)[token] for token in tokens)

    tokenizer = Words()
    asked = [render(one, tokenizer) for one in passcode(length=500, count=8).problems(None)]
    assert len({one.shape for one in asked}) == 1
    assert asked[0].shape[1] == 500
    assert all(tokenizer.decode(one.behind).endswith(" is") for one in asked)


@pytest.mark.parametrize("make", RECALL)
def test_rendering_is_always_the_same(make: Any) -> None:
    # A byte is a token here, and a hundred of them hold a fact at the very end alone.
    options = {"length": 96, "count": 2} | ({"depth": 1} if make is passcode else {})
    tokenizer = byte_tokenizer(TEMPLATE)
    once, again = ([render(one, tokenizer) for one in make(**options).problems(None)] for _ in range(2))
    assert once == again
    assert len(once) == 2
