"""The tasks, each a frozen dataclass, and :func:`parse`, which reads one from text."""

from __future__ import annotations

from collections.abc import Callable

from kvpolicy.evaluation.problem import Task
from kvpolicy.evaluation.tasks.reading import parse_with, with_entry_points
from kvpolicy.evaluation.tasks.recall import needles, passcode, turns
from kvpolicy.evaluation.tasks.sets import aime24, aime25, gsm8k, math500, svamp
from kvpolicy.evaluation.tasks.texts import file, own, pydoc, shakespeare, wikitext, worked
from kvpolicy.evaluation.tasks.together import many
from kvpolicy.evaluation.tasks.tracking import variables, words

__all__ = [
    "BUILT_IN",
    "aime24",
    "aime25",
    "described",
    "file",
    "gsm8k",
    "many",
    "math500",
    "needles",
    "own",
    "parse",
    "passcode",
    "pydoc",
    "shakespeare",
    "svamp",
    "tasks",
    "turns",
    "variables",
    "wikitext",
    "words",
    "worked",
]

SETS = (gsm8k, math500, aime24, aime25, svamp, many)
RECALL = (passcode, needles, turns, variables, words)
TEXTS = (wikitext, shakespeare, worked, pydoc, own, file)

#: What comes with kvpolicy; ``pyproject.toml`` declares the same in the entry points ``kvpolicy.tasks``.
BUILT_IN: dict[str, Callable[..., Task]] = {task.__name__: task for task in (*SETS, *RECALL, *TEXTS)}


def tasks() -> list[str]:
    """Return the names of all tasks, those of other installed packages among them."""
    return list(with_entry_points(BUILT_IN))


def described() -> dict[str, str]:
    """Return what each task does, a sentence each."""
    return {name: (load().__doc__ or "").partition("\n")[0] for name, load in with_entry_points(BUILT_IN).items()}


def parse(text: str) -> Task:
    """Return the task that a text describes: a name, or a call with constants and tasks in it.

    Raises:
        EvaluationError: the text is none, or a name or a parameter is not known.

    >>> parse("many(gsm8k(split='even'), 4)")
    many(task=gsm8k(split='even'), count=4)
    """
    return parse_with(text, with_entry_points(BUILT_IN))
