"""Tables of results: one row a policy and budget, on the terminal or in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from kvpolicy.evaluation.measures import Row, TextRow, rows, text_rows
from kvpolicy.evaluation.record import Cell, short
from kvpolicy.evaluation.statistics import Interval

__all__ = ["Row", "TextRow", "footer", "grid", "legend", "markdown", "rich_tables", "rows", "setting", "text_rows"]

BLANK = "–"


def rich_tables(found: Sequence[Row] | Sequence[TextRow]) -> list[Table]:
    """Return rows as tables for the terminal, one for each model and task, with the columns that fit there."""
    made = []
    for cell in dict.fromkeys(_where(row.cell) for row in found):
        here: Any = [row for row in found if _where(row.cell) == cell]
        table = Table(title=escape(f"{cell[0]}: {cell[1]} ({cell[2]})"), title_justify="left", title_style="bold")
        names, lines = _layout(here)
        shown = [i for i, name in enumerate(names) if name in NARROW]
        for i in shown:
            table.add_column(names[i], overflow="fold", justify="left" if names[i] in LEFT else "right")
        for line in lines:
            table.add_row(*(escape(line[i]) for i in shown))
        made.append(table)
    return made


def _where(cell: Cell) -> tuple[str, str, str]:
    return cell.model, cell.task, setting(cell)


def markdown(found: Sequence[Row] | Sequence[TextRow], without: Sequence[str] = ()) -> str:
    """Return rows as a table in Markdown, a newline at its end.

    Args:
        found: the rows.
        without: columns to leave out.
    """
    names, lines = _layout(found)
    shown = [i for i, name in enumerate(names) if name not in without]
    names, lines = [names[i] for i in shown], [[line[i] for i in shown] for line in lines]
    return grid(names, lines, [name in LEFT for name in names])


def grid(names: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[bool]) -> str:
    """Return a table in Markdown, a newline at its end.

    Args:
        names: of the columns.
        lines: a text for each column.
        left: whether a column is flush left.
    """
    rule = ["---" if is_left else "--:" for is_left in left]
    escaped = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in line] for line in (names, *lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (escaped[0], rule, *escaped[1:]))


def footer(found: Sequence[Row] | Sequence[TextRow]) -> list[str]:
    """Return what a reader must know of a table, a line each."""
    sizes = sorted({row.n for row in found}) or [0]
    n = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    bootstrap = "the expanded percentile bootstrap (10,000 resamples)"
    is_texts = bool(found) and isinstance(found[0], TextRow)
    method = bootstrap if is_texts else "Wilson's"
    lines = [
        "budget: slots kept per KV head after an eviction, the last `recent` tokens and guards among them; "
        "between evictions up to `interval` more.",
        "held: slots used / tokens seen, mean over tokens.",
        f"[low, high]: 95 % over problems, n = {n}, the seeds of a problem averaged: {method}.",
    ]
    if sizes[0] < 30:
        lines.append("An interval over fewer than thirty problems is too narrow where values are skewed.")
    if any(row.difference for row in found):
        lines += [
            f"difference: from {short(found[0].baseline)}, paired over the problems that both have; "
            f"{bootstrap}, made to reach 0 where fewer than six problems differ.",
            "*: the interval of the difference does not hold 0. Of twenty rows that do not differ, one has a star.",
        ]
    return lines


Column = tuple[str, Callable[[Any], str]]
_SCORES = ("score, %", "KL, nats", "difference, points", "difference, nats")
#: What fits into the width of a terminal; Markdown has every column.
NARROW = ("policy", "budget", "n", *_SCORES, "held, %", "cut short, %")
LEFT = ("model", "task", "policy", "setting")  # texts; numbers are flush right


def _layout(found: Sequence[Row] | Sequence[TextRow]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns and the cells of each row; a column that is blank throughout is left out."""
    columns = [*WHO, *(TEXTS if found and isinstance(found[0], TextRow) else ANSWERS)]
    if len({setting(row.cell) for row in found}) < 2:
        columns = [column for column in columns if column[0] != "setting"]
    whole = [(name, [show(row) for row in found]) for name, show in columns]
    kept = [(name, cells) for name, cells in whole if not found or any(cell != BLANK for cell in cells)]
    return [name for name, _ in kept], [list(line) for line in zip(*(cells for _, cells in kept), strict=True)]


def setting(cell: Cell) -> str:
    """Return what a cell shares with others beside model and task, in words."""
    drawn = f"temperature {cell.temperature:g}" + (f", top_p {cell.top_p:g}" if cell.top_p < 1 else "")
    cap = f", at most {cell.max_new_tokens} tokens" if cell.max_new_tokens else ""
    return f"{cell.engine}, {cell.dtype}, {drawn}{cap}, weights {cell.weights[:8]}"


def legend(found: Sequence[Row] | Sequence[TextRow]) -> list[str]:
    """Return what the named policies of a table are, a line each."""
    return [label for label in dict.fromkeys(row.cell.label for row in found) if short(label) != label]


def _runs(row: Row | TextRow) -> str:
    return f"{row.n}" if row.n == row.runs else f"{row.n} ({row.runs} runs)"


def _interval(interval: Interval | None, scale: float, digits: int) -> str:
    if interval is None:
        return BLANK
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):  # of one problem
        return f"{scale * interval.estimate:.{digits}f}"
    low, high = (f"{scale * end:.{digits}f}" for end in (interval.low, interval.high))
    return f"{scale * interval.estimate:.{digits}f} [{low}, {high}]"


def _shown_difference(row: Row | TextRow, scale: float, digits: int) -> str:
    if row.difference is None:
        return BLANK
    star = "*" if row.difference.excludes_zero else ""
    over = "" if row.difference.n == row.n else f" (n {row.difference.n})"
    sign = "+" if row.difference.estimate > 0 else ""
    return f"{sign}{_interval(row.difference, scale, digits)}{star}{over}"


def _percent(value: float | None) -> str:
    return BLANK if value is None else f"{100 * value:.1f}"


def _plain(value: float | None, digits: int) -> str:
    return BLANK if value is None else f"{value:,.{digits}f}"


WHO: list[Column] = [
    ("model", lambda row: row.cell.model),
    ("setting", lambda row: setting(row.cell)),
    ("task", lambda row: row.cell.task),
    ("policy", lambda row: short(row.cell.label)),
    ("budget", lambda row: f"{row.cell.budget}" if row.cell.budget else BLANK),
    ("n", _runs),
]
ANSWERS: list[Column] = [
    ("score, %", lambda row: _interval(row.score, 100, 1)),
    ("difference, points", lambda row: _shown_difference(row, 100, 1)),
    ("held, %", lambda row: _percent(row.compression)),
    ("peak KV bytes", lambda row: _plain(row.peak_nbytes, 0)),
    ("tokens", lambda row: _plain(row.tokens, 0)),
    ("loops, %", lambda row: _percent(row.loop)),
    ("loops by zip, %", lambda row: _percent(row.loop_zip)),
    ("tokens/s", lambda row: _plain(row.rate, 1)),
    ("cut short, %", lambda row: _percent(row.truncated)),
]
TEXTS: list[Column] = [
    ("KL, nats", lambda row: _interval(row.kl, 1, 4)),
    ("difference, nats", lambda row: _shown_difference(row, 1, 4)),
    ("agreement, %", lambda row: _percent(row.agreement)),
    ("loss, nats", lambda row: _interval(row.loss, 1, 4)),
    ("mass lost, %", lambda row: _percent(row.mass_lost)),
    ("output error, %", lambda row: _percent(row.output_error)),
    ("survival, %", lambda row: _percent(row.survival)),
    ("by some head, %", lambda row: _percent(row.survival_union)),
    ("held, %", lambda row: _percent(row.compression)),
    ("peak KV bytes", lambda row: _plain(row.peak_nbytes, 0)),
]
