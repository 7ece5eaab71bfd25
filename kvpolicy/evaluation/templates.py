"""Policies with a budget to be filled in: ``vase``, ``vase(b, recent=b // 8)``, ``ValueGuard() >> TopK(b)``."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from kvpolicy import registry
from kvpolicy.errors import ParseError
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.record import FULL, short
from kvpolicy.grammar import parse_policy, text_of
from kvpolicy.policy import EvictionPolicy

__all__ = ["Filled", "fill", "takes_budget"]

BUDGET = "b"


@dataclass(frozen=True)
class Filled:
    """Hold a policy that a template became.

    Attributes:
        label: the template, as it was typed, with its name if it has one.
        budget: that was filled in; 0 where the template has no place for one.
        policy: None for the full cache.
    """

    label: str
    budget: int
    policy: EvictionPolicy | None

    @property
    def text(self) -> str:
        """Return what a record calls it: the policy with every parameter, since defaults may change; or ``"full"``."""
        return FULL if self.policy is None else text_of(self.policy)


def fill(templates: list[str], budgets: list[int]) -> list[Filled]:
    """Return every template with every budget, each of what they come to once.

    A recipe's bare name takes the budget as its first argument. ``b`` stands for it elsewhere, and
    in sums, differences, products and ``//`` of whole numbers: ``recent=b // 8``. A template without
    ``b`` is a policy of its own, and ``full`` the full cache. ``NAME: `` before a template is what
    tables call it.

    Args:
        templates: as a user types them.
        budgets: slots per KV head.

    Raises:
        EvaluationError: a template wants a budget and there is none, or no template wants one.
        PolicyError: it is no policy.

    >>> [(one.label, one.budget) for one in fill(["snapkv", "full"], [256, 512])]
    [('snapkv', 256), ('snapkv', 512), ('full', 0)]
    """
    for budget in budgets:
        if budget < 1:
            raise EvaluationError(f"`budgets` {budget}: it is at least 1")
    _insist_on_names(templates)
    found: dict[tuple[str, int], Filled] = {}
    for template in templates:
        source = _source(template)
        if not takes_budget(template):
            filled = [Filled(template, 0, None if source == FULL else parse_policy(source))]
        elif not budgets:
            raise EvaluationError(f"{template} has no budget: add `budgets` 256, or write a number for b")
        else:
            filled = [Filled(template, budget, _parse(source, budget)) for budget in budgets]
        found.update({(one.label, one.budget): one for one in filled})
    if budgets and not any(takes_budget(one) for one in templates):
        raise EvaluationError(
            f"`budgets` {', '.join(map(str, budgets))} goes nowhere: no policy has a place for it; write b, as in "
            '"vase(b)", or leave `budgets` out'
        )
    return list(found.values())


def _insist_on_names(templates: list[str]) -> None:
    """Refuse one name for several policies.

    Raises:
        EvaluationError: there is one, or the name of the full cache stands for another.
    """
    known: dict[str, str] = {FULL: FULL}
    for template in templates:
        name = short(template).strip()
        if known.setdefault(name, _source(template)) != _source(template):
            raise EvaluationError(f"{name!r} names {known[name]} and {_source(template)}: give each a name of its own")


def takes_budget(template: str) -> bool:
    """Return whether a template has a place for a budget.

    >>> takes_budget("vase"), takes_budget("TopK(b)"), takes_budget("vase(256)")
    (True, True, False)
    """
    source = _source(template)
    if source in registry.policies():
        return True
    try:
        tree = ast.parse(source, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False  # the parser of policies says what is wrong
    return any(isinstance(node, ast.Name) and node.id == BUDGET for node in ast.walk(tree))


def _source(template: str) -> str:
    """Return a template without its name."""
    return template.rpartition(": ")[2].strip()


def _parse(template: str, budget: int) -> EvictionPolicy:
    source = template
    if source in registry.policies():
        source = f"{source}({BUDGET})"
    tree = _Filler(budget).visit(ast.parse(source, mode="eval"))
    try:
        return parse_policy(ast.unparse(tree))
    except ParseError as error:
        raise ParseError(f"{template} with b={budget}: {error}") from error


class _Filler(ast.NodeTransformer):
    """Put a number in the place of ``b``, and work out whole numbers made of it."""

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.budget) if node.id == BUDGET else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.BinOp(left=ast.Constant(value=int() as left), right=ast.Constant(value=int() as right)):
                match node.op:
                    case ast.Add():
                        return ast.Constant(left + right)
                    case ast.Sub():
                        return ast.Constant(left - right)
                    case ast.Mult():
                        return ast.Constant(left * right)
                    case ast.FloorDiv() if right:
                        return ast.Constant(left // right)
                    case ast.FloorDiv():
                        raise EvaluationError(f"{left} // {right} divides by zero in a policy: write another divisor")
                    case ast.Div():
                        raise EvaluationError(f"{left} / {right} need not be a whole number: write // in a policy")
                    case _:
                        return node
            case _:
                return node
