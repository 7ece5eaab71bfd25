"""The file of results survives whatever kills a run, and refuses what it cannot read."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.errors import IncompleteWarning, RunError
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.record import Record
from kvpolicy.evaluation.results import Results, decode, encode, read
from tests.evaluation.records import FULL, answer, answers, cell, text, texts

VASE = cell("vase(b)", 64)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def write(path: Path, *batches: list[Record]) -> None:
    with Results.open(path) as results:
        for batch in batches:
            results.append(batch)


def test_what_is_appended_is_read_back_by_the_next_run(path: Path) -> None:
    first, second, other = answers(VASE, [0.1, 1 / 3]), [answer(VASE, "later", 0.0)], texts(FULL, [0.2])
    write(path, first, second)
    with Results.open(path) as results:
        assert list(results.finished(VASE).values()) == first + second
        assert results.finished(FULL) == {}
        results.append(other)
        assert results.finished(FULL) == {other[0].problem: other[0]}
        assert results.records() == first + second + other
    assert read(path) == first + second + other


@settings(max_examples=25, deadline=None)
@given(
    score=st.floats(0, 1),
    details=st.dictionaries(st.text(), JSON, max_size=4),
    problem=st.text(),
    temperature=st.floats(0, 2),
)
def test_a_line_is_read_back_to_the_bit(
    score: float, details: dict[str, Any], problem: str, temperature: float
) -> None:
    record = Record(replace(VASE, temperature=temperature), problem, score, details, {"torch": "2"})
    line = encode(record)
    assert decode(line) == record
    assert line == encode(decode(line))
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")


def test_a_line_has_one_form() -> None:
    record = Record(FULL, "0", 1.0, {"b": 1, "a": [0.1, " "]})
    line = encode(record)
    assert line.startswith(b'{"schema":1,"cell":{"budget":0,"dtype":')
    assert b'"details":{"a":[0.1," "],"b":1}' in line
    assert encode(Record(FULL, "0", 1, {"a": (0.1, " "), "b": 1})) == line


def test_a_record_in_memory_is_what_the_file_has(path: Path) -> None:
    with Results.open(path) as results:
        results.append([answer(parts=(True, False))])
        assert results.records()[0].details["parts"] == [True, False]
        assert results.records() == read(path)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (answer(score=math.nan), "not finite"),
        (answer(entropy=math.inf), "JSON"),
        (answer(output={1, 2}), "set"),
        (answer(score=True), "score"),
        (answer(problem=3), "problem"),
    ],
)
def test_what_json_cannot_hold_is_refused_and_nothing_of_the_batch_written(
    path: Path, record: Record, why: str
) -> None:
    with Results.open(path) as results:
        results.append([answer(problem="first")])
        before = path.read_bytes()
        with pytest.raises(RunError, match=why):
            results.append([answer(problem="second"), record])
        assert path.read_bytes() == before
        assert len(results.records()) == 1


def test_a_problem_is_finished_once(path: Path) -> None:
    with Results.open(path) as results:
        results.append([answer()])
        with pytest.raises(RunError, match="twice"):
            results.append([answer(problem="new"), answer(score=0.5)])
        with pytest.raises(RunError, match="twice"):
            results.append([answer(problem="new"), answer(problem="new")])
        results.append([answer(VASE), answer(replace(FULL, seed=1))])  # other cells
        assert len(results.records()) == 3


def test_a_batch_is_one_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    write = os.write

    def counted(descriptor: int, data: bytes) -> int:
        writes.append(len(data))
        return write(descriptor, data)

    with Results.open(path) as results:
        monkeypatch.setattr(os, "write", counted)
        results.append(answers(VASE, [0.0, 1.0, 0.5]))
    assert writes == [path.stat().st_size]


def test_a_full_disk_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ = os.write
    with Results.open(path) as results:
        results.append([answer()])
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, data: write_(descriptor, data[:50]))
            with pytest.raises(RunError, match="50 of"):
                results.append(answers(VASE, [0.0, 1.0]))
        assert path.read_bytes() == before
        results.append(answers(VASE, [0.0, 1.0]))
    assert len(read(path)) == 3


def test_wherever_a_write_is_cut_the_whole_lines_stay(path: Path, recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    first, second = [answer(problem="a")], [answer(problem="b"), answer(problem="c")]
    write(path, first, second)
    data = path.read_bytes()
    start, second_line = len(encode(first[0])), len(encode(second[0]))
    for end in {*range(start, start + 20), *range(start + 20, len(data), 61), start + second_line - 1, len(data) - 1}:
        path.write_bytes(data[:end])
        whole = first + second[: data[start:end].count(b"\n")]
        is_cut = data[:end][-1:] != b"\n"
        assert read(path) == whole
        assert path.stat().st_size == end  # reading changes nothing
        with Results.open(path) as results:
            assert results.records() == whole
            results.append(second[len(whole) - 1 :])
        assert [one.category for one in recwarn.list] == [IncompleteWarning] * 2 * is_cut
        recwarn.clear()
        assert path.read_bytes() == data


GOOD = encode(answer())


def edited(**fields: Any) -> bytes:
    line = json.loads(GOOD) | fields
    return json.dumps({name: value for name, value in line.items() if value != "gone"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"\n", "Expecting value"),
        (b"[1]\n", "not a JSON object"),
        (GOOD[:40] + b"\n", "line 2"),
        (b"\xff\xfe" + GOOD, "line 2"),
        (b"[" * 100_000 + b"\n", "line 2"),
        (edited(schema=2), "its schema is 2, and this version of kvpolicy reads 1"),
        (edited(schema="gone"), "its schema is None"),
        (edited(score="gone"), "no field 'score'"),
        (edited(score="0.5"), "its field 'score' is '0.5', expected float"),
        (edited(score=True), "its field 'score' is True, expected float"),
        (edited(score=math.nan), "it has a NaN"),
        (GOOD.replace(b'"score":1.0', b'"score":1e999'), "not finite"),
        (edited(score=25.0), "its score is 25.0, expected 0 to 1"),
        (edited(details={"tokens": -8}), "its tokens is -8, expected 0 or more"),
        (edited(details={"compression": "x"}), "its compression is 'x', expected a number"),
        (edited(extra=1), "unknown field 'extra'"),
        (edited(cell={}), "no field 'budget'"),
        (edited(cell=[]), "its field 'cell'"),
        (edited(score=0.5), "problem '0' of tiny, gsm8k, full, seed 0 was there before, with another content"),
        (b"my notes", "not a line of results"),  # no newline at the end, and yet nobody's cut line
    ],
)
def test_a_line_that_cannot_be_read_is_named_and_the_file_left_as_it_is(path: Path, line: bytes, why: str) -> None:
    data = GOOD + line + (encode(answer(problem="after")) + b'{"sch' if line.endswith(b"\n") else b"")
    path.write_bytes(data)
    for attempt in (lambda: Results.open(path).__enter__(), lambda: read(path)):
        with pytest.raises(EvaluationError) as refused:
            attempt()
        assert "results.jsonl, line 2 cannot be read: " in str(refused.value)
        assert why in str(refused.value)
        assert path.read_bytes() == data


def test_two_runs_cannot_write_one_file(path: Path) -> None:
    with Results.open(path) as results:
        results.append([answer()])
        with pytest.raises(EvaluationError, match="being written by another run"), Results.open(path):
            pass
        assert len(read(path)) == 1  # a report may read meanwhile
        results.append([answer(problem="1")])
    write(path, [answer(problem="2")])
    assert len(read(path)) == 3


def test_a_lock_goes_with_an_error(path: Path) -> None:
    path.write_bytes(b"{}\n")
    for _ in range(2):
        with pytest.raises(EvaluationError, match="line 1"), Results.open(path):
            pass
    path.unlink()
    with pytest.raises(ZeroDivisionError), Results.open(path):
        _ = 1 / 0
    write(path, [answer()])


def test_a_run_that_is_killed_leaves_whole_batches_and_no_lock(path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from kvpolicy.evaluation.results import Results\n"
        "from tests.evaluation.records import answer\n"
        "with Results.open(Path(sys.argv[1])) as results:\n"
        "    results.append([answer(problem='a'), answer(problem='b')])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    killed = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=False)
    assert killed.returncode == -9
    with Results.open(path) as results:
        assert [record.problem for record in results.records()] == ["a", "b"]


def test_what_cannot_be_opened_is_said_in_a_line(path: Path, tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "no" / "folder.jsonl"):
        with pytest.raises(EvaluationError, match="name another file"), Results.open(wrong):
            pass
    with pytest.raises(EvaluationError, match="No such file"):
        read(path)
    assert not path.exists()


def test_a_file_that_nobody_may_write_is_read(path: Path) -> None:
    write(path, [text(VASE)])
    path.chmod(0o444)
    assert read(path) == [text(VASE)]


def test_files_are_merged_and_contradict_each_other_aloud(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    write(a, [answer(problem="0"), answer(problem="1")])
    write(b, [answer(problem="1"), answer(problem="2")])
    write(c, [answer(problem="2", score=0.0)])
    assert [record.problem for record in read([a, b])] == ["0", "1", "2"]
    assert read([]) == []
    with pytest.raises(EvaluationError, match=r"c, line 1 .*problem '2'.*with another content"):
        read([a, b, c])
