"""Silence what transformers, the hub's client and tqdm write to the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Silence warnings and progress bars of the model libraries, and give them back afterwards.

    Args:
        bars: leave progress bars alone, where a download may take minutes.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as library

    levels = library.get_verbosity(), hub.get_verbosity()
    had_bars = library.is_progress_bar_enabled()
    library.set_verbosity_error()
    hub.set_verbosity_error()
    if not bars:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            if not bars:  # some bars ask nobody
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        library.set_verbosity(levels[0])
        hub.set_verbosity(levels[1])
        if had_bars and not bars:
            library.enable_progress_bar()
