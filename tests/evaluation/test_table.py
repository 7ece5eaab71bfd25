"""A row is what its records say, each difference is from the right baseline, and a table shows it all."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.record import Record
from kvpolicy.evaluation.statistics import Interval, mean_interval, paired_interval, rate_interval
from kvpolicy.evaluation.table import (
    NARROW,
    Row,
    TextRow,
    footer,
    legend,
    markdown,
    rich_tables,
    rows,
    text_rows,
)
from tests.evaluation.records import FULL, answer, answers, cell, text, texts

VASE, SNAP = cell("vase(b)", 64), cell("snapkv(b)", 64)
ONES = [1.0] * 8


def cells(page: str) -> list[dict[str, str]]:
    """The lines of a table in Markdown, by the names of the columns."""
    names, _, *lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines()]
    return [dict(zip(names, line, strict=True)) for line in lines]


def printed(tables: list[Table]) -> str:
    file = io.StringIO()
    for table in tables:
        Console(file=file, width=400).print(table)
    return file.getvalue()


def test_what_a_row_says_of_answers() -> None:
    [row] = rows(
        [
            answer(VASE, "a", 1.0, tokens=100, seconds=1.0, peak_nbytes=10, compression=0.5, finish="length"),
            answer(VASE, "b", 0.0, tokens=300, seconds=3.0, peak_nbytes=30, compression=0.25, loop=True),
            answer(VASE, "c", 0.0, tokens=800, seconds=1.0, peak_nbytes=20, compression=0.25, loop=True),
            answer(VASE, "d", 0.0, tokens=800, seconds=1.0, peak_nbytes=20, compression=1.0, loop_zip=True),
        ]
    )
    assert (row.n, row.runs) == (4, 4)
    assert row.score == rate_interval([1.0, 0.0, 0.0, 0.0])
    assert row.difference is None
    assert (row.compression, row.peak_nbytes, row.tokens) == (0.5, 30, 500)
    assert (row.loop, row.loop_zip, row.truncated) == (0.5, 0.25, 0.25)
    assert row.rate == pytest.approx(2000 / 6)  # not the mean of the four rates


def test_what_a_row_says_of_texts() -> None:
    records = [
        text(VASE, "a", 0.1, mass_lost=[0.0, 0.5], log_prob=-3.0, full_log_prob=-2.0),
        text(VASE, "b", 0.3, mass_lost=[0.5, None], log_prob=-3.0, full_log_prob=-2.5, survival=None),
    ]
    [row] = text_rows(records)
    assert (row.n, row.runs) == (2, 2)
    assert row.kl == mean_interval([0.1, 0.3])
    assert row.loss == mean_interval([1.0, 0.5])
    assert row.mass_lost == pytest.approx((0.25 + 0.5) / 2)
    assert row.output_error == pytest.approx(0.3)
    assert (row.agreement, row.survival, row.survival_union) == (0.9, 0.25, 0.5)
    assert (row.compression, row.peak_nbytes) == (0.5, 2048)


def test_seeds_are_pooled_into_a_row_and_averaged_by_problem() -> None:
    one = replace(VASE, seed=1)
    [row] = rows(answers(VASE, [1.0, 0.0, 0.0]) + answers(one, [1.0, 1.0, 0.0]))
    assert (row.n, row.runs) == (3, 6)
    assert row.score == rate_interval([1.0, 0.5, 0.0])
    assert row.cell == VASE


def test_another_policy_under_one_label_is_a_row_of_its_own() -> None:
    other = replace(VASE, policy="Policy(ValueGuard(share=0.5) >> Stochastic() >> TopK(64))")
    assert [row.score.estimate for row in rows(answers(VASE, [0.0] * 3) + answers(other, [1.0] * 3))] == [1.0, 0.0]


def test_settings_that_differ_are_shown() -> None:
    others = [VASE, replace(VASE, max_new_tokens=64), replace(VASE, temperature=0.6, top_p=0.95)]
    lines = cells(markdown(rows([one for other in others for one in answers(other, [1.0] * 3)])))
    assert len({line["setting"] for line in lines}) == 3


def test_differences_are_from_the_baseline_over_shared_problems() -> None:
    records = answers(FULL, ONES) + answers(VASE, [1.0] + [0.0] * 7) + answers(SNAP, [1.0, 0.0])
    full, snap, vase = rows(records)
    assert full.difference is None
    assert vase.difference == Interval(-0.875, -1.0, -0.5, 8)
    assert snap.difference is not None
    assert snap.difference.n == 2
    assert not snap.difference.excludes_zero
    lines = cells(markdown([full, snap, vase]))
    assert [line["difference, points"] for line in lines] == [
        "–",
        "-50.0 [-100.0, 0.0]",
        "-87.5 [-100.0, -50.0]\\*",
    ]
    [_, few] = rows(answers(FULL, ONES) + answers(SNAP, [1.0]))
    assert few.difference is None


def test_a_difference_over_fewer_problems_says_how_many() -> None:
    _, vase = rows(answers(FULL, ONES) + answers(VASE, [0.0] * 12))
    assert cells(markdown([vase]))[0]["difference, points"] == "-100.0 [-100.0, -100.0]\\* (n 8)"


def test_a_baseline_that_evicts_is_taken_at_the_same_budget() -> None:
    records: list[Record] = []
    for budget, score in ((64, 0.0), (128, 1.0)):
        records += answers(cell("snapkv(b)", budget), [score] * 8) + answers(cell("vase(b)", budget), ONES)
    found = {(row.cell.label, row.cell.budget): row.difference for row in rows(records, "snapkv(b)")}
    assert found["snapkv(b)", 64] is found["snapkv(b)", 128] is None
    assert found["vase(b)", 64].estimate == 1.0
    assert found["vase(b)", 128].estimate == 0.0
    assert all(row.difference is None for row in rows(records))  # no full cache here


@pytest.mark.parametrize(
    "change", [{"model": "m"}, {"task": "aime"}, {"dtype": "float16"}, {"temperature": 0.5}, {"weights": "f"}]
)
def test_differences_and_rows_keep_models_tasks_and_settings_apart(change: dict[str, object]) -> None:
    records = answers(FULL, ONES) + answers(replace(VASE, **change), [0.0] * 8)
    found = rows(records)
    assert len(found) == 2
    assert all(row.difference is None for row in found)
    first, second = cells(markdown(found))
    (name,) = change
    told_apart_by = name if name in ("model", "task") else "setting"
    assert first[told_apart_by] != second[told_apart_by]
    assert ("setting" in first) == (told_apart_by == "setting")


def test_texts_are_set_against_vase_unless_another_is_asked_for() -> None:
    records = texts(VASE, [0.1] * 8) + texts(SNAP, [0.3] * 8) + texts(cell("vase_dkv(b)", 64), [0.2] * 8)
    vase, dkv, snap = text_rows(records)
    assert [row.cell.label for row in (vase, dkv, snap)] == ["vase(b)", "vase_dkv(b)", "snapkv(b)"]
    assert vase.difference is None
    assert snap.difference == paired_interval({str(i): 0.3 for i in range(8)}, {str(i): 0.1 for i in range(8)})
    assert "from vase(b)" in " ".join(footer([vase, dkv, snap]))
    against = {row.cell.label: row.difference for row in text_rows(records, "snapkv(b)")}
    assert against["snapkv(b)"] is None
    assert against["vase(b)"].estimate == pytest.approx(-0.2)
    assert text_rows(texts(SNAP, [0.3] * 8))[0].difference is None


def test_rows_stand_by_model_task_budget_and_the_best_first() -> None:
    records = [record for budget in (128, 64) for record in answers(cell("a(b)", budget), [0.0, 1.0])]
    records += answers(cell("b(b)", 64), [1.0, 1.0]) + answers(FULL, [1.0, 0.0])
    records += answers(cell("a(b)", 64, model="another"), [0.0]) + answers(cell("a(b)", 64, task="aime"), [0.0])
    random.Random(0).shuffle(records)
    assert [(row.cell.model, row.cell.task, row.cell.budget, row.cell.label) for row in rows(records)] == [
        ("another", "gsm8k", 64, "a(b)"),
        ("tiny", "aime", 64, "a(b)"),
        ("tiny", "gsm8k", 0, "full"),
        ("tiny", "gsm8k", 64, "b(b)"),
        ("tiny", "gsm8k", 64, "a(b)"),
        ("tiny", "gsm8k", 128, "a(b)"),
    ]


def test_answers_and_texts_do_not_mix() -> None:
    records = answers(VASE, [1.0]) + texts(replace(VASE, task="wiki"), [0.1])
    assert [type(row) for row in rows(records)] == [Row]
    assert [type(row) for row in text_rows(records)] == [TextRow]
    assert not rows([])
    assert not text_rows([])


def test_what_an_engine_does_not_tell_is_left_out() -> None:
    record = Record(VASE, "0", 1.0, {"tokens": 5, "finish": "stop", "peak_nbytes": None})
    [row] = rows([record])
    assert (row.peak_nbytes, row.compression, row.rate, row.loop) == (None, None, None, None)
    [line] = cells(markdown([row]))
    assert list(line) == ["model", "task", "policy", "budget", "n", "score, %", "tokens", "cut short, %"]


def test_the_terminal_shows_the_cells_that_fit() -> None:
    for found in (rows(answers(FULL, ONES) + answers(VASE, [0.0] * 8)), text_rows(texts(VASE, [0.1, 0.2]))):
        shown = printed(rich_tables(found))
        assert "tiny: gsm8k (transformers, float32, temperature 0, " in shown
        for line in cells(markdown(found)):
            for name, value in line.items():
                assert name not in NARROW or (name in shown and value.replace("\\", "") in shown)
        assert "peak KV bytes" not in shown


def test_each_model_and_task_has_a_table() -> None:
    found = rows([answer(replace(one, task=task)) for one in (FULL, VASE) for task in ("gsm8k", "a [task]")])
    tables = rich_tables(found)
    assert [str(table.title).partition(" (")[0] for table in tables] == [r"tiny: a \[task]", "tiny: gsm8k"]
    assert [table.row_count for table in tables] == [2, 2]
    assert "tiny: a [task] (" in printed(tables)
    assert rich_tables([]) == []


def test_a_policy_that_has_a_name_is_shown_by_it_and_explained() -> None:
    found = rows([answer(cell("VaSE: vase(b)", 64)), answer(VASE), answer(cell("VaSE: vase(b)", 128))])
    assert [line["policy"] for line in cells(markdown(found))].count("VaSE") == 2
    assert legend(found) == ["VaSE: vase(b)"]
    assert "VaSE: " not in printed(rich_tables(found))


def test_a_label_breaks_no_table() -> None:
    [row] = rows([answer(cell("Policy(a|b) * [red]", 64))])
    assert "| Policy(a\\|b) \\* [red] |" in markdown([row])
    assert "Policy(a|b) * [red]" in printed(rich_tables([row]))


def test_the_footer_says_what_a_budget_is_and_how_intervals_are_made() -> None:
    found = rows(answers(FULL, ONES) + answers(VASE, [0.0] * 5))
    notes = "\n".join(footer(found))
    for part in (
        "slots kept per KV head after an eviction",
        "`interval` more",
        "n = 5 to 8",
        "Wilson",
        "from full",
        "*",
    ):
        assert part in notes
    assert "Wilson" not in "\n".join(footer(text_rows(texts(VASE, [0.1]))))
    assert "difference" not in "\n".join(footer(rows(answers(FULL, ONES))))


def test_a_name_of_two_policies_is_no_baseline() -> None:
    other = replace(VASE, policy=f"{VASE.policy} # another")
    with pytest.raises(EvaluationError, match="is the name of several policies"):
        rows(answers(VASE, ONES) + answers(other, ONES) + answers(SNAP, ONES), VASE.label)
