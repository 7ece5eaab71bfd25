"""``kvpolicy trace``: write text, and a page that shows what each head kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.cli import console
from kvpolicy.cli.errors import CommandError
from kvpolicy.cli.generate import (
    DTYPE_HELP,
    MODEL_HELP,
    POLICY_HELP,
    check_numbers,
    chosen_policy,
    load_model,
    warn_if_idle,
    warn_if_too_long,
)
from kvpolicy.cli.prompt import read_prompt

__all__ = ["trace"]


def trace(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads standard input.", show_default=False)
    ] = None,
    *,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Read the prompt from a file.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page into this file.")] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the trace, for kvpolicy plot and Trace.load().")
    ] = None,
    policy: Annotated[str, typer.Option(metavar="TEXT", help=POLICY_HELP)] = "vase(256)",
    interval: Annotated[
        str | None,
        typer.Option(metavar="N|none", help="Tokens between two evictions, instead of the policy's."),
    ] = None,
    recent: Annotated[
        int | None,
        typer.Option(metavar="N", help="Last tokens that always stay, instead of the policy's."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME|FOLDER", help=MODEL_HELP)] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate at most.")] = 512,
    temperature: Annotated[
        float, typer.Option(metavar="F", help="0 takes the likeliest token; above 0 samples.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the sampling, and of the policy's noise.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template. By default, if the model has one."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help=DTYPE_HELP)] = "auto",
    device: Annotated[
        str,
        typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ... or auto: CUDA where there is one."),
    ] = "auto",
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
