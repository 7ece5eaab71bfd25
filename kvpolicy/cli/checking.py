"""``kvpolicy check``: every check of ``kvpolicy.testing`` on one policy or stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli import console
from kvpolicy.cli.errors import CommandError
from kvpolicy.errors import RunError, one_line

if TYPE_CHECKING:
    from kvpolicy.policy import EvictionPolicy
    from kvpolicy.registry import Registered
    from kvpolicy.testing import Outcome

__all__ = ["EXAMPLES", "EXAMPLES_HELP", "check", "in_words", "of_recipe"]

EXAMPLES = 10
EXAMPLES_HELP = "Views that each check draws, the same each time; more of them find what is rare."
Checked = Sequence["EvictionPolicy"]
STYLES = {"passed": "green", "failed": "bold red", "declared": "yellow"}


def check(
    policy: Annotated[
        str,
        typer.Argument(
            metavar="POLICY|NAME", help="A policy, a stage such as 'Sinks(4)', or a name that kvpolicy list knows."
        ),
    ],
    *,
    examples: Annotated[int, typer.Option(metavar="N", help=EXAMPLES_HELP)] = EXAMPLES,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="CHECK=REASON", help="A check that cannot hold, and why: it must fail. Repeat it."),
    ] = None,
) -> None:
    """Check that a policy or a stage keeps every invariant that engines rely on.

    A recipe's name is checked with a budget of 1024; a stage inside small policies. A line a check: passed, failed
    and why, or declared: it cannot hold, which its package or --expect says, and does not. Needs kvpolicy[testing].
    """
    checked, declared = _asked(policy.strip())
    declared |= _expected(expect or [])
    if "check_plan" not in declared:
        _plan(checked)
    found = []
    for one in _run(checked, declared, examples):
        found.append(one)
        console.stdout().print(
            f"[{STYLES[one.result]}]{one.result:<8}[/]  {one.check}", highlight=False, end="", soft_wrap=True
        )
        console.stdout().print(f"  {one_line(one.reason)}" if one.reason else "", markup=False, soft_wrap=True)
    failed = sum(one.result == "failed" for one in found)
    each = "1 example" if examples == 1 else f"{examples} examples"
    console.note(f"{in_words(found)}; {each} each", style="dim")
    if failed:
        raise typer.Exit(1)


def _plan(checked: Checked) -> None:
    """Plan each policy once as the checks do, so that a budget that cannot be is said once, and not by each of them."""
    from kvpolicy.errors import BudgetError
    from kvpolicy.policy import ModelSpec

    for policy in checked:
        try:
            policy.plan(ModelSpec(num_layers=3, max_new_tokens=8))
        except BudgetError as error:
            raise CommandError(f"{one_line(error)} (checks plan for a model of 3 layers)") from error
        except Exception:  # check_plan says it
            continue


def of_recipe(entry: Registered, examples: int) -> list[Outcome]:
    """Return what each check finds of a recipe, built with a budget alone, and with what it declares."""
    checked, declared = _recipe(entry)
    return list(_run(checked, declared, examples))


def in_words(found: Sequence[Outcome]) -> str:
    """Return how many checks passed, and which did not."""
    words = [f"{sum(one.result == 'passed' for one in found)} of {len(found)} passed"]
    for result in ("declared", "failed"):
        names = [one.check.removeprefix("check_") for one in found if one.result == result]
        words += [f"{result}: {', '.join(names)}"] if names else []
    return "; ".join(words)


def _run(checked: Checked, declared: Mapping[str, str], examples: int) -> Iterator[Outcome]:
    if examples < 1:
        raise CommandError(f"--examples {examples}: it is at least 1")
    with _testing():
        from kvpolicy import testing
    try:
        with testing.examples(examples):
            yield from testing.outcomes(checked, expected_failures=declared)
    except ValueError as error:  # what is declared is no check, or has no reason
        raise CommandError(one_line(error)) from error


@contextlib.contextmanager
def _testing() -> Generator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise RunError(f"checks need {error.name}, which is not installed: pip install 'kvpolicy[testing]'") from error


def _asked(text: str) -> tuple[Checked, dict[str, str]]:
    """Return the policies to check, all of which must pass, and the failures that are declared."""
    from kvpolicy import registry
    from kvpolicy.allocators import Allocator
    from kvpolicy.grammar import parse_any
    from kvpolicy.selectors import TopK
    from kvpolicy.stage import Stage

    name = text.removesuffix("()")
    if name in registry.policies():
        return _recipe(registry.policies()[name])
    found = _default(registry.stages()[name]) if name in registry.stages() else parse_any(text)
    declared = dict(getattr(found, "expected_failures", {}))
    if isinstance(found, Allocator):
        found = TopK(found)
    if not isinstance(found, Stage):
        return [found], declared
    with _testing():
        from kvpolicy.testing.checks import policies_around
    return policies_around(found), declared


def _recipe(entry: Registered) -> tuple[Checked, dict[str, str]]:
    from kvpolicy import catalog

    recipe = entry.load()
    policy = catalog.built(recipe)
    return [policy], {**getattr(policy, "expected_failures", {}), **getattr(recipe, "expected_failures", {})}


def _default(entry: Registered) -> Any:
    """Return a stage with its defaults."""
    make: Callable[..., Any] = entry.load()
    try:
        return make()
    except TypeError as error:
        raise CommandError(
            f"{entry.name} needs arguments ({one_line(error)}): write them, such as kvpolicy check '{entry.name}(4)'"
        ) from error


def _expected(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for one in given:
        name, sign, reason = one.partition("=")
        if not sign or not reason.strip():
            raise CommandError(f"--expect {one!r}: write the check and the reason, as in --expect 'check_text=why'")
        found[name.strip()] = reason.strip()
    return found
