"""Load a model and its tokenizer by the name of a folder or of the Hugging Face hub."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvpolicy.errors import IncompleteWarning, LoadError, OfflineError, RunError, one_line
from kvpolicy.hub import unreachable

__all__ = ["Loaded", "load", "load_tokenizer", "source_of"]


@dataclass(frozen=True)
class Loaded:
    """Hold a model, its tokenizer, and what the user calls it."""

    name: str
    model: Any
    tokenizer: Any


def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    working: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Loaded:
    """Load a causal language model and its tokenizer, and warn of weights that are missing.

    Args:
        name: a folder, or a model's name on the hub.
        dtype: of the weights.
        device: where they go.
        working: given what is being done, returns a context to do it in, which may show progress.

    Raises:
        LoadError: there is no such model, or it is not one that generates text.
        OfflineError: the hub cannot be reached.
        RunError: a package is missing, or the device has not enough memory.
    """
    source, options = source_of(name)
    label = Path(source).name if options["local_files_only"] else name
    with working(f"loading {label} ({str(dtype).removeprefix('torch.')} on {device})"):
        try:
            return _load(name, source, dtype, device, options)
        except ImportError as error:
            raise RunError(f"loading {name} needs more packages: {one_line(error)}") from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise RunError(f"{name} does not fit into the memory of {device}: {one_line(error)}") from error
        except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
            raise LoadError(f"cannot load {name}: {one_line(error)}") from error


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model alone.

    Args:
        name: a folder, or a model's name on the hub.

    Raises:
        LoadError: there is no such model, or it has no tokenizer.
        OfflineError: the hub cannot be reached.
    """
    from kvpolicy.quiet import silent

    source, options = source_of(name)
    try:
        with silent():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        raise LoadError(f"cannot load the tokenizer of {name}: {one_line(error)}") from error


def _load(name: str, source: str, dtype: torch.dtype, device: torch.device, options: dict[str, Any]) -> Loaded:
    from kvpolicy.quiet import quiet, silent

    # A download may take minutes: its progress bars stay.
    with silent() if options["local_files_only"] else quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        read: Any = AutoModelForCausalLM.from_pretrained  # what it returns depends on an option
        model, info = read(source, dtype=dtype, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if missing := sorted(info["missing_keys"]):
        warnings.warn(
            f"{name} lacks {len(missing)} weights, which are random now: {', '.join(missing[:3])}",
            IncompleteWarning,
            stacklevel=3,
        )
    model.generation_config.cache_implementation = None  # the cache is ours to choose
    return Loaded(name, model.to(device).eval(), tokenizer)


def source_of(name: str) -> tuple[str, dict[str, Any]]:
    """Return what to hand to transformers, and whether it may look at the network.

    Raises:
        LoadError: neither a folder nor a name.
        OfflineError: the hub cannot be reached and the model is not in the local cache.
    """
    path = Path(name).expanduser()
    if name.strip() and path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(f"the folder {name} holds no model: there is no config.json in it")
        return str(path), {"local_files_only": True}
    if path.is_file():
        raise LoadError(f"{name} is a file; `name` takes the folder that holds config.json, or a hub name")
    if not name.strip() or name.startswith((".", "/", "~", "\\")) or name.count("/") > 1:
        raise LoadError(f"there is no folder {name!r}; `name` takes a folder, or a hub name (owner/model)")
    return name, {"local_files_only": not _hub_answers(name)}


def _hub_answers(name: str) -> bool:
    """Return whether the hub may be asked for a model; without it, the local cache must do.

    Raises:
        OfflineError: the hub cannot be reached and the model is not in the local cache.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError as error:
        raise LoadError(f"{name!r} is neither a folder nor a hub name: {one_line(error)}") from error
    why = unreachable()
    if why and not cached:
        raise OfflineError(
            f"the model {name} is neither a folder nor in the local cache, and {why}: connect to "
            "the network, or give the folder of a model that you have"
        )
    return not why
