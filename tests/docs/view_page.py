"""Write the table of docs/write-a-policy.md from View itself: ``python -m tests.docs.view_page``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator

from kvpolicy import View, docstrings
from kvpolicy.cli import listing
from tests.docs.pages import ROOT
from tests.docs.zoo_pages import replaced

PAGE = ROOT / "docs" / "write-a-policy.md"
#: A docstring's ``[B, H]`` int64, and what follows.
_TENSOR = re.compile(r"``(\[[^]]+\])`` (in the cache's dtype|\w+(?: \(float64 for a float64 cache\))?)[,:] ")
_NEEDS = re.compile(r" Needs ``\"(\w+)\"``\.")
_ROLE = re.compile(r":meth:`(\w+)`")


@dataclasses.dataclass(frozen=True)
class Field:
    """Say what a name of a view is; empty where there is nothing to say.

    Attributes:
        name: of the attribute.
        shape: of a tensor.
        dtype: of a tensor, or the type of anything else.
        needs: what has to be declared.
        meaning: in words.
    """

    name: str
    shape: str
    dtype: str
    needs: str
    meaning: str


def fields() -> Iterator[Field]:
    """Yield what a view holds."""
    said = docstrings.meanings(inspect.getdoc(View) or "")
    for one in dataclasses.fields(View):
        assert one.name in said, f"View does not say what {one.name} is"
        yield _field(one.name, str(one.type), said[one.name])


def computed() -> Iterator[Field]:
    """Yield what a view computes when it is asked for it."""
    for name, one in vars(View).items():
        if isinstance(one, property) and one.fget is not None:
            hint = inspect.get_annotations(one.fget)["return"]
            said = " ".join((inspect.getdoc(one) or "").split())
            yield _field(name, hint, said.removeprefix("Return "))


def render(page: str) -> str:
    """Return the page with its table made anew."""
    head = ("field", "shape", "dtype or type", "needs", "what it is")
    table = listing.markdown(head, [_row(one) for one in (*fields(), *computed())])
    return replaced(page, "view", table.rstrip())


def _field(name: str, hint: str, said: str) -> Field:
    needs = _NEEDS.search(said)
    said = _NEEDS.sub("", said)
    tensor = _TENSOR.match(said)
    shape, dtype = ("", hint.removesuffix(" | None")) if tensor is None else tensor.groups()
    rest = said if tensor is None else said[tensor.end() :]
    return Field(name, shape, dtype, f'"{needs[1]}"' if needs else "", _shown(rest))


def _shown(text: str) -> str:
    return " ".join(_ROLE.sub(r"`\1`", text).replace("``", "`").split()).rstrip(".")


def _row(one: Field) -> tuple[str, ...]:
    def code(text: str) -> str:
        return f"`{text}`" if text else ""

    dtype = one.dtype if one.shape and " " in one.dtype else code(one.dtype)
    return code(one.name), code(one.shape), dtype, code(one.needs), one.meaning


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text("utf-8")), "utf-8")
