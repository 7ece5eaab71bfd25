"""Whose results these are: a fingerprint of a model's files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from kvpolicy.errors import LoadError, one_line
from kvpolicy.hub import unreachable

__all__ = ["fingerprint", "folder_of", "positions"]

#: What an answer depends on beside the weights.
SETTINGS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
WEIGHTS = ("*.safetensors", "*.bin")
SAMPLES, SAMPLE = 256, 1 << 12  #: pieces of a file of weights, and bytes of each


def folder_of(name: str) -> Path:
    """Return the folder of a model, on the disk or in the hub's local cache, fetched if it is not there.

    Raises:
        LoadError: there is no such model.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    wanted, is_local = [*SETTINGS, "*.safetensors"], bool(unreachable())
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=is_local))
    except Exception as error:  # the hub's client raises errors of its own, and those of the network
        raise LoadError(f"cannot load {name}: {one_line(error)}") from error


def fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits that tell settings, tokenizer and weights, these by pieces all over each file.

    Raises:
        LoadError: the folder holds no weights.
    """
    weights = sorted(path for kind in WEIGHTS for path in folder.glob(kind))
    if not weights:
        raise LoadError(f"the folder {folder} holds no weights: there is no .safetensors file in it")
    digest = hashlib.sha256()
    for path in sorted({path for kind in SETTINGS for path in folder.glob(kind)}):
        digest.update(path.name.encode() + path.read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for piece in range(SAMPLES):
                file.seek(max(0, (size - SAMPLE) * piece // (SAMPLES - 1)))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def positions(folder: Path) -> int | None:
    """Return how many positions a model was trained for; None where its configuration does not say."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    found = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return found if isinstance(found, int) else None
