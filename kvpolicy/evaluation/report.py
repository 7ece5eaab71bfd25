"""A page of results in Markdown, with figures where matplotlib is installed."""

from __future__ import annotations

import datetime
import importlib.util
import math
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.measures import Row, TextRow, grouped, is_text
from kvpolicy.evaluation.record import FULL, Cell, Record, short
from kvpolicy.evaluation.table import footer, grid, legend, markdown, rows, setting, text_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

__all__ = ["command", "report"]

#: What texts have by block of positions or by layer: a title with its unit, and what is counted.
CURVES = {
    "kl": ("KL from the full cache, nats", "block"),
    "agreement": ("share of equal likeliest tokens", "block"),
    "loss": ("log-likelihood lost, nats", "block"),
    "mass_lost": ("attention on evicted tokens", "layer"),
    "output_error": ("relative error of the attention's output", "layer"),
}
NO_FIGURES = "No figures: matplotlib is not installed (`pip install 'kvpolicy[eval]'`).\n"

AnyRow = TypeVar("AnyRow", Row, TextRow)


@dataclass(frozen=True)
class Curves:
    """Hold one measure of the texts of one model and task, a curve for each policy.

    Attributes:
        title: what is measured, and its unit.
        of: model, task and setting.
        first: what is counted: ``"block"`` or ``"layer"``.
        lines: the means over texts at 0, 1, 2, ..., by policy and budget.
    """

    title: str
    of: str
    first: str
    lines: dict[str, list[float]]


def report(records: Sequence[Record], where: Path, baseline: str | None = None) -> Path:
    """Write a page, and its figures beside it as PNG and SVG; return the page's path.

    Args:
        records: at least one.
        where: a ``.md`` file, or a folder that gets ``report.md``; folders are made.
        baseline: the label of what differences are taken from; where None, the full cache for answers, VaSE for texts.

    Raises:
        EvaluationError: there is no record, or the page cannot be written.
    """
    if not records:
        raise EvaluationError("a report takes one finished problem at least, found none: run the evaluation first")
    path = where if where.suffix == ".md" else where / "report.md"
    answers, texts, curves = rows(records, baseline or FULL), text_rows(records, baseline), _curves(records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        has_matplotlib = importlib.util.find_spec("matplotlib") is not None
        figures = _draw(answers, texts, curves, path) if has_matplotlib else {}
        parts = [f"# Results\n\nWritten on {datetime.date.today()}; {len(records):,} finished problems.\n"]
        parts += [_section("Answers", answers)] if answers else []
        parts += [_section("Texts", texts)] if texts else []
        parts += [f"## Figures\n\n{NO_FIGURES}" if not has_matplotlib else _shown(figures)]
        parts += [_by_index(one) for one in curves]
        parts += [_again(records), _versions(records)]
        path.write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"cannot write a report to {path}: {error.strerror}; name another place") from error
    return path


def command(cell: Cell, out: str = "results.jsonl", model: str | None = None) -> str:
    """Return the command line that runs a cell again.

    Args:
        cell: which.
        out: the file of results.
        model: the model's name as it was typed, where the cell has a folder's last part alone.

    >>> cell = Cell("m", "", "vllm", "bfloat16", "gsm8k", "vase(512)", "vase(b)", 512, 0, 0.6)
    >>> print(command(cell))
    kvpolicy eval --model m --engine vllm --dtype bfloat16 --task gsm8k --policy 'vase(b)' --budget 512 --seed 0 ...
    """
    words: list[object] = [
        "kvpolicy",
        "eval",
        "--model",
        model or cell.model,
        "--engine",
        cell.engine,
        "--dtype",
        cell.dtype,
    ]
    words += ["--task", cell.task, "--policy", cell.label]
    words += ["--budget", cell.budget] if cell.budget else []
    words += ["--seed", cell.seed, "--temperature", f"{cell.temperature:g}"]
    words += ["--top-p", f"{cell.top_p:g}"] if cell.top_p < 1 else []
    words += ["--max-new-tokens", cell.max_new_tokens] if cell.max_new_tokens else []
    words += ["--out", out]
    return shlex.join(map(str, words))


# --- sections ----------------------------------------------------------------------------------------


def _section(title: str, found: Sequence[Row] | Sequence[TextRow]) -> str:
    notes = "".join(f"- {line.replace('*', chr(92) + '*')}\n" for line in footer(found))
    named = "".join(f"- {name}: `{text}`\n" for name, _, text in (one.partition(": ") for one in legend(found)))
    return f"## {title}\n\n{markdown(found)}\n{notes}" + (
        f"\nPolicies, ``b`` being the budget:\n\n{named}" if named else ""
    )


def _shown(figures: Mapping[str, str]) -> str:
    return "## Figures\n\n" + "\n".join(f"![{title}]({name})\n" for name, title in figures.items())


def _curves(records: Iterable[Record]) -> list[Curves]:
    """Return what texts have by position and by layer, each model and task apart."""
    found: dict[tuple[str, int], Curves] = {}
    groups = grouped(filter(is_text, records))
    for cell in sorted(groups, key=lambda cell: (cell.label, cell.budget)):
        of = f"{cell.model}, {cell.task} ({setting(cell)})"
        for number, (name, (title, first)) in enumerate(CURVES.items()):
            values = [_list(member, name) for member in groups[cell]]
            if means := _means([one for one in values if one]):
                found.setdefault((of, number), Curves(title, of, first, {})).lines[_name(cell)] = means
    return [found[key] for key in sorted(found)]


def _list(record: Record, name: str) -> list[float | None]:
    """Return a detail that is a list over blocks of positions or over layers; empty where there is none."""
    by_position = record.details.get("by_position") or {}
    if name == "loss":
        pairs = zip(by_position.get("full_log_prob", []), by_position.get("log_prob", []), strict=False)
        return [None if None in (full, ours) else full - ours for full, ours in pairs]
    value = by_position.get(name) if CURVES[name][1] == "block" else record.details.get(name)
    return value if isinstance(value, list) else []


def _means(lists: Sequence[Sequence[float | None]]) -> list[float]:
    """Return the mean at each index over the lists that have a number there, NaN where none has.

    >>> _means([[1.0, 2.0, None], [3.0]])
    [2.0, 2.0, nan]
    """
    columns = zip_longest(*lists)
    numbers = [[value for value in column if value is not None] for column in columns]
    return [sum(column) / len(column) if column else math.nan for column in numbers]


def _by_index(curves: Curves) -> str:
    """Return a table of curves: a line a block or layer, a column a policy."""
    columns = zip_longest(*curves.lines.values(), fillvalue=math.nan)
    lines = [[str(i), *("–" if math.isnan(one) else f"{one:.4f}" for one in line)] for i, line in enumerate(columns)]
    names = [curves.first, *curves.lines]
    return f"## {curves.title}, by {curves.first}: {curves.of}\n\n{grid(names, lines, [False] * len(names))}"


def _again(records: Iterable[Record]) -> str:
    models = {record.cell: record.details.get("model") for record in records}
    cells = sorted(models, key=lambda cell: (cell.model, cell.task, cell.budget, cell))
    commands = dict.fromkeys(command(cell, model=models[cell]) for cell in cells)
    return "## Run a row again\n\n```console\n" + "".join(f"$ {line}\n" for line in commands) + "```\n"


def _versions(records: Iterable[Record]) -> str:
    """Return the versions that the records were made with; more than one of a package is said."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        for package, version in record.versions.items():
            found[package].add(version)
    return "## Versions\n\n" + "".join(f"- {name} {', '.join(sorted(found[name]))}\n" for name in sorted(found))


def _name(cell: Cell) -> str:
    """Return how a row is called where it is a column or a line.

    >>> _name(Cell("m", "", "vllm", "bfloat16", "gsm8k", "vase(512)", "vase(b)", 512, 0, 0.6))
    'vase(b), b = 512'
    """
    return f"{short(cell.label)}, b = {cell.budget}" if cell.budget else short(cell.label)


# --- figures -----------------------------------------------------------------------------------------


def _draw(answers: Sequence[Row], texts: Sequence[TextRow], curves: Sequence[Curves], page: Path) -> dict[str, str]:
    """Write each figure beside the page, as PNG and SVG; return the titles by the names of the PNG files."""
    from kvpolicy.evaluation import plots  # needs matplotlib

    figures: list[tuple[str, Figure]] = []
    for title, rows_ in _apart(answers).items():
        figures.append((f"score against budget: {title}", plots.score_against_budget(rows_, title)))
    for title, texts_ in _apart(texts).items():
        figures.append((f"KL against budget: {title}", plots.kl_against_budget(texts_, title)))
    for one in curves:
        drawn = plots.curves(one.lines, one.first, one.title, one.of)
        figures.append((f"{one.title}, by {one.first}: {one.of}", drawn))
    names: dict[str, str] = {}
    for number, (title, figure) in enumerate(figures, start=1):
        name = f"{page.stem}-{number}.png"
        figure.savefig(page.with_name(name), dpi=150)
        figure.savefig(page.with_name(name).with_suffix(".svg"), metadata={"Date": None})
        names[name] = title
    return names


def _apart(found: Sequence[AnyRow]) -> dict[str, list[AnyRow]]:
    """Return the rows of each model and task."""
    apart: defaultdict[str, list[AnyRow]] = defaultdict(list)
    for row in found:
        apart[f"{row.cell.model}, {row.cell.task} ({setting(row.cell)})"].append(row)
    return dict(apart)
