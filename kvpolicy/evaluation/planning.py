"""Which cells are run, and the jobs that are left of them: :func:`cells`, :func:`jobs`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvpolicy.cli.errors import CommandError
from kvpolicy.evaluation.answering import batches
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.jobs import Answering, Job, Model, Reading
from kvpolicy.evaluation.problem import Problem, Task, Text
from kvpolicy.evaluation.record import Cell
from kvpolicy.evaluation.rendering import render
from kvpolicy.evaluation.results import Results
from kvpolicy.evaluation.templates import Filled

__all__ = ["PROMPT_OF_TEXT", "Asking", "Plan", "cells", "jobs"]

PROMPT_OF_TEXT = 16  #: tokens of a text that is read which count as its prompt
TEXTS_AT_ONCE = 8  #: each is held once for every policy


@dataclass(frozen=True)
class Plan:
    """Hold what is asked of one model.

    Attributes:
        task: the problems' name.
        answered: the problems, or none where texts are read.
        read: the texts.
        cells: one for each policy, budget and seed.
    """

    task: Task
    answered: tuple[Problem, ...]
    read: tuple[Text, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Asking:
    """Say what else is the same in all cells.

    Attributes:
        seeds: of sampling and noise.
        temperature: 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that make up this share.
        limit: problems of each task, at most; None takes all.
        max_new_tokens: a smaller cap than the tasks have; None leaves theirs.
        batch: problems answered at once.
    """

    seeds: tuple[int, ...] = (0,)
    temperature: float = 0.0
    top_p: float = 1.0
    limit: int | None = None
    max_new_tokens: int | None = None
    batch: int = 16


def cells(
    model: Model, weights: str, tasks: Sequence[Task], policies: Sequence[Filled], asking: Asking, data: Path | None
) -> list[Plan]:
    """Return what is to be done, problems read from where they lie.

    Raises:
        DataError: a task's files are not there.
        CommandError: texts are read, and nothing evicts or the engine cannot.
    """
    plans = []
    for task in tasks:
        problems = list(task.problems(data))[: asking.limit]
        texts = tuple(one for one in problems if isinstance(one, Text))
        answered = tuple(_capped(one, asking) for one in problems if isinstance(one, Problem))
        wanted = [one for one in policies if one.policy is not None] if texts else list(policies)
        if texts and model.engine != "transformers":
            raise CommandError(f"{task!r} is read, which --engine {model.engine} cannot: leave --engine out")
        if texts and not wanted:
            raise CommandError(f"{task!r} is read under a policy and compared with the full cache: add --policy")
        for one in answered if model.engine != "transformers" else ():
            if one.behind or one.turns:
                raise CommandError(
                    f"{task!r} feeds its problems in parts, which --engine {model.engine} cannot: leave --engine out"
                )
        found = [
            Cell(
                model=Path(model.name).name if Path(model.name).is_dir() else model.name,
                weights=weights,
                engine=model.engine,
                dtype=model.dtype,
                task=_named(task, asking),
                policy=one.text,
                label=one.label,
                budget=one.budget,
                seed=seed,
                temperature=0.0 if texts else asking.temperature,
                top_p=1.0 if texts else asking.top_p,
            )
            for one in wanted
            for seed in asking.seeds
        ]
        plans.append(Plan(task, answered, texts, tuple(found)))
    return plans


def jobs(plan: Plan, results: Results, tokenizer: Any, asking: Asking) -> Iterator[Job]:
    """Yield what is not finished yet, the longest problems first.

    Batches are made of all problems, whatever is finished, so that a run that was killed goes on with
    the batches that it would have had.

    Raises:
        EvaluationError: a problem cannot be put into tokens, or a text is too short.
    """
    asked = [render(one, tokenizer) for one in plan.answered]
    for cell in plan.cells if plan.answered else ():
        finished = results.finished(cell)
        for number, batch in enumerate(batches(asked, asking.batch)):
            left = [i for i in batch if plan.answered[i].id not in finished]
            if left:
                yield Answering(cell, number, tuple(plan.answered[i] for i in left), tuple(asked[i] for i in left))
    if plan.read:
        yield from _readings(plan, results, tokenizer, min(asking.batch, TEXTS_AT_ONCE))


def _readings(plan: Plan, results: Results, tokenizer: Any, size: int) -> Iterator[Reading]:
    tokens = [_cut(one, tokenizer) for one in plan.read]
    # Those of one budget are due together: fed side by side, they go fastest.
    groups = dict.fromkeys((cell.budget, cell.seed) for cell in plan.cells)
    done = {cell: results.finished(cell) for cell in plan.cells}
    for number, at in enumerate(range(0, len(tokens), size)):
        ids = [one.id for one in plan.read[at : at + size]]
        for group in groups:
            left = tuple(
                c for c in plan.cells if (c.budget, c.seed) == group and not all(one in done[c] for one in ids)
            )
            if left:
                here = [i for i, one in enumerate(ids) if any(one not in done[c] for c in left)]
                yield Reading(
                    left, number, tuple(ids[i] for i in here), tuple(tokens[at + i] for i in here), PROMPT_OF_TEXT
                )


def _cut(text: Text, tokenizer: Any) -> tuple[int, ...]:
    found = tuple(tokenizer(text.text)["input_ids"])[: text.length]
    if len(found) < text.length or len(found) < 2 * PROMPT_OF_TEXT:
        raise EvaluationError(
            f"{text.id} has {len(found)} tokens with this tokenizer: {text.length} were asked for, and texts are read "
            f"from {2 * PROMPT_OF_TEXT} tokens on"
        )
    return found


def _capped(problem: Problem, asking: Asking) -> Problem:
    if asking.max_new_tokens is None:
        return problem
    return replace(problem, max_new_tokens=min(problem.max_new_tokens, asking.max_new_tokens))


def _named(task: Task, asking: Asking) -> str:
    """Return the task's text, with a cap that makes it another task."""
    return repr(task) if asking.max_new_tokens is None else f"{task!r}, max_new_tokens={asking.max_new_tokens}"
