"""Write the tables of a page from result files: ``python -m benchmarks.quality.page PAGE RESULTS ...``.

Blocks of the page name a model and a task, and are written anew: ``<!-- results: MODEL TASK -->`` ... ``<!-- end -->``
has the policies that were compared, ``<!-- ablation: MODEL TASK -->`` ... ``<!-- end -->`` the parts of VaSE.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from kvpolicy.evaluation.leaderboard import ABLATION, LEADERBOARD
from kvpolicy.evaluation.measures import is_text
from kvpolicy.evaluation.record import FULL, Record
from kvpolicy.evaluation.results import read
from kvpolicy.evaluation.table import footer, legend, markdown, rows, text_rows

BLOCK = re.compile(
    r"(?P<begin><!-- (?P<kind>results|ablation): (?P<name>.+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)
LEGEND = "policies"


def written(page: str, records: Sequence[Record], baseline: str | None = None) -> str:
    """Return a page with the tables of some records.

    Args:
        page: Markdown with blocks.
        records: of any models and tasks.
        baseline: what texts are compared with; VaSE by default. Parts of VaSE are compared with top-k.

    Raises:
        SystemExit: a block has no record.
    """
    parts = set(ABLATION) - set(LEADERBOARD)

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name == LEGEND:
            text = _policies(records)
        elif match["kind"] == "ablation":
            at = {0, *(one.cell.budget for one in records if one.cell.label in parts)}  # not all that were compared
            text = _table(
                name, [one for one in records if one.cell.label in ABLATION and one.cell.budget in at], "top-k"
            )
        else:
            text = _table(name, [one for one in records if one.cell.label not in parts], baseline)
        return f"{match['begin']}\n{text}\n{match['end']}"

    return BLOCK.sub(block, page)


def _table(name: str, records: Sequence[Record], baseline: str | None) -> str:
    model, _, task = name.partition(" ")
    mine = [one for one in records if (one.cell.model, one.cell.task) == (model, task)]
    if not mine:
        raise SystemExit(f"no result of {model} on {task}: run it first")
    found = text_rows(mine, baseline) if is_text(mine[0]) else rows(mine, baseline or FULL)
    made_with = {made for one in mine for made in one.versions.items()}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(made_with))
    notes = "".join(f"- {line.replace('*', chr(92) + '*')}\n" for line in footer(found))
    shown = markdown(found, without=("model", "task", "peak KV bytes", "output error, %", "tokens/s"))
    dtypes = ", ".join(sorted({one.cell.dtype for one in mine}))
    return f"{shown}\n{notes}- {versions}; {dtypes}.\n"


def _policies(records: Sequence[Record]) -> str:
    found = [*legend(rows(records)), *legend(text_rows(records))]
    named = (one.partition(": ") for one in dict.fromkeys(found))
    return "".join(f"- {name}: `{text}`\n" for name, _, text in named)


def main() -> None:
    """Write a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument(
        "--baseline", help="what differences are from; by default VaSE for texts, the full cache for answers"
    )
    given = parser.parse_args()
    given.page.write_text(written(given.page.read_text("utf-8"), read(given.results), given.baseline), "utf-8")


if __name__ == "__main__":
    main()
