"""``kvpolicy plot``: a figure of a trace, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli import console
from kvpolicy.cli.errors import CommandError
from kvpolicy.errors import RunError, one_line

__all__ = ["plot"]

KINDS = ("survival", "lifetimes", "memory", "values", "map")
ENDINGS = (".png", ".svg", ".pdf")


def plot(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="What kvpolicy trace --json wrote.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The figure: .png, .svg or .pdf.")],
    kind: Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}.")] = "survival",
    layer: Annotated[
        int | None, typer.Option(metavar="N", help="With values: the layer; by default the head with the largest one.")
    ] = None,
    head: Annotated[
        int | None, typer.Option(metavar="N", help="With --layer: the KV head; the first one by default.")
    ] = None,
    seen: Annotated[
        int | None, typer.Option(metavar="N", help="With map: what was held once so many tokens were seen.")
    ] = None,
) -> None:
    """Draw a trace: how long tokens stay, memory, values, or what each head holds."""
    if kind not in KINDS:
        raise CommandError(f"--kind {kind}: there is no such figure; there are {', '.join(KINDS)}")
    if out.suffix.lower() not in ENDINGS:
        raise CommandError(f"--out {out}: the name must end in one of {', '.join(ENDINGS)}")
    if layer is not None and kind != "values":
        raise CommandError(f"--layer {layer} goes with --kind values; leave it out")
    if head is not None and layer is None:
        raise CommandError(f"--head {head}: say of which layer, with --layer")
    if seen is not None and kind != "map":
        raise CommandError(f"--seen {seen} goes with --kind map; leave it out")
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport, reportMissingImports]
    except ModuleNotFoundError as error:
        raise RunError("figures need matplotlib, which is not installed: pip install 'kvpolicy[eval]'") from error

    from kvpolicy.tracing import plots
    from kvpolicy.tracing.traces import Trace

    try:
        found = Trace.load(trace)
    except OSError as error:
        raise CommandError(f"cannot read {trace}: {error.strerror or one_line(error)}") from error
    more: dict[str, Any] = {}
    if kind == "values":
        more = {"layer": layer, "head": head or 0}
    elif kind == "map":
        more = {"seen": seen}
    axes: Any = plots.KINDS[kind](found, **more)
    try:
        axes.figure.savefig(out, dpi=160)
    except OSError as error:
        raise CommandError(f"cannot write {out}: {error.strerror or one_line(error)}") from error
    console.note(f"the figure is in {out}")
