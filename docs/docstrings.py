"""Turn docstrings into Markdown for mkdocstrings.

They are written for a terminal: a role such as ``:class:`` becomes inline code, an indented block
behind ``::`` and a session that begins with ``>>>`` become fenced ones.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|meth|func|mod|attr):`~?(?:[\w.]+\.)?(\w+)`")
LITERAL = re.compile(r"^(?P<pad> *)(?P<lead>[^\n]*)::\n\n(?P<block>(?:(?P=pad) {4}[^\n]*\n?|\n)+)", re.MULTILINE)
SESSION = re.compile(r"^(?P<pad> *)>>> [^\n]*\n?(?:(?P=pad)[^\n]+\n?)*", re.MULTILINE)


def markdown(text: str) -> str:
    """Return a docstring as Markdown.

    >>> markdown("See :meth:`View.at`.")
    'See `at`.'
    """
    text = ROLE.sub(r"`\1`", text)
    text = SESSION.sub(lambda m: _fenced("pycon", m["pad"], m[0]), text)
    return LITERAL.sub(_literal, text)


def _literal(match: re.Match[str]) -> str:
    pad, lead, block = match["pad"], match["lead"], match["block"]
    body = "\n".join(line[4:] for line in block.rstrip().splitlines())
    is_python = re.search(r"^\s*(class|with|def|from|import|@)", body, re.MULTILINE)
    language = "python" if is_python else "text"
    return (f"{pad}{lead}:\n\n" if lead else "") + _fenced(language, pad, body)


def _fenced(language: str, pad: str, body: str) -> str:
    return f"{pad}```{language}\n{body.rstrip()}\n{pad}```\n\n"


class Docstrings(Extension):
    """Rewrite the docstring of every object that Griffe loads."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
