"""``kvpolicy trace``: write text, and a page that shows what each head kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.cli import console, options
from kvpolicy.cli.errors import CommandError
from kvpolicy.cli.generate import (
    check_numbers,
    chosen_policy,
    load_model,
    warn_if_idle,
    warn_if_too_long,
)
from kvpolicy.cli.prompt import read_prompt

__all__ = ["trace"]


def trace(
    prompt: options.Prompt = None,
    *,
    prompt_file: options.PromptFile = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page into this file.")] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the trace, for kvpolicy plot and Trace.load().")
    ] = None,
    policy: options.PolicyText = "vase(256)",
    interval: options.Interval = None,
    recent: options.Recent = None,
    model: options.ModelName = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    chat: options.Chat = None,
    system: options.System = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Write text while a policy keeps the KV cache small, and show what each head kept of it.

    The text goes to standard output, the page into --html: one file, which needs no network.
    """
    text = read_prompt(prompt, prompt_file)
    chosen = chosen_policy(policy, interval, recent)
    check_numbers(max_new_tokens, temperature, seed)
    _check_files(html, json)
    loaded = load_model(model, dtype, device)

    from kvpolicy.cli.running import run
    from kvpolicy.generation import Sampling, encode
    from kvpolicy.tracing.cache import RecordingCache
    from kvpolicy.tracing.page import write_page
    from kvpolicy.tracing.recording import pieces_of, run_of

    inputs = encode(loaded.tokenizer, text, chat=chat, system=system)
    sampling = Sampling(max_new_tokens, temperature, seed)
    warn_if_too_long(loaded, inputs, sampling)
    with RecordingCache(loaded.model, chosen, max_new_tokens=max_new_tokens, seed=seed) as cache:
        found = run(loaded, inputs, cache, sampling)
        receipt = cache.receipt()
        ids = [*inputs["input_ids"][0].tolist(), *found.tokens]
        about = run_of(
            loaded.model, chosen, sampling, text, chat=chat, system=system, name=model or Path(loaded.name).name
        )
        recorded = cache.trace(ids, pieces_of(loaded.tokenizer, ids), about)
    warn_if_idle(receipt, chosen)
    console.note(str(recorded), style="dim")
    if json is not None:
        recorded.save(json)
        console.note(f"the trace is in {json}")
    if html is not None:
        write_page(recorded, html)
        console.note(f"the page is in {html}")


def _check_files(html: Path | None, json: Path | None) -> None:
    """Refuse what cannot be written before a model runs for minutes."""
    if html is None and json is None:
        raise CommandError("there is nowhere to write the trace: give --html FILE for a page, or --json FILE, or both")
    for option, file in (("--html", html), ("--json", json)):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            why = "it is a folder" if file.is_dir() else f"there is no folder {file.parent}"
            raise CommandError(f"{option} {file}: {why}; name a file in a folder that exists")
