"""Another interval, or other recent tokens, for the policy of a text: what a recipe derives from them follows."""

from __future__ import annotations

import pytest

from kvpolicy import ParseError, Policy
from kvpolicy.adapters.vllm.config import Config
from kvpolicy.cli.generate import chosen_policy
from kvpolicy.grammar import parse_with
from kvpolicy.policies import lazy_eviction, raas, snapkv


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ("lazy_eviction(1024)", {"interval": 16}, lazy_eviction(1024, interval=16)),
        ("lazy_eviction(1024, recent=9)", {"interval": 16}, lazy_eviction(1024, interval=16, recent=9)),
        ("raas(1024)", {"interval": 128, "recent": 32}, raas(1024, interval=128, recent=32)),
        ("snapkv(256, window=8)", {"interval": 4, "recent": 9}, "Policy({chain}, interval=4, recent=9)"),
        ("Policy(KeyNorm() >> TopK(32), recent=5)", {"interval": None}, "Policy({chain}, interval=None, recent=5)"),
        ("KeyNorm() >> TopK(32)", {"recent": 5}, "Policy({chain}, recent=5)"),
        ("TopK(32)", {"interval": 5}, "Policy({chain}, interval=5)"),
        ("snapkv(256)", {}, snapkv(256)),
    ],
)
def test_what_follows_from_a_change(text: str, changes: dict[str, int | None], expected: Policy | str) -> None:
    if isinstance(expected, str):
        expected = Policy.parse(expected.format(chain=Policy.parse(text).chain.text(full=True)))
    assert parse_with(text, **changes) == expected


def test_a_text_that_is_none_is_refused_as_it_is_written() -> None:
    with pytest.raises(ParseError, match="has no selector"):
        parse_with("KeyNorm()", interval=4)


def test_options_of_programs_follow_recipes() -> None:
    assert chosen_policy("lazy_eviction(1024)", "16", None) == lazy_eviction(1024, interval=16)
    assert chosen_policy("lazy_eviction(1024)", None, None) == lazy_eviction(1024)
    assert Config("raas(1024)", interval=128).default[0] == raas(1024, interval=128)
