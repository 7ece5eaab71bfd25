"""Where the prompt comes from."""

from __future__ import annotations

import sys
from pathlib import Path

from kvpolicy.cli.errors import CommandError
from kvpolicy.errors import one_line

__all__ = ["read_prompt"]


def read_prompt(text: str | None, file: Path | None) -> str:
    """Return the prompt: the text itself, stdin where it is ``-``, or a file's content.

    Raises:
        CommandError: there is none, or two, or it is empty or cannot be read.
    """
    if text is not None and file is not None:
        raise CommandError(f"both a prompt and --prompt-file {file} are given; give one of them")
    if file is not None:
        prompt, source = _read_file(file), f"the file {file}"
    elif text == "-":
        prompt, source = _read_stdin(), "standard input"
    elif text is not None:
        prompt, source = text, "the prompt"
    else:
        raise CommandError("there is no prompt: write it in quotes, or - to read standard input, or --prompt-file FILE")
    if not prompt.strip():
        raise CommandError(f"{source} is empty; a prompt needs at least one word")
    return prompt if prompt is text else prompt.rstrip("\r\n")


def _read_file(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"the prompt file {file} is not UTF-8 text: {one_line(error)}") from error
    except OSError as error:
        raise CommandError(f"cannot read the prompt file {file}: {error.strerror or error}") from error


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise CommandError(f"standard input is not text: {one_line(error)}") from error
