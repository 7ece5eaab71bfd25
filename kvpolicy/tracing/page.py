"""A trace as one page: :func:`write_page`."""

from __future__ import annotations

import html
import json
import os
from importlib import resources
from pathlib import Path

from kvpolicy.tracing.traces import Trace

__all__ = ["page", "write_page"]


def write_page(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a page that shows a trace: one file, which needs no network and no server.

    Args:
        trace: what to show.
        path: of the file, which ends in ``.html``.
    """
    Path(path).write_text(page(trace), "utf-8")


def page(trace: Trace) -> str:
    """Return the page as text.

    Args:
        trace: what to show.
    """
    # In a script, `<` alone could end it; JSON may write any character as its number.
    data = json.dumps(trace.to_dict(), separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "TITLE": html.escape(f"Trace of {Path(trace.run['model']).name}"),
        "STYLE": _file("page.css"),
        "DATA": data,
        "CHARTS": _file("charts.js"),
        "VIEWS": _file("views.js"),
        "SCRIPT": _file("page.js"),
    }
    template = _file("page.html")
    pieces = template.split("{{")
    made = [pieces[0]]
    for piece in pieces[1:]:  # never look for names in what was filled in
        name, _, rest = piece.partition("}}")
        made += [parts[name], rest]
    return "".join(made)


def _file(name: str) -> str:
    return resources.files("kvpolicy.tracing").joinpath(name).read_text("utf-8")
