"""What the records of one policy at one budget came to: one row of a table.

Answers and texts read have rows of their own, since what they measure differs. The seeds of a cell are pooled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.record import FULL, Cell, Record, short
from kvpolicy.evaluation.statistics import Interval, by_problem, mean_interval, paired_interval, rate_interval

__all__ = ["Row", "TextRow", "grouped", "is_text", "rows", "text_rows"]


@dataclass(frozen=True)
class Row:
    """Hold what one policy at one budget came to on the problems of a task, its seeds pooled.

    Attributes:
        cell: what the records share; its ``seed`` and ``policy`` are those of the first record.
        n: problems.
        runs: records, n times the seeds where all are finished.
        score: the mean score.
        difference: of the score from the baseline's, paired over problems; None for the baseline
            itself and where fewer than two problems are shared.
        baseline: its label.
        compression: mean share of the tokens seen that are held.
        peak_nbytes: the largest of any request.
        tokens: mean number generated.
        loop: share of runs with a phrase that repeats.
        loop_zip: share of runs that compress too well.
        rate: tokens a second, all tokens over all seconds.
        truncated: share of runs that the cap on tokens ended.
    """

    cell: Cell
    n: int
    runs: int
    score: Interval
    difference: Interval | None
    baseline: str
    compression: float | None
    peak_nbytes: int | None
    tokens: float | None
    loop: float | None
    loop_zip: float | None
    rate: float | None
    truncated: float | None


@dataclass(frozen=True)
class TextRow:
    """Hold what one policy at one budget came to on the texts of a task, its seeds pooled.

    Attributes:
        cell: as in :class:`Row`.
        n: texts.
        runs: records.
        kl: mean divergence from the full cache, in nats a token.
        difference: of that from the baseline's, paired over texts; None as in :class:`Row`.
        baseline: its label, empty where there is none.
        agreement: share of positions where both caches have the same likeliest token.
        loss: mean log-likelihood lost against the full cache, in nats a token.
        mass_lost: attention on evicted tokens, mean over layers.
        output_error: relative error of the attention's output, mean over layers.
        survival: share of tokens older than the budget that a head holds.
        survival_union: share of them that some head holds.
        compression: mean share of the tokens seen that are held.
        peak_nbytes: the largest of any text.
    """

    cell: Cell
    n: int
    runs: int
    kl: Interval
    difference: Interval | None
    baseline: str
    agreement: float | None
    loss: Interval | None
    mass_lost: float | None
    output_error: float | None
    survival: float | None
    survival_union: float | None
    compression: float | None
    peak_nbytes: int | None


def is_text(record: Record) -> bool:
    """Return whether a record is of a text that was read, rather than of an answer."""
    return "kl" in record.details


def grouped(records: Iterable[Record]) -> dict[Cell, list[Record]]:
    """Return the records of each row of a table, under the cell of its first record."""
    found: dict[Cell, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.cell, record.problem)):
        found.setdefault(replace(record.cell, seed=0), []).append(record)
    return {members[0].cell: members for members in found.values()}


def rows(records: Iterable[Record], baseline: str = FULL) -> list[Row]:
    """Return a row for each group of answers, by model, task and budget, the best score first.

    Args:
        records: those of texts are left out.
        baseline: the label of what differences are taken from: at the same budget where it has that, else at 0.
    """
    groups = grouped(record for record in records if not is_text(record))
    found = [
        Row(
            cell=cell,
            n=len(_scores(members)),
            runs=len(members),
            score=rate_interval(list(_scores(members).values())),
            difference=_difference(cell, groups, baseline),
            baseline=baseline,
            compression=_mean(members, "compression"),
            peak_nbytes=_largest(members, "peak_nbytes"),
            tokens=_mean(members, "tokens"),
            loop=_mean(members, "loop"),
            loop_zip=_mean(members, "loop_zip"),
            rate=_rate(members),
            truncated=sum(one.details.get("finish") == "length" for one in members) / len(members),
        )
        for cell, members in groups.items()
    ]
    return sorted(found, key=lambda row: (*_place(row.cell), -row.score.estimate, row.cell.label))


def text_rows(records: Iterable[Record], baseline: str | None = None) -> list[TextRow]:
    """Return a row for each group of texts, by model, task and budget, the smallest divergence first.

    Args:
        records: those of answers are left out.
        baseline: the label of what differences are taken from; where None, the shortest that begins with ``vase``.
    """
    groups = grouped(record for record in records if is_text(record))
    if baseline is None:
        baseline = min((cell.label for cell in groups if cell.label.lower().startswith("vase")), key=len, default="")
    found = [
        TextRow(
            cell=cell,
            n=len(_scores(members)),
            runs=len(members),
            kl=mean_interval(list(_scores(members).values())),
            difference=_difference(cell, groups, baseline),
            baseline=baseline,
            agreement=_mean(members, "agreement"),
            loss=_loss(members),
            mass_lost=_mean(members, "mass_lost"),
            output_error=_mean(members, "output_error"),
            survival=_mean(members, "survival"),
            survival_union=_mean(members, "survival_union"),
            compression=_mean(members, "compression"),
            peak_nbytes=_largest(members, "peak_nbytes"),
        )
        for cell, members in groups.items()
    ]
    return sorted(found, key=lambda row: (*_place(row.cell), row.kl.estimate, row.cell.label))


def _scores(members: Sequence[Record]) -> dict[str, float]:
    return by_problem((one.problem, one.score) for one in members)


def _loss(members: Sequence[Record]) -> Interval | None:
    pairs = [(one.problem, one.details.get("full_log_prob"), one.details.get("log_prob")) for one in members]
    losses = by_problem(
        (problem, full - ours) for problem, full, ours in pairs if full is not None and ours is not None
    )
    return mean_interval(list(losses.values())) if losses else None


def _difference(cell: Cell, groups: Mapping[Cell, list[Record]], baseline: str) -> Interval | None:
    """Return the paired difference from the baseline of the same model and task, or None."""
    alike = [
        other for other in groups if baseline in (other.label, short(other.label)) and _setting(other) == _setting(cell)
    ]
    at_budget = {other.budget: other for other in alike}
    if len(at_budget) < len(alike):
        texts = " and ".join(sorted({other.policy for other in alike}))
        what = "name one as it was typed, or keep the results of one"
        raise EvaluationError(f"{baseline!r} is the name of several policies, {texts}: {what}")
    other = at_budget.get(cell.budget, at_budget.get(0))
    if other is None or baseline in (cell.label, short(cell.label)):
        return None
    ours, theirs = _scores(groups[cell]), _scores(groups[other])
    return paired_interval(ours, theirs) if len(ours.keys() & theirs.keys()) > 1 else None


def _setting(cell: Cell) -> Cell:
    return replace(cell, policy="", label="", budget=0, seed=0)


def _place(cell: Cell) -> tuple[Any, ...]:
    return (cell.model, cell.task, cell.budget)


def _numbers(members: Sequence[Record], name: str) -> list[float]:
    """Return a detail of each record that has it: a number, or the mean of a list over layers."""
    lists = [one.details[name] for one in members if one.details.get(name) is not None]
    flat = [[v for v in value if v is not None] if isinstance(value, list) else [value] for value in lists]
    return [sum(values) / len(values) for values in flat if values]


def _mean(members: Sequence[Record], name: str) -> float | None:
    values = _numbers(members, name)
    return sum(values) / len(values) if values else None


def _largest(members: Sequence[Record], name: str) -> int | None:
    return max(map(int, _numbers(members, name)), default=None)


def _rate(members: Sequence[Record]) -> float | None:
    timed = [one for one in members if None not in (one.details.get("tokens"), one.details.get("seconds"))]
    seconds = sum(_numbers(timed, "seconds"))
    return sum(_numbers(timed, "tokens")) / seconds if seconds else None
