"""Which cells are run, and the jobs that are left of them: :func:`cells`, :func:`jobs`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvpolicy.errors import IncompleteWarning
from kvpolicy.evaluation.answering import batches
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.jobs import Answering, Job, Model, Reading
from kvpolicy.evaluation.problem import Problem, Task, Text
from kvpolicy.evaluation.record import FULL, Cell, Record
from kvpolicy.evaluation.rendering import digest, render
from kvpolicy.evaluation.results import Results
from kvpolicy.evaluation.tasks.texts import own
from kvpolicy.evaluation.templates import Filled

__all__ = ["PROMPT_OF_TEXT", "Asking", "Plan", "asked_of", "cells", "jobs", "later_jobs"]

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
        first: the cells of the full cache whose answers are read, one for each seed; else none.
    """

    task: Task
    answered: tuple[Problem, ...]
    read: tuple[Text, ...]
    cells: tuple[Cell, ...]
    first: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Asking:
    """Say what else is the same in all cells.

    Attributes:
        seeds: of sampling and noise.
        temperature: 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that make up this share.
        limit: problems of each task, at most; None takes all.
        max_new_tokens: a cap on answers in place of the tasks'; None leaves theirs.
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
        EvaluationError: texts are read, and nothing evicts or the engine cannot.
    """
    plans = []
    for task in dict.fromkeys(tasks):
        problems = list(task.problems(data))[: asking.limit]
        read = tuple(one for one in problems if isinstance(one, Text))
        answered = tuple(_capped(one, asking) for one in problems if isinstance(one, Problem))
        is_read = bool(read) or isinstance(task, own)
        _insist(task, model, answered, policies, is_read=is_read)
        full = Cell(
            model=Path(model.name).name if Path(model.name).is_dir() else model.name,
            weights=weights,
            engine=model.engine,
            dtype=model.dtype,
            task=repr(task),
            policy=FULL,
            label=FULL,
            budget=0,
            seed=asking.seeds[0],
            temperature=0.0 if read else asking.temperature,
            top_p=1.0 if read else asking.top_p,
            max_new_tokens=0 if read else asking.max_new_tokens or 0,
        )
        found = tuple(
            replace(full, policy=one.text, label=one.label, budget=one.budget, seed=seed)
            for one in policies
            if not (is_read and one.policy is None)
            for seed in dict.fromkeys(asking.seeds)
        )
        first: tuple[Cell, ...] = ()
        if isinstance(task, own):
            first = tuple(replace(full, task=repr(task.task), seed=seed) for seed in dict.fromkeys(asking.seeds))
        plans.append(Plan(task, answered, read, found, first))
    return plans


def _insist(
    task: Task, model: Model, answered: Sequence[Problem], policies: Sequence[Filled], *, is_read: bool
) -> None:
    """Refuse what the engine cannot do, and texts that nothing would evict from."""
    if is_read and model.engine != "transformers":
        raise EvaluationError(f"{task!r} is read, which `engine` {model.engine} cannot: leave `engine` out")
    if is_read and all(one.policy is None for one in policies):
        raise EvaluationError(f"{task!r} is read under a policy and compared with the full cache: add `policies`")
    if model.engine != "transformers" and any(one.behind or one.turns for one in answered):
        raise EvaluationError(
            f"{task!r} feeds its problems in parts, which `engine` {model.engine} cannot: leave `engine` out"
        )


def asked_of(plans: Sequence[Plan]) -> int:
    """Return how many problems and texts :func:`jobs` gives where nothing is finished."""
    return len(
        {(cell, one.id) for plan in plans for cell in plan.first or plan.cells for one in plan.answered or plan.read}
    )


def jobs(plans: Sequence[Plan], results: Results, tokenizer: Any, asking: Asking) -> Iterator[Job]:
    """Yield what is not finished yet, the longest problems of each cell first.

    Batches are made of all problems, whatever is finished, so that a run that was killed goes on with
    the batches that it would have had.

    Raises:
        EvaluationError: a problem cannot be put into tokens, or a text is too short.
    """
    answered: set[Cell] = set()
    for plan in plans:
        if plan.answered:
            of = [cell for cell in plan.first or plan.cells if cell not in answered]
            yield from _answerings(plan, of, results, tokenizer, asking)
            answered.update(of)
        if plan.read:
            texts = [_cut(one, tokenizer) for one in plan.read]
            yield from _readings(plan, results, texts, min(asking.batch, TEXTS_AT_ONCE))


def _answerings(
    plan: Plan, of: Sequence[Cell], results: Results, tokenizer: Any, asking: Asking
) -> Iterator[Answering]:
    asked = [render(one, tokenizer) for one in plan.answered]
    for cell in of:
        finished = results.finished(cell)
        _insist_on_same(finished, {one.id: tokens.digest for one, tokens in zip(plan.answered, asked, strict=True)})
        for number, batch in enumerate(batches(asked, asking.batch)):
            left = [i for i in batch if plan.answered[i].id not in finished]
            if left:
                yield Answering(cell, number, tuple(plan.answered[i] for i in left), tuple(asked[i] for i in left))


def later_jobs(plan: Plan, results: Results, tokenizer: Any) -> Iterator[Reading]:
    """Yield what can be done once :func:`jobs` are: to read the model's own answers, those that go on for a while."""
    for first in plan.first:
        answers = results.finished(first)
        texts = []
        for problem in plan.answered:
            prompt = render(problem, tokenizer)
            answer = tokenizer(answers[problem.id].details["output"], add_special_tokens=False)["input_ids"]
            whole = [*(token for piece in prompt.pieces for token in piece), *prompt.behind]
            if len(answer) >= PROMPT_OF_TEXT:
                texts.append(_Tokens(problem.id, (*whole, *answer), len(whole)))
        if not texts:
            none = f"{plan.task!r}: no answer has {PROMPT_OF_TEXT} tokens, and shorter ones are not read"
            warnings.warn(f"{none}; there is no row", IncompleteWarning, stacklevel=2)
        mine = replace(plan, cells=tuple(cell for cell in plan.cells if cell.seed == first.seed))
        yield from _readings(mine, results, texts, 1)


@dataclass(frozen=True)
class _Tokens:
    """Hold a text in tokens, and how many of them are prompt."""

    id: str
    tokens: tuple[int, ...]
    prompt: int

    @property
    def digest(self) -> str:
        """Return what tells this text from another one of its name."""
        return digest(self.tokens, self.prompt)


def _insist_on_same(finished: Mapping[str, Record], digests: Mapping[str, str]) -> None:
    """Refuse to go on with results of other problems of the same names.

    Raises:
        EvaluationError: one of them is.
    """
    for problem, record in finished.items():
        known = record.details.get("asked")
        if known is not None and digests.get(problem, known) != known:
            raise EvaluationError(
                f"{problem} of {record.cell.task} was another one when `results` was written: its file, or the version "
                "that makes it, has changed; name another file"
            )


def _readings(plan: Plan, results: Results, texts: Sequence[_Tokens], size: int) -> Iterator[Reading]:
    # Those of one budget are due together: fed side by side, they go fastest.
    groups = dict.fromkeys((cell.budget, cell.seed) for cell in plan.cells)
    done = {cell: results.finished(cell) for cell in plan.cells}
    for finished in done.values():
        _insist_on_same(finished, {one.id: one.digest for one in texts})
    for number, at in enumerate(range(0, len(texts), size)):
        batch = texts[at : at + size]
        for group in groups:
            # Cells of which the same texts are left are read side by side.
            left: dict[tuple[_Tokens, ...], list[Cell]] = {}
            for cell in plan.cells:
                if (cell.budget, cell.seed) == group:
                    here = tuple(one for one in batch if one.id not in done[cell])
                    left.setdefault(here, []).append(cell)
            for here, of_group in left.items():
                if here:
                    ids, digests = tuple(one.id for one in here), tuple(one.digest for one in here)
                    tokens = tuple(one.tokens for one in here)
                    yield Reading(tuple(of_group), number, ids, digests, tokens, here[0].prompt)


def _cut(text: Text, tokenizer: Any) -> _Tokens:
    found = tuple(tokenizer(text.text)["input_ids"])[: text.length]
    if len(found) < text.length or len(found) < 2 * PROMPT_OF_TEXT:
        raise EvaluationError(
            f"{text.id} has {len(found)} tokens with this tokenizer: {text.length} were asked for, and texts are read "
            f"from {2 * PROMPT_OF_TEXT} tokens on"
        )
    return _Tokens(text.id, found, PROMPT_OF_TEXT)


def _capped(problem: Problem, asking: Asking) -> Problem:
    if asking.max_new_tokens is None:
        return problem
    return replace(problem, max_new_tokens=asking.max_new_tokens)
