"""Whose results these are: a fingerprint of a model's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kvpolicy.cli.errors import CommandError

__all__ = ["fingerprint", "folder_of"]

SAMPLE = 1 << 16  #: bytes at either end of a file of weights


def folder_of(name: str) -> Path:
    """Return the folder of a model, on the disk or in the hub's local cache.

    Raises:
        CommandError: it is in neither.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, "config.json")
    except OSError as error:
        raise CommandError(f"cannot load {name}: there is neither such a folder nor such a model on the hub") from error
    assert found is not None
    return Path(found).parent


def fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits that tell configuration and weights: sizes, and both ends of each file.

    Raises:
        CommandError: the folder holds no weights.
    """
    weights = sorted(path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
    if not weights:
        raise CommandError(f"the folder {folder} holds no weights: there is no .safetensors file in it")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]
