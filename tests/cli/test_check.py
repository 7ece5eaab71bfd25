"""`kvpolicy check` and `kvpolicy list --check`: what each check says, and the exit code."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from hypothesis import settings

from kvpolicy import KeyNorm, Policy, TopK, policies
from kvpolicy.testing import CHECKS, Outcome, outcomes
from kvpolicy.testing import outcome as module
from tests.cli.tools import Command, Install
from tests.testing import broken


def holed(budget: int) -> broken.DropsRecent:
    return broken.DropsRecent()


def uncopied(budget: int) -> broken.NotCopied:
    return broken.NotCopied()


uncopied.expected_failures = {"check_copies": "it holds a function"}  # type: ignore[attr-defined]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few checks: what they find is tested elsewhere."""
    names = ("check_plan", "check_recent", "check_guards", "check_copies")
    monkeypatch.setattr(module, "CHECKS", {name: CHECKS[name] for name in names})


@pytest.fixture
def installed(install: Install) -> None:
    """Recipes as other packages declare them, and one that comes with kvpolicy."""
    install(holed=holed, uncopied=uncopied, lost="no_such_module:lost", knorm=policies.knorm)


def lines(out: str) -> dict[str, str]:
    """What is said of each check, by its name."""
    split = (line.split(maxsplit=2) for line in out.splitlines())
    return {name: " ".join([result, *said]) for result, name, *said in split}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("asked", ["knorm(64, recent=8)", "KeyNorm", "Sinks(4)", "Pyramid(12, 2)"])
def test_what_is_right_passes(kvpolicy: Command, asked: str) -> None:
    result = kvpolicy("check", asked, "--examples", 1)
    assert result.code == 0, result.out
    assert lines(result.out) == dict.fromkeys(("check_plan", "check_recent", "check_guards", "check_copies"), "passed")
    assert "4 of 4 passed; 1 example each" in result.err


def test_every_check_has_a_line(kvpolicy: Command) -> None:
    result = kvpolicy("check", "Policy(KeyNorm() >> TopK(8), interval=4, recent=2)", "--examples", 1)
    assert result.code == 0, result.out
    assert list(lines(result.out)) == list(CHECKS)


@pytest.mark.usefixtures("few", "installed")
def test_what_is_wrong_fails_with_the_reason(kvpolicy: Command) -> None:
    result = kvpolicy("check", "holed", "--examples", 3)
    assert result.code == 1
    said = lines(result.out)
    assert said["check_plan"] == "passed"
    assert said["check_recent"].startswith("failed check_recent(")
    assert "failed: recent" in result.err


@pytest.mark.usefixtures("few", "installed")
def test_what_a_package_declares_must_fail_and_is_no_failure(kvpolicy: Command) -> None:
    result = kvpolicy("check", "uncopied", "--examples", 1)
    assert result.code == 0
    assert lines(result.out)["check_copies"] == "declared it holds a function"
    assert "3 of 4 passed; declared: copies" in result.err


@pytest.mark.usefixtures("few")
def test_an_expectation_must_come_true(kvpolicy: Command) -> None:
    result = kvpolicy("check", "knorm", "--examples", 1, "--expect", "check_plan=it has none")
    assert result.code == 1
    assert lines(result.out)["check_plan"] == "failed was expected to fail (it has none), and passes"


@pytest.mark.usefixtures("few", "installed")
def test_the_list_with_checks(kvpolicy: Command) -> None:
    result = kvpolicy("list", "--check", "--examples", 2)
    assert result.code == 1
    rows = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    assert "4 of 4 passed" in rows["knorm"]
    assert "3 of 4 passed; declared: copies" in rows["uncopied"]
    assert "failed: recent" in rows["holed"]
    assert "broken" in rows["lost"]
    assert "checking knorm ..." in result.err
    found = {
        one["name"]: one for one in json.loads(kvpolicy("list", "--check", "--examples", 2, "--json").out)["policies"]
    }
    assert found["knorm"]["checks"]["check_plan"] == {"result": "passed", "reason": ""}
    assert found["holed"]["checks"]["check_recent"]["result"] == "failed"
    assert found["lost"]["checks"] == {}
    markdown = kvpolicy("list", "--check", "--examples", 1, "--markdown").out
    assert markdown.startswith("| name | paper | phase | needs | checks | from |")


@pytest.mark.usefixtures("few")
def test_a_list_that_passes_is_no_failure(kvpolicy: Command, install: Install) -> None:
    install(knorm=policies.knorm)
    assert kvpolicy("list", "--check", "--examples", 1).code == 0
    result = kvpolicy("list")
    assert "checks" not in result.out
    assert "kvpolicy list --check" in result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["Sinks"], "kvpolicy check 'Sinks(4)'"),
        (["vasw"], "did you mean 'vase'?"),
        (["7"], "neither a policy nor a stage but 7"),
        (["knorm", "--examples", 0], "--examples 0: it is at least 1"),
        (["knorm", "--expect", "check_plan"], "write the check and the reason"),
        (["knorm", "--expect", "check_nothing=why"], "'check_nothing' is no check"),
        (["vase(32)"], "a budget of 32 is not larger than recent=64"),
        (["duo_attention(2048, ((True, False), (False, False)))"], "names 2 layers, and the model has 3"),
        (["vase(64, sahre=1)"], "did you mean 'share'?"),
    ],
)
def test_bad_options(kvpolicy: Command, arguments: list[Any], said: str) -> None:
    result = kvpolicy("check", *arguments)
    assert result.code == 2
    assert said in result.error
    assert not result.out


def test_a_recipe_that_needs_more_than_a_budget(kvpolicy: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def deep(budget: int, depth: int) -> Policy:
        raise NotImplementedError

    monkeypatch.setattr(EntryPoint, "load", lambda self: deep)
    result = kvpolicy("check", "knorm")
    assert result.code == 2
    assert "cannot be built with a budget alone" in result.error


@pytest.mark.parametrize("missing", ["hypothesis", "pytest"])
@pytest.mark.parametrize("arguments", [["check", "knorm"], ["check", "KeyNorm"], ["list", "--check"]])
def test_what_is_not_installed_is_named(
    kvpolicy: Command, monkeypatch: pytest.MonkeyPatch, missing: str, arguments: list[str]
) -> None:
    for name in [
        name for name in sys.modules if name.partition(".")[0] == missing or name.startswith("kvpolicy.testing")
    ]:
        monkeypatch.delitem(sys.modules, name)
    right: Callable[..., Any] = builtins.__import__

    def absent(name: str, *more: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return right(name, *more)

    monkeypatch.delattr("kvpolicy.testing")
    monkeypatch.setattr(builtins, "__import__", absent)
    result = kvpolicy(*arguments)
    monkeypatch.setattr(builtins, "__import__", right)
    assert result.code == 1
    assert f"checks need {missing}, which is not installed: pip install 'kvpolicy[testing]'" in result.error


# The functions behind it


@pytest.mark.usefixtures("few")
def test_outcomes_of_several_policies_fail_where_one_does() -> None:
    good = Policy(KeyNorm() >> TopK(8), interval=4, recent=2)
    with module.examples(2):
        found = list(outcomes([good, broken.DropsRecent()]))
        assert [one.result for one in found].count("failed") == 1
        assert all(one.good for one in outcomes(good))
    assert Outcome("check_plan", "declared", "why").good


def test_examples_are_those_asked_for_and_given_back() -> None:
    before = settings.get_current_profile_name()
    with module.examples(3):
        assert settings().max_examples == 3
        assert settings().derandomize
        assert settings().database is None
    assert settings.get_current_profile_name() == before
