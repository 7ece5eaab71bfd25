"""Read a task from text, without ``eval``, and the tasks that have a name."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from kvpolicy.errors import nearest
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.problem import Task

__all__ = ["GROUP", "parse_with", "with_entry_points"]

GROUP = "kvpolicy.tasks"

Make = Callable[..., Task]


def with_entry_points(built_in: Mapping[str, Make]) -> dict[str, Callable[[], Make]]:
    """Return every task by name, each behind a function that loads it: ours, and those of other packages.

    Raises:
        EvaluationError: another package declares a name that is taken.
    """
    known: dict[str, Callable[[], Make]] = {name: functools.partial(_same, make) for name, make in built_in.items()}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        package = point.dist.name if point.dist else "unknown"
        if package == "kvpolicy":  # what is built in; an older installation may declare less
            continue
        if point.name in known:
            raise EvaluationError(
                f"the package {package!r} declares the task {point.name!r}, which there is already: uninstall it, or "
                "rename its entry point"
            )
        known[point.name] = functools.partial(_load, point.name, package, point.load)
    return known


def parse_with(text: str, known: Mapping[str, Callable[[], Make]]) -> Task:
    """Return the task that a text describes, of those that are known.

    Raises:
        EvaluationError: the text is none, or a name or a parameter is not known.
    """
    source = text.strip()
    try:
        tree = ast.parse(source, mode="eval").body
        return _task(tree, known, source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) and error.msg else str(error) or type(error).__name__
        raise EvaluationError(f"cannot read the task {source[:80]!r}: {reason}; write, say, gsm8k(shots=4)") from error


def _task(node: ast.expr, known: Mapping[str, Callable[[], Make]], source: str) -> Task:
    match node:
        case ast.Name(id=name):
            return _call(name, [], {}, known)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            named = {word.arg: _value(word.value, known, source) for word in keywords if word.arg is not None}
            if len(named) < len(keywords):
                raise EvaluationError(f"{name}: write every parameter out, and each once")
            return _call(name, [_value(arg, known, source) for arg in args], named, known)
        case _:
            raise EvaluationError(f"{source[:80]!r} is no task; write a name, or a call such as gsm8k(shots=4)")


def _value(node: ast.expr, known: Mapping[str, Callable[[], Make]], source: str) -> Any:
    match node:
        case ast.Constant(value=int() | float() | str() | bool() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id=word) if word not in known:
            raise EvaluationError(f"{word} in {source[:80]!r} is no task{nearest(word, known)}; a word is {word!r}")
        case ast.Name() | ast.Call():
            return _task(node, known, source)
        case _:
            raise EvaluationError(f"{ast.unparse(node)!r} in {source[:80]!r}: a task holds constants and tasks alone")


def _call(name: str, args: list[Any], named: dict[str, Any], known: Mapping[str, Callable[[], Make]]) -> Task:
    if name not in known:
        raise EvaluationError(f"the task {name!r} is not known{nearest(name, known)}; there are {', '.join(known)}")
    make = known[name]()
    signature = inspect.signature(make)
    for word in named:
        if word not in signature.parameters:
            has = ", ".join(signature.parameters) or "none"
            raise EvaluationError(
                f"{name} has no parameter {word!r}{nearest(word, signature.parameters)}: it has {has}"
            )
    try:
        signature.bind(*args, **named)
    except TypeError as error:
        raise EvaluationError(f"{name}({', '.join(signature.parameters)}): {error}") from error
    return make(*args, **named)


def _same(make: Make) -> Make:
    return make


def _load(name: str, package: str, load: Callable[[], Make]) -> Make:
    try:
        return load()
    except (ImportError, AttributeError) as error:
        raise EvaluationError(f"the task {name!r} of the package {package!r} cannot be loaded: {error}") from error
