"""The commands, and what becomes of an error: one line on stderr and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from kvpolicy.cli import checking, evaluate, explaining, generate, harness, listing, new, plot, showing, tracing
from kvpolicy.cli.console import note, warnings_shown
from kvpolicy.cli.errors import exit_code, line
from kvpolicy.errors import KVPolicyError, one_line

__all__ = ["app", "run"]

INTERRUPTED = 128 + signal.SIGINT
#: The base of what typer raises for bad options: click's, or typer's own copy of it.
ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="kvpolicy",
    help="Decide what a language model may forget: KV-cache eviction policies.",
    epilog="Exit codes: 0 done, 1 it failed on the way, 2 the command is wrong, 130 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("check")(checking.check)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("explain")(explaining.explain)
app.command("list")(listing.list_)
app.command("lm-eval", context_settings=harness.PASSED_ON)(harness.lm_eval)
app.command("new")(new.new)
app.command("plot")(plot.plot)
app.command("show")(showing.show)
app.command("trace")(tracing.trace)


def _print_version(wanted: bool) -> None:
    if wanted:
        import kvpolicy

        typer.echo(f"kvpolicy {kvpolicy.__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Decide what a language model may forget: KV-cache eviction policies."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return the exit code.

    ``--traceback`` anywhere, or ``KVPOLICY_TRACEBACK=1``, shows where an error came from.
    """
    asked = [word for word in arguments if word != "--traceback"]
    with_traceback = len(asked) < len(arguments) or _is_set("KVPOLICY_TRACEBACK")
    for stream in (sys.stdout, sys.stderr):  # a model may write what the terminal cannot
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
    try:
        with warnings_shown():
            code = app(args=asked or ["--help"], prog_name="kvpolicy", standalone_mode=False) or 0
        sys.stdout.flush()
        if code == INTERRUPTED:  # newer typer makes this of a KeyboardInterrupt
            raise KeyboardInterrupt
        return int(code)
    except BrokenPipeError:  # whoever read the output has gone: `kvpolicy list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, Exception) as error:
        if with_traceback:
            traceback.print_exc()
        message, code = _explain(error)
    note(message, style="yellow" if code == INTERRUPTED else "red")
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    """Return the line and the exit code that an error becomes."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted", INTERRUPTED
    if isinstance(error, ClickException):
        usage: Any = error
        return f"error: {one_line(usage.format_message())} (see --help)", 2
    if isinstance(error, KVPolicyError):
        return f"error: {line(error)}", exit_code(error)
    if isinstance(error, MemoryError):
        return f"error: out of memory: {one_line(error)}", 1
    kind = type(error).__name__
    return f"error: {kind}: {one_line(error)} (KVPOLICY_TRACEBACK=1 shows where)", 1


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")
