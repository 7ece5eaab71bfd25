"""Read the pages of the documentation: their blocks of code, what these print, and their links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^(?P<pad> *)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=pad)```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (?P<why>[^>]+) -->\s*$")
TITLE = re.compile(r"title=\"(?P<title>[^\"]+)\"")
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """Hold one fenced block.

    Attributes:
        page: where it stands.
        line: of its first line of code, from 1.
        language: the first word behind the fence.
        code: without indentation.
        title: the name of the file that it is, from ``title="..."`` behind the fence; or None.
        prints: the ``text`` block that follows directly, which is what the code prints; or None.
        not_run: why it must not run, from a comment ``<!-- not run: why -->`` before it; or None.
    """

    page: Path
    line: int
    language: str
    code: str
    title: str | None
    prints: str | None
    not_run: str | None

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    """Return a page's path within the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the blocks of a page in some languages, in order."""
    text = page.read_text("utf-8")
    found = list(FENCE.finditer(text))
    made = []
    for match, following in zip(found, [*found, None][1:], strict=True):
        language = match["info"].split()[0] if match["info"].strip() else ""
        if language not in languages:
            continue
        prints = None
        if following is not None and following["info"].strip() == "text":
            between = text[match.end() : following.start()]
            prints = None if between.strip() else _code(following)
        why = NOT_RUN.search(text[: match.start()])
        line = text.count("\n", 0, match.start("body")) + 1
        found_title = TITLE.search(match["info"])
        title = found_title["title"] if found_title else None
        made.append(Block(page, line, language, _code(match), title, prints, why["why"] if why else None))
    return made


def links(page: Path) -> list[str]:
    """Return the targets of a page's links, outside of code."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text("utf-8")))
    return [match["target"] for match in LINK.finditer(text)]


def commands(page: Path) -> list[str]:
    """Return the commands of a page's console blocks, without what stands behind a ``#``."""
    made = []
    for block in blocks(page, "console", "bash"):
        assert block.language == "console", f"{block}: write console, and $ before each command"
        lines = iter(block.code.splitlines())
        for line in lines:
            if line.startswith("$ "):
                command = line[2:].split("  #")[0].strip()
                while _is_open(command):
                    command += "\n" + next(lines)
                made.append(command)
    return made


def _is_open(command: str) -> bool:
    """Return whether a quotation goes on in the next line."""
    try:
        shlex.split(command)
    except ValueError:
        return True
    return False


def _code(match: re.Match[str]) -> str:
    pad = len(match["pad"])
    lines = match["body"].splitlines(keepends=True)
    return "".join(line[pad:] if line.strip() else line for line in lines)
