"""Read what docstrings and signatures say."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Parameter", "example", "links", "meanings", "parameters", "prose", "source", "summary", "written"]

#: A heading of a google-style docstring whose content the parameter table repeats.
_SECTION = re.compile(r"^(Args|Attributes):\s*$")
_STARS: dict[str, str] = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
_NUMBER = r"\d{4}\.\d{4,5}"
_ARXIV = re.compile(rf"arXiv[: ]\s*{_NUMBER}(?:(?:,| and|, and)\s+{_NUMBER})*", re.IGNORECASE)
_URL = re.compile(r"https?://[^\s)>\]`'\"]+")


@dataclass(frozen=True)
class Parameter:
    """Describe one parameter; ``default`` is empty where it must be given."""

    name: str
    type: str
    default: str
    meaning: str


def summary(thing: object) -> str:
    """Return the first sentence of a docstring, without ``Return``.

    >>> summary(links)
    'The papers and pages that a text names, each once.'
    """
    paragraph = " ".join(_text(thing).partition("\n\n")[0].split())
    first = re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph, maxsplit=1)[0].removeprefix("Return ")
    return first[:1].upper() + first[1:]


def links(text: str) -> list[str]:
    """Return the papers and pages that a text names, each once.

    >>> links("VaSE (arXiv 2606.03928); see https://arxiv.org/abs/2606.03928.")
    ['https://arxiv.org/abs/2606.03928']
    """
    found = [(match.start(), match[0].rstrip(".,;:")) for match in _URL.finditer(text)]
    for several in _ARXIV.finditer(text):  # arXiv 2606.03928 and 2609.03430
        found += [(several.start(), f"https://arxiv.org/abs/{number}") for number in re.findall(_NUMBER, several[0])]
    return list(dict.fromkeys(url for _, url in sorted(found, key=lambda one: one[0])))


def example(thing: Callable[..., Any]) -> str | None:
    """Return the first call of a function in the examples of its docstring; None where there is none.

    >>> from kvpolicy.policies import duo_attention
    >>> example(duo_attention)
    'duo_attention(2048, ((True, False), (False, False), (False, True)))'
    """
    for line in re.findall(r"^\s*>>> (.+)$", _text(thing), re.MULTILINE):
        try:
            calls = [one for one in ast.walk(ast.parse(line)) if isinstance(one, ast.Call)]
        except SyntaxError:  # the first line of several
            continue
        for call in calls:
            if isinstance(call.func, ast.Name) and call.func.id == thing.__name__:
                return ast.unparse(call)
    return None


def source(thing: object) -> str:
    """Return the paragraph of a docstring that begins with ``Source:``, without that word; empty where there is none.

    >>> from kvpolicy.policies import keydiff
    >>> source(keydiff)
    'https://arxiv.org/abs/2504.15364, section 3.'
    """
    found = re.search(r"^Source:\s*(.+?)(?=\n\s*\n|\Z)", _text(thing), re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def prose(thing: object) -> str:
    """Return a docstring without the list of parameters, which the signature knows better."""
    kept: list[str] = []
    skipping = False
    for line in _text(thing).splitlines():
        if _SECTION.match(line):
            skipping = True
        elif line and not line.startswith(" "):
            skipping = False
        if not skipping:
            kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def parameters(thing: Callable[..., Any]) -> list[Parameter]:
    """Return the parameters of a stage or a recipe."""
    said = meanings(_text(thing))
    return [
        Parameter(
            _STARS.get(one.kind.name, "") + name,
            _type(one.annotation),
            "" if one.default is one.empty else repr(one.default),
            said.get(name, ""),
        )
        for name, one in _signature(thing).parameters.items()
    ]


def meanings(docstring: str) -> dict[str, str]:
    """Return what the ``Args:`` or ``Attributes:`` section of a docstring says of each name."""
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in docstring.splitlines():
        if _SECTION.match(line):
            inside = True
        elif line and not line.startswith(" "):
            inside = False
        elif inside and (match := re.match(r"^ {4}(\w+)(?: \([^)]*\))?:\s*(.*)$", line)):
            name = match[1]
            found[name] = match[2]
        elif inside and name and line.strip():
            found[name] += " " + line.strip()
    return found


def written(thing: object) -> str:
    """Return the docstring that somebody wrote for a thing; empty where there is none.

    That is not one which a class inherits, since it tells of its base, nor the signature that ``dataclass``
    writes, nor that of the type of an object, as ``functools.partial`` has it.
    """
    if inspect.isroutine(thing) or inspect.ismodule(thing):
        return inspect.getdoc(thing) or ""
    text = getattr(thing, "__dict__", {}).get("__doc__")
    if not isinstance(text, str):
        return ""
    signature = isinstance(thing, type) and dataclasses.is_dataclass(thing) and text.startswith(f"{thing.__name__}(")
    return "" if signature else inspect.cleandoc(text)


def _text(thing: object) -> str:
    """Return a docstring as a terminal shows it: without the marks around code."""
    return written(thing).replace("``", "")


def _signature(thing: Callable[..., Any]) -> inspect.Signature:
    """Return a signature whose types are resolved where that is possible."""
    try:
        return inspect.signature(thing, eval_str=True)
    except NameError:  # a type that is imported for type checkers alone
        return inspect.signature(thing)


def _type(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
