"""An explanation as a terminal shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvpolicy import catalog
from kvpolicy.policy import LayerPlan
from kvpolicy.receipt import size

if TYPE_CHECKING:
    from kvpolicy.cli.costs import Costs
    from kvpolicy.explanation import Engine, Explanation, Guarded, Node

__all__ = ["blocks"]

Block = Text | Padding | Table


def blocks(asked: str, told: Explanation, costs: Costs | None) -> Iterator[Block]:
    """Yield what is printed, one thing below another.

    Args:
        asked: the policy as it was typed.
        told: what it does.
        costs: what it takes of a model, if one is known.
    """
    yield Text(asked, style="bold")
    if told.policy != asked:
        yield _indented(told.policy)
    yield from _part("class", [_indented(told.one_class)]) if told.one_class else _part("chain", _chain(told.stages))
    yield from _part("when", map(_indented, _when(told)))
    if told.guards is not None:
        yield from _part("guards", map(_indented, _guards(told.guards)))
    yield from _part("needs", [_indented(catalog.needs_in_words(told.needs, told.queries, told.remembers))])
    yield from _part("engines", [_lines(_engine(one) for one in told.engines)])
    if costs is not None:
        where = f"{costs.name}, {costs.dtype}, batch {costs.batch:,}"
        yield from _part(f"memory of {where}", [_lines(_memory(costs))])
        yield from _part("cost of an eviction, at least", [_lines(_cost(costs))])


def _part(title: str, content: Iterable[Block]) -> Iterator[Block]:
    yield Text(f"\n{title}", style="bold")
    yield from content


def _indented(text: str) -> Padding:
    return Padding(Text(text), (0, 0, 0, 2))


def _lines(rows: Iterable[Sequence[str]]) -> Padding:
    """Return a name and a text, one pair below another."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return Padding(table, (0, 0, 0, 2))


def _chain(stages: Sequence[Node]) -> Iterator[Block]:
    for one in stages:
        left = 2 + 2 * one.depth
        line = Text.assemble((one.name, "bold"), f"  {one.role}: {one.sentence}")
        yield Padding(line, (0, 0, 0, left))
        if one.parameters:
            table = Table.grid(padding=(0, 2))
            for parameter in one.parameters:
                style = "dim" if parameter.default else ""
                table.add_row(Text(f"{parameter.name}={parameter.value}", style=style), Text(parameter.meaning, style))
            yield Padding(table, (0, 0, 0, left + 4))


def _when(told: Explanation) -> Iterator[str]:
    layers = [layer for layer in told.layers if layer is not None]
    if not layers:
        yield "Never: every layer is left alone."
        return
    budgets, capacities = ([getattr(layer, name) for layer in layers] for name in ("budget", "capacity"))
    intervals = [layer.interval for layer in layers if layer.interval is not None]
    where = _where(told.layers)
    yield (
        f"Cut to {_range(budgets)} slots per KV head{where} at the end of the prompt, and of each later turn of "
        "several tokens."
    )
    if not intervals:
        yield "Never while decoding: from there on the cache grows by what is decoded."
    else:
        yield (
            f"Then after every {_range(intervals)} decoded tokens{_some(len(intervals), len(layers))}, where it holds "
            f"more; never more than {_range(capacities)} slots, allocated once."
        )
    recent = _range([layer.recent for layer in layers])
    yield f"The last {recent} tokens always stay; they count inside the budget."


def _some(number: int, of: int) -> str:
    return f" in {number} of {of} layers" if number < of else ""


def _where(layers: Sequence[LayerPlan | None]) -> str:
    planned = [layer for layer in layers if layer is not None]
    words = []
    if len(planned) < len(layers):
        words.append(f"in {len(planned)} of {len(layers)} layers, the others are left alone")
    elif len({layer.budget for layer in planned}) > 1:
        words.append(
            f"over {len(layers)} layers, {sum(layer.budget for layer in planned) / len(planned):,.0f} on average"
        )
    if any(layer.shared for layer in planned):
        words.append("on average over the heads of a layer")
    elif any(layer.heads for layer in planned):
        words.append("in the largest head")
    return f" ({'; '.join(words)})" if words else ""


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _guards(guards: Guarded) -> Iterator[str]:
    for text, count in guards.stages.items():
        yield f"{text} protects {count:,} of {guards.budget:,} slots."
    all_of_them = guards.most + guards.recent
    if not guards.may_overflow:
        yield f"With the last {guards.recent:,} tokens that is {all_of_them:,} at most: they always fit."
        return
    yield (
        f"warning: together and with the last {guards.recent:,} tokens they may protect {all_of_them:,}, more than "
        f"{guards.budget:,}, where each protects other tokens. Then the budget wins: sinks stay before the prompt, "
        "the prompt before large values, higher scores before lower ones, and the receipt counts the guarded tokens "
        "that had to go."
    )


def _engine(one: Engine) -> tuple[str, str, str]:
    return one.name, "follows it" if one.follows else "refuses", one.why


def _memory(costs: Costs) -> Iterator[tuple[str, str, str]]:
    memory = costs.memory
    names = {
        "pairs": f"keys and values of {costs.evicting} layers",
        "places": "positions and order",
        "window": "newest queries",
        "state": "what the stages remember",
        "alone": "layers that the policy leaves alone",
    }
    for name, words in names.items():
        if count := getattr(memory, name):
            yield f"{count:,} B", size(count), words
    yield f"{memory.total:,} B", size(memory.total), "in all"
    yield f"{memory.full:,} B", size(memory.full), f"the full cache of {costs.tokens:,} tokens a request"
    share = f"{100 * memory.total / memory.full:.1f} %"
    yield share, "", "of the full cache" + ("" if memory.total < memory.full else ": nothing is saved at this length")
    if costs.others:
        yield "", "", f"{costs.others} layers that are not full attention are not counted: they are the same in both"


def _cost(costs: Costs) -> Iterator[tuple[str, str]]:
    work = costs.eviction
    yield f"{work.read:,} B", "read"
    yield f"{work.written:,} B", "written"
    yield f"{work.flops:,}", "floating-point operations in products"
    if costs.eviction_seconds is None or costs.step_seconds is None:
        return
    yield _time(costs.eviction_seconds), "at the speeds given"
    yield _time(costs.step_seconds), "for decoding a token of each request, which reads every weight and slot"
    if costs.share is not None:
        yield f"{100 * costs.share:.2g} %", f"of decoding, with an eviction every {costs.interval:,} tokens"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"
