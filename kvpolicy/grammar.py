"""Read a policy from text, without ``eval``."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

from kvpolicy import docstrings, registry
from kvpolicy.allocators import Allocator
from kvpolicy.errors import ParseError, PolicyError, nearest
from kvpolicy.policy import EvictionPolicy, Policy
from kvpolicy.stage import Chain, Scorer, Selector, Stage, Transform, maximum

__all__ = ["parse", "parse_any", "parse_policy", "parse_with", "text_of", "with_arguments"]


def parse(text: str) -> Policy:
    """Return the policy that a text describes: a policy, a bare chain, or a recipe's call.

    Raises:
        ParseError: the text is none of these; the message says where and what would be.
    """
    policy = parse_policy(text)
    if isinstance(policy, Policy):
        return policy
    raise ParseError(
        f"{_short(text.strip())!r} is a policy of the class {type(policy).__name__}, which is not made of stages; "
        "kvpolicy.parse_policy(text) reads it"
    )


def parse_policy(text: str) -> EvictionPolicy:
    """Read what ``Policy.parse`` reads, and recipes that return a policy written without the algebra.

    Adapters and the command line read texts by this.

    Raises:
        ParseError: the text is no policy; the message says where and what would be.

    >>> parse_policy("vase(1024)")
    Policy(ValueGuard() >> Stochastic() >> TopK(1024))
    """
    value, source = _value(text)
    if isinstance(value, Chain | Selector):
        return Policy(value)
    if isinstance(value, EvictionPolicy):
        return value
    if isinstance(value, Scorer | Transform):
        raise ParseError(f"{_short(source)!r} has no selector; write {value!r} >> TopK(budget)")
    raise ParseError(f"{_short(source)!r} is not a policy but {value!r}")


def parse_with(text: str, **changes: int | None) -> EvictionPolicy:
    """Return the policy of a text with another interval, or other recent tokens.

    A recipe is asked for them where it has such a parameter: what else it derives from them follows. Of any
    other policy of stages they are replaced.

    Args:
        text: what :func:`parse_policy` reads.
        changes: by the names of ``Policy``'s options.

    Raises:
        ParseError: the text is no policy, or one that is not made of stages, whose recipe has no such parameter.

    >>> parse_with("lazy_eviction(1024)", interval=128)
    Policy(Recurrence(window=128, threshold=0.0001) >> TopK(1024), interval=128, recent=128)
    >>> parse_with("snapkv(1024)", interval=128, recent=32).interval  # a recipe that has no recent
    128
    """
    policy = parse_policy(text)
    known = _parameters(text)
    asked = {name: value for name, value in changes.items() if name in known or not isinstance(policy, Policy)}
    if asked:
        policy = parse_policy(with_arguments(text, **asked))
    rest: dict[str, Any] = {name: value for name, value in changes.items() if name not in asked}
    return dataclasses.replace(policy, **rest) if isinstance(policy, Policy) and rest else policy


def _parameters(text: str) -> frozenset[str]:
    """Return the names of the parameters of the recipe that a text calls, none where it calls none."""
    match _tree(text)[1]:
        case ast.Call(func=ast.Name(id=name)) if name in _callables():
            return frozenset(inspect.signature(_callables()[name]()).parameters)
        case _:
            return frozenset()


def text_of(policy: EvictionPolicy) -> str:
    """Return a text that :func:`parse_policy` reads as this policy, every parameter of its stages written out.

    A policy that is not made of stages says it by its ``repr``.

    Raises:
        ParseError: its ``repr`` is no such text.
    """
    if isinstance(policy, Policy):
        return policy.text(full=True)
    text, kind = repr(policy), type(policy)
    if kind.__repr__ is object.__repr__:
        raise ParseError(
            f"{kind.__module__}.{kind.__qualname__} has no __repr__, and so no text that makes it again: let its repr "
            f"be the call of its recipe, by the name that is registered, as in {kind.__name__}(1024)"
        )
    try:
        same = repr(parse_policy(text)) == text
    except ParseError as error:
        raise ParseError(
            f"{text} is no text that makes a {kind.__name__} again: let its repr be the call of its recipe, by "
            f"the name that is registered ({error})"
        ) from error
    if not same:
        raise ParseError(f"{text} makes {parse_policy(text)!r}: let its repr be the call that makes it")
    return text


def with_arguments(text: str, **arguments: int | None) -> str:
    """Return the text of a recipe's call with other arguments, for a policy that is not made of stages.

    Raises:
        ParseError: the recipe has no such parameter.

    >>> with_arguments("vase(1024, recent=32)", recent=16, interval=None)
    'vase(1024, interval=None, recent=16)'
    """
    source, tree = _tree(text)
    names = ", ".join(f"{name}={value}" for name, value in arguments.items())
    match tree:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _callables():
            signature = inspect.signature(_callables()[name]())
        case _:
            raise ParseError(f"{_short(source)!r} is no recipe's call, which could be given {names}")
    for word in arguments:
        if word not in signature.parameters:
            known = ", ".join(signature.parameters) or "none"
            raise ParseError(
                f"{_short(source)!r} cannot be given {names}: {name} has no parameter {word!r}; it has {known}"
            )
    nodes: dict[str, ast.expr] = {keyword.arg: keyword.value for keyword in keywords if keyword.arg is not None}
    bound = signature.bind(*args, **nodes)
    bound.arguments.update({word: ast.Constant(value) for word, value in arguments.items()})
    given = [ast.keyword(word, node) for word, node in bound.kwargs.items()]
    return ast.unparse(ast.Call(ast.Name(name), list(bound.args), given))


def parse_any(text: str) -> Stage | Allocator | EvictionPolicy:
    """Return what a text describes: a stage alone, an allocator, or a policy, of another package's own making, too.

    Raises:
        ParseError: the text is none of these.

    >>> parse_any("Sinks(4)"), parse_any("Sinks(4) >> TopK(128)")
    (Sinks(4), Policy(Sinks(4) >> TopK(128)))
    """
    value, source = _value(text)
    if isinstance(value, Chain):
        return Policy(value)
    if isinstance(value, Stage | Allocator | EvictionPolicy):
        return value
    raise ParseError(f"{_short(source)!r} is neither a policy nor a stage but {value!r}")


def _value(text: str) -> tuple[Any, str]:
    """Return what a text evaluates to, and the text as it is named in a message."""
    source, tree = _tree(text)
    try:
        return _Reader(source).read(tree), source
    except RecursionError as error:
        raise ParseError(f"cannot read {_short(source)!r}: nested too deeply") from error


def _tree(text: str) -> tuple[str, ast.expr]:
    """Return a text without the space around it, and its expression."""
    if not isinstance(text, str):
        raise ParseError(f"a policy text is a string, found {type(text).__name__}; a Policy needs no parsing")
    source = text.strip()
    if not source:
        raise ParseError('the policy text is empty; write, say, "ValueGuard() >> Stochastic(1.0) >> TopK(1024)"')
    try:
        return source, ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ParseError(f"cannot read {_short(source)!r}: {_reason(error)}") from error


class _Reader:
    def __init__(self, source: str) -> None:
        self.source = source

    def read(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() | str() | bool() | None as value):
                return value
            case ast.UnaryOp(
                op=ast.USub() | ast.UAdd() as sign,
                operand=ast.Constant(value=int() | float() as value),
            ):
                return -value if isinstance(sign, ast.USub) else value
            case ast.Tuple(elts=items) | ast.List(elts=items):
                return tuple(self.read(item) for item in items)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                return self.call(name, args, keywords)
            case ast.BinOp(left=left, op=ast.RShift(), right=right):
                return self.join(node, self.read(left), self.read(right))
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.combine(node, self.read(left), "+", self.read(right))
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return self.combine(node, self.read(left), "*", self.read(right))
            case ast.Name(id=name) if name in _callables():
                self.refuse(node, f"write {_example(name)} with brackets")
            case ast.Name(id=name):
                self.unknown(node, name)
            case ast.BinOp(left=ast.Name(id="b")) | ast.BinOp(right=ast.Name(id="b")):  # b // 8
                self.unknown(node, "b")
            case _:
                self.refuse(node, "a policy text holds stages, numbers, strings, >>, + and * alone")

    def join(self, node: ast.expr, left: Any, right: Any) -> Any:
        if not any(isinstance(side, Stage | Chain) for side in (left, right)):
            self.refuse(node, ">> joins stages, and neither side is one")
        return left >> right

    def combine(self, node: ast.expr, left: Any, sign: str, right: Any) -> Any:
        if sign == "*" and isinstance(right, Scorer) and not isinstance(left, Scorer):
            return right * left
        if not isinstance(left, Scorer):
            self.refuse(node, f"{sign} mixes scorers, and {left!r} is none")
        return left + right if sign == "+" else left * right

    def call(self, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Any:
        target = _callables().get(name)
        if target is None:
            self.unknown(ast.Name(id=name, ctx=ast.Load()), name)
        for star in [arg for arg in args if isinstance(arg, ast.Starred)] + [k for k in keywords if k.arg is None]:
            self.refuse(
                star if isinstance(star, ast.expr) else star.value,
                "write every argument out; * is not read",
            )
        function = target()
        positional = [self.read(arg) for arg in args]
        named = {keyword.arg: self.read(keyword.value) for keyword in keywords if keyword.arg is not None}
        if len(named) < sum(keyword.arg is not None for keyword in keywords):
            raise ParseError(f"{name} is given a parameter twice: write each once")
        signature = inspect.signature(function)
        for word in named:
            if word not in signature.parameters:
                known = ", ".join(signature.parameters) or "none"
                raise ParseError(
                    f"{name} has no parameter {word!r}{nearest(word, signature.parameters)}: it has {known}"
                )
        try:
            signature.bind(*positional, **named)
        except TypeError as error:
            missing: list[str] = []
            with contextlib.suppress(TypeError):  # too many, or one twice: the signature says more
                given = signature.bind_partial(*positional, **named).arguments
                missing = [one for one in _required(name) if one not in given]
            raise ParseError(_needs(name, missing) if missing else f"{name}{signature}: {error}") from error
        try:
            return function(*positional, **named)
        except PolicyError:
            raise
        except (TypeError, ValueError) as error:
            raise ParseError(f"{name}{signature} refuses these arguments: {error}") from error

    def unknown(self, node: ast.expr, name: str) -> NoReturn:
        if name == "b":
            raise ParseError("'b' stands for the budget in kvpolicy eval only; write a number")
        hint = "; for a budget write a number, or b in kvpolicy eval" if len(name) == 1 else ""
        raise ParseError(f"{name!r} is not known{nearest(name, _callables())}; kvpolicy list names all{hint}")

    def refuse(self, node: ast.expr, why: str) -> NoReturn:
        found = ast.get_source_segment(self.source, node) or ast.unparse(node)
        raise ParseError(f"cannot read {_short(found)!r}: {why}")


def _callables() -> dict[str, Callable[[], Callable[..., Any]]]:
    """Return what may be called in a text, each behind a function that loads it."""
    known: dict[str, Callable[[], Callable[..., Any]]] = {
        "Policy": lambda: Policy,
        "maximum": lambda: maximum,
    }
    known.update({name: entry.load for name, entry in registry.policies().items()})
    known.update({name: entry.load for name, entry in registry.stages().items()})
    return known


def _required(name: str) -> list[str]:
    """Return the parameters that a call cannot do without."""
    parameters = inspect.signature(_callables()[name]()).parameters.values()
    return [one.name for one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD]


def _example(name: str) -> str:
    """Return a call to write: that of the docstring, or one with a budget, where that is all it needs."""
    required = _required(name)
    if not required:
        return f"{name}()"
    told = docstrings.example(_callables()[name]())
    if told is not None and told.startswith(f"{name}("):  # a class may be registered by another name than its own
        return told
    return f"{name}({'1024' if required == ['budget'] else ', '.join(required)})"


def _needs(name: str, missing: list[str]) -> str:
    more = f"; kvpolicy show {name} tells more" if name in registry.policies() or name in registry.stages() else ""
    return f"{name} needs {' and '.join(missing)}: {_example(name)}{more}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _reason(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.msg:
        return f"{error.msg}, at character {error.offset}" if error.offset else error.msg
    return str(error) or type(error).__name__
