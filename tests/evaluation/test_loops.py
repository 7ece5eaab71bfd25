"""Whether an output ended in a loop."""

from __future__ import annotations

from string import ascii_letters

import pytest

from kvpolicy.evaluation.loops import REPETITIVE, ending, is_repetitive, zip_ratio

ORDINARY = (
    "Janet's ducks lay 16 eggs a day. She eats 3 and bakes with 4, which leaves 16 - 3 - 4 = 9 eggs. "
    "At 2 dollars each she makes 9 * 2 = 18 dollars a day.\nThe answer is \\boxed{18}."
)
PHRASE = "wait, let me look again. "  # 25 characters


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (ORDINARY, "fine"),
        ("", "fine"),
        (ORDINARY + PHRASE * 5, "phrase loop"),
        (ORDINARY + PHRASE * 4, "fine"),  # four times are no loop
        (PHRASE * 5 + ORDINARY * 4, "fine"),  # more than 500 characters ago
        (ORDINARY + "abcdefghi" * 9, "fine"),  # nine characters are too few, and twice nine stand four times
        (ORDINARY + "abcdefghi" * 10, "phrase loop"),
        (ORDINARY + ascii_letters[:40] * 5, "phrase loop"),
        (ORDINARY + ascii_letters[:41] * 5, "fine"),
        (ORDINARY + "Let me look again.\n" * 9, "fine"),  # a phrase stands on one line
        (ORDINARY + "你" * 31, "garbage"),
        (ORDINARY + "你" * 30, "fine"),
        (ORDINARY + "0" * 101 + "ab" * 49 + "c", "garbage"),
        (ORDINARY + "0" * 100 + "ab" * 50, "phrase loop"),
    ],
)
def test_an_output_ends_as_the_rules_say(output: str, found: str) -> None:
    assert ending(output) == found


def test_only_a_model_that_thinks_is_truncated() -> None:
    assert ending(ORDINARY, thinks=True) == "truncated"
    assert ending(f"<think>{ORDINARY}</think> 18", thinks=True) == "fine"
    assert ending(ORDINARY + PHRASE * 9, thinks=True) == "phrase loop"  # looked for first


def test_compression_sees_long_and_uneven_loops_and_no_ordinary_text() -> None:
    assert zip_ratio("") == 0
    assert not is_repetitive(ORDINARY)
    assert is_repetitive(PHRASE * 40)
    assert is_repetitive(ORDINARY * 6)  # 190 characters: beyond the phrases
    counted = "".join(f"Step {number}: so we try the next number.\n" for number in range(40))
    assert ending(counted) == "fine"
    assert is_repetitive(counted)
    assert zip_ratio(PHRASE * 400) == zip_ratio(PHRASE * 40) > REPETITIVE  # the end alone counts
