"""Silence what transformers, the hub's client and tqdm write to the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["quiet", "silent"]


@contextmanager
def quiet() -> Generator[None]:
    """Silence what the model libraries log below an error, and give them back afterwards."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as library

    levels = library.get_verbosity(), hub.get_verbosity()
    library.set_verbosity_error()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(levels[0])
        hub.set_verbosity(levels[1])


@contextmanager
def silent() -> Generator[None]:
    """Silence progress bars and warnings as well: for work whose noise says nothing."""
    with quiet(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        from transformers.utils import logging as library

        had_bars = library.is_progress_bar_enabled()
        library.disable_progress_bar()
        warnings.simplefilter("ignore")
        try:
            yield  # some bars ask nobody, and write to stderr
        finally:
            if had_bars:
                library.enable_progress_bar()
