"""The file of results: one line of JSON a finished problem, appended a batch at a time.

A run that is killed loses the batch it was at and nothing else: a batch is one write, the file is
locked while a run has it open, and a last line that was cut is dropped when the file is opened again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from kvpolicy.errors import IncompleteWarning, RunError
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.record import Cell, Record
from kvpolicy.locks import locked

__all__ = ["SCHEMA", "Results", "cell_from_dict", "decode", "encode", "read", "record_from_dict", "to_dict"]

SCHEMA = 1  #: the version of a line; another one is refused
HEAD = b'{"schema":'  # how every line begins, hence also one that was cut

_SHARE = (0.0, 1.0)
#: Between what the numbers of a record lie, where they are there.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("agreement", "compression", "survival", "survival_union"), _SHARE),
    **dict.fromkeys(("batch", "evictions", "peak_nbytes", "prompt_tokens", "seconds", "tokens"), (0.0, math.inf)),
    **dict.fromkeys(("full_log_prob", "kl", "log_prob"), (-math.inf, math.inf)),
}

Finished = dict[Cell, dict[str, Record]]


class Results:
    """Hold the finished problems of one file, and append to it.

    Made by :meth:`Results.open`.
    """

    def __init__(self, path: Path, descriptor: int, finished: Finished) -> None:
        self.path = path
        self._descriptor = descriptor
        self._finished = finished

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Generator[Results]:
        """Open a file for one run, made if it is missing; a last line that was cut is dropped, with a warning.

        Raises:
            EvaluationError: another run has it open, it cannot be written, or a line of it cannot be read;
                the file is then as it was.
        """

        def refuse() -> NoReturn:
            raise EvaluationError(f"{path} is being written by another run: wait for it, or write to another file")

        with ExitStack() as stack:
            try:
                has_lock = stack.enter_context(locked(path, refuse))
            except OSError as error:
                raise EvaluationError(f"cannot write results to {path}: {error.strerror}; name another file") from error
            if not has_lock:
                why = f"{path} cannot be locked here: see to it that no other run writes it"
                warnings.warn(why, IncompleteWarning, stacklevel=3)
            finished: Finished = {}
            whole = _load(path, finished)
            if whole < path.stat().st_size:
                os.truncate(path, whole)
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
            stack.callback(os.close, descriptor)
            yield cls(path, descriptor, finished)

    def append(self, records: Sequence[Record]) -> None:
        """Write a batch in one piece, and wait until the disk has it.

        Raises:
            RunError: a record cannot be written as JSON (a NaN, say), its problem is finished already, or
                the disk took only a part; the file is then as it was.
        """
        lines = [encode(record) for record in records]
        read_back = [decode(line) for line in lines]  # what the next run will see: lists for tuples
        keys = [(record.cell, record.problem) for record in read_back]
        for cell, problem in keys:
            if problem in self._finished.get(cell, {}) or keys.count((cell, problem)) > 1:
                raise RunError(f"{self.path} would have problem {problem!r} of {_name(cell)} twice: write it once")
        self._write(b"".join(lines))
        for record in read_back:
            self._finished.setdefault(record.cell, {})[record.problem] = record

    def finished(self, cell: Cell) -> dict[str, Record]:
        """Return the finished problems of a cell, by their ids, in the order of the file."""
        return dict(self._finished.get(cell, {}))

    def records(self) -> list[Record]:
        """Return all finished problems, cell by cell."""
        return _flat(self._finished)

    def _write(self, data: bytes) -> None:
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, data)
            if written < len(data):
                raise OSError(0, f"the disk took {written} of {len(data)} bytes")
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, size)
            raise RunError(f"cannot append to {self.path}: {error.strerror}; make room and start it again") from error


def read(paths: Path | Sequence[Path]) -> list[Record]:
    """Return the records of one file or of several, which are only read.

    A problem that several files have with the same content counts once. A last line that was cut, or
    that a run is writing now, is left out with a warning.

    Raises:
        EvaluationError: a file is not there, a line cannot be read, or two lines contradict each other.
    """
    finished: Finished = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        _load(path, finished)
    return _flat(finished)


def encode(record: Record) -> bytes:
    """Return the line of a record: the schema first, then all keys sorted, no spaces, a newline at the end.

    Raises:
        RunError: JSON has no such value, or a field is of another type than it should be.
    """
    try:
        fields = to_dict(record_from_dict(to_dict(record)))  # refuses other types, makes 1 a 1.0
        body = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RunError(f"problem {record.problem!r} of {_name(record.cell)} cannot be written: {error}") from error
    return HEAD + f"{SCHEMA},{body[1:]}\n".encode()


def decode(line: bytes) -> Record:
    """Return the record of a line.

    Raises:
        ValueError: it is no such line; the message says why.
    """
    fields = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")
    schema = fields.pop("schema", None)
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema!r}, and this version of kvpolicy reads {SCHEMA}")
    return record_from_dict(fields)


def to_dict(record: Record | Cell) -> dict[str, Any]:
    """Return the fields of a record, or of a cell, by name."""
    return dataclasses.asdict(record)


def record_from_dict(fields: dict[str, Any]) -> Record:
    """Return the record that has these fields.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    kinds = {"cell": dict, "problem": str, "score": float, "details": dict, "versions": dict}
    checked = _checked(fields, kinds)
    if not math.isfinite(checked["score"]):
        raise ValueError(f"its score is {checked['score']}, which is not finite")
    if "kl" not in checked["details"]:
        _within("score", checked["score"], *_SHARE)
    for name, value in checked["details"].items():
        if name in _RANGES and value is not None:
            _within(name, value, *_RANGES[name])
    return Record(cell_from_dict(checked.pop("cell")), **checked)


def _within(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"its {name} is {value!r}, expected a number")
    if not least <= value <= most:
        raise ValueError(f"its {name} is {value!r}, expected {least:g} to {most:g}".replace(" to inf", " or more"))


def cell_from_dict(fields: dict[str, Any]) -> Cell:
    """Return the cell that has these fields.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    kinds = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in dataclasses.fields(Cell)}
    return Cell(**_checked(fields, kinds))


def _checked(fields: dict[str, Any], kinds: dict[str, type]) -> dict[str, Any]:
    """Return the fields, whole numbers made floats where a float is due."""
    if missing := sorted(kinds.keys() - fields.keys()):
        raise ValueError(f"it has no field {missing[0]!r}")
    if unknown := sorted(fields.keys() - kinds.keys()):
        raise ValueError(f"it has an unknown field {unknown[0]!r}")
    checked: dict[str, Any] = {}
    for name, kind in kinds.items():
        value = float(fields[name]) if kind is float and type(fields[name]) is int else fields[name]
        if type(value) is not kind:
            raise ValueError(f"its field {name!r} is {value!r}, expected {kind.__name__}")
        checked[name] = value
    return checked


def _load(path: Path, finished: Finished) -> int:
    """Add the records of a file; return how many bytes its whole lines have."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"cannot read results from {path}: {error.strerror}; name another file") from error
    *lines, cut = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            _add(decode(line), finished)
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, number, str(error)) from error
    if cut and not HEAD.startswith(cut[: len(HEAD)]):  # never shorten a file that is none of ours
        raise _unreadable(path, len(lines) + 1, "it is not a line of results")
    if cut:
        why = f"{path}: the last line was cut in the middle of a write, and is dropped"
        warnings.warn(why, IncompleteWarning, stacklevel=3)
    return len(data) - len(cut)


def _add(record: Record, finished: Finished) -> None:
    cell = finished.setdefault(record.cell, {})
    if cell.setdefault(record.problem, record) != record:
        raise ValueError(f"problem {record.problem!r} of {_name(record.cell)} was there before, with another content")


def _unreadable(path: Path, number: int, why: str) -> EvaluationError:
    return EvaluationError(
        f"{path}, line {number} cannot be read: {why}; repair the line, delete it, or name another file"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it has a {name}")


def _flat(finished: Finished) -> list[Record]:
    return [record for cell in finished.values() for record in cell.values()]


def _name(cell: Cell) -> str:
    return f"{cell.model}, {cell.task}, {cell.policy}, seed {cell.seed}"
