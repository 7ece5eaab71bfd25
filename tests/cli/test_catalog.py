"""`kvpolicy show`, and how docstrings are read."""

from __future__ import annotations

from typing import Literal

import pytest

from kvpolicy import docstrings, registry
from tests.cli.tools import Command

NAMES = [*registry.policies(), *registry.stages()]


def documented(budget: int, mode: Literal["a", "b"] = "a", *rest: int, window: int = 4) -> None:
    """Return nothing at all: a function
    with two lines. And a second sentence.

    More about ``budget``.

    Args:
        budget: slots
            for each head.
        mode (str): one of ``"a"`` and ``"b"``.

    Source: Somebody (arXiv 2606.03928), and https://example.org/page.
    """


@pytest.mark.parametrize("name", NAMES)
def test_show_knows_everything_that_is_listed(kvpolicy: Command, name: str) -> None:
    result = kvpolicy("show", name)
    assert result.code == 0, result.err
    assert result.out.startswith(name)
    assert "``" not in result.out


def test_show_a_policy(kvpolicy: Command) -> None:
    out = kvpolicy("show", "vase").out
    assert "vase  policy, from kvpolicy" in out
    assert "vase(budget=1024) is\n    Policy(ValueGuard() >> Stochastic() >> TopK(1024))" in out
    assert "(required)" in out
    assert "temperature of the sample." in out
    assert out.rstrip().endswith("https://arxiv.org/abs/2606.03928")


def test_show_a_stage(kvpolicy: Command) -> None:
    out = kvpolicy("show", "ValueGuard()").out
    assert "share" in out
    assert "0.25" in out
    assert "Literal['range'" in out
    assert "https://arxiv.org/abs/2606.03928" in out


@pytest.mark.parametrize(("typed", "meant"), [("vasw", "vase"), ("valueguard", "ValueGuard"), ("SNAPKV", "snapkv")])
def test_show_an_unknown_name(kvpolicy: Command, typed: str, meant: str) -> None:
    result = kvpolicy("show", typed)
    assert result.code == 2
    assert meant in result.error


def test_show_something_like_nothing(kvpolicy: Command) -> None:
    result = kvpolicy("show", "qqqqqq")
    assert result.code == 2
    assert "near it" not in result.error
    assert "kvpolicy list" in result.error


def test_docstrings_are_read() -> None:
    assert docstrings.summary(documented) == "Nothing at all: a function with two lines."
    assert docstrings.links(documented.__doc__ or "") == [
        "https://arxiv.org/abs/2606.03928",
        "https://example.org/page",
    ]
    assert docstrings.links("arXiv 2606.03928 and 2609.03430, section 2; arXiv: 2404.14469") == [
        f"https://arxiv.org/abs/{number}" for number in ("2606.03928", "2609.03430", "2404.14469")
    ]
    assert docstrings.source(documented) == "Somebody (arXiv 2606.03928), and https://example.org/page."
    text = docstrings.prose(documented)
    assert "Args" not in text
    assert "for each head" not in text
    assert "More about budget." in text
    assert "Source" in text
    assert docstrings.parameters(documented) == [
        docstrings.Parameter("budget", "int", "", "slots for each head."),
        docstrings.Parameter("mode", "Literal['a', 'b']", "'a'", 'one of "a" and "b".'),
        docstrings.Parameter("*rest", "int", "", ""),
        docstrings.Parameter("window", "int", "4", ""),
    ]


def test_nothing_is_said_of_what_has_no_docstring() -> None:
    nothing = lambda: None  # noqa: E731
    assert docstrings.summary(nothing) == docstrings.prose(nothing) == docstrings.source(nothing) == ""
    assert docstrings.parameters(nothing) == []
