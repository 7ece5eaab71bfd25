"""The prompt: where it comes from, and the tokens that it becomes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kvpolicy.cli.errors import CommandError, one_line

__all__ = ["encode", "read_prompt"]


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


def encode(tokenizer: Any, prompt: str, *, chat: bool | None, system: str | None) -> dict[str, Any]:
    """Return the prompt as ``input_ids`` and ``attention_mask``, both ``[1, T]``.

    Args:
        tokenizer: of the model.
        prompt: as it was written.
        chat: put it into the model's chat template; where None, if there is one.
        system: a system message before it.

    Raises:
        CommandError: there is no chat template, or it refuses the messages.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise CommandError("--chat: the tokenizer of this model has no chat template; leave it out")
    chat = has_template if chat is None else chat
    if system is not None and not chat:
        why = "goes with a chat template, which this model has not" if not has_template else "contradicts --no-chat"
        raise CommandError(f"--system {why}; leave it out, or put it into the prompt")
    if not chat:
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template raises what it likes
            raise CommandError(f"the chat template of this model refuses: {one_line(error)}") from error
    ids = encoded["input_ids"]
    if ids.shape[-1] == 0:
        raise CommandError("the tokenizer makes no token of this prompt")
    return {"input_ids": ids, "attention_mask": encoded["attention_mask"]}
