"""The documentation is true: its code runs, its tables agree with the code, its links lead on.

``KVPOLICY_TEST_MODEL`` names a folder to use in place of the default model.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import settings
from torch import distributed

import kvpolicy
from kvpolicy import Policy
from kvpolicy.adapters.vllm import Config, Settings
from kvpolicy.cli import app as cli
from kvpolicy.cli import default_model, plot
from tests.docs import evaluate_page
from tests.docs.pages import PAGES, ROOT, Block, blocks, commands, links, name
from tests.hf.split import environment as processes
from tests.models import default_folder

README = ROOT / "README.md"
CHEAP = 32  #: tokens that a command on a page may generate here
PYTHON = [page for page in PAGES if blocks(page, "python")]
CONSOLE = [page for page in PAGES if commands(page)]


def needs_model(page: Path) -> bool:
    return "default_model()" in page.read_text("utf-8") and bool(blocks(page, "python"))


def marked(pages: list[Path]) -> list[Any]:
    """Return pages as parameters, marked where they load a model."""
    marks = {page: [pytest.mark.model] if needs_model(page) else [] for page in pages}
    return [pytest.param(page, id=name(page), marks=marks[page]) for page in pages]


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return Path(default_folder())


@pytest.fixture
def few_examples() -> Iterator[None]:
    """Let hypothesis draw few examples: that a check runs is what a page shows."""
    before = settings.get_current_profile_name()
    settings.register_profile("docs", max_examples=3, database=None, derandomize=True)
    settings.load_profile("docs")
    yield
    settings.load_profile(before)


# What pages run


@pytest.mark.usefixtures("few_examples")
@pytest.mark.parametrize("page", marked(PYTHON))
def test_python_blocks_run(page: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if needs_model(page):
        folder = request.getfixturevalue("model_folder")
        monkeypatch.setattr(default_model, "default_model", lambda: folder)
    module = types.ModuleType("docs_page")  # dataclasses ask for the module of a class
    monkeypatch.setitem(sys.modules, "docs_page", module)
    for block in blocks(page, "python"):
        if block.not_run is None:
            run(block, vars(module))


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block, and compare what it prints with what the page says."""
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    if block.prints is not None:
        assert printed.getvalue().splitlines() == block.prints.splitlines(), f"{block} prints else"


def test_blocks_that_do_not_run_are_few() -> None:
    found = [block for page in PYTHON for block in blocks(page, "python")]
    elsewhere = {(name(block.page), block.not_run) for block in found if block.not_run}
    assert elsewhere == {
        ("docs/vllm.md", "needs vLLM; tests/vllm/test_vllm_page.py runs it"),
        ("docs/api/testing.md", "MyPolicy stands for a policy of yours"),
    }


@pytest.mark.parametrize("page", marked(CONSOLE))
def test_commands(page: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: set[str] = set()  # modules of packages that the page makes, and policies that it registers
    for block in blocks(page, "toml"):
        if block.title is not None:
            (tmp_path / block.title).parent.mkdir(exist_ok=True)
            (tmp_path / block.title).write_text(block.code, "utf-8")
            written |= set(tomllib.loads(block.code)["project"]["entry-points"]["kvpolicy.policies"])
    for command in commands(page):
        words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(command)))
        match words:
            case ["make", *targets]:
                makefile = (ROOT / "Makefile").read_text("utf-8")
                known = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
                assert set(targets) <= known, command
            case ["pip", "install", "build", "twine"] | ["python", "-m", "build"] | ["twine", "upload", _]:
                pass  # tools of others
            case ["kvpolicy", "new", package, *_]:
                with contextlib.chdir(tmp_path):
                    assert printed_by(words) == prints(page, command), command
                written.add(package.replace("-", "_"))
            case ["cd", folder]:  # what is done there, tests/cli/test_new.py does
                assert (tmp_path / folder / "pyproject.toml").exists(), command
            case ["pip", "install", "-e", ".[test]" | "."] | ["pytest"]:
                assert written, command
            case ["kvpolicy", "show" | "check", policy] if policy in written:  # other tests do
                pass
            case ["pip", "install", requirement]:
                assert set(extras(requirement)) <= set(project()["optional-dependencies"]), command
            case ["torchrun", *options, file]:
                run_on_processes(page, file, options, tmp_path)
            case ["vllm", "serve", _, *options] | [
                "python",
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--model",
                _,
                *options,
            ]:
                assert served(options) is not None, command
            case ["python", "-m", "benchmarks.vllm.serve", *options]:
                source = (ROOT / "benchmarks/vllm/serve.py").read_text("utf-8")
                known = set(re.findall(r'add_argument\("(--[\w-]+)"', source))
                assert {word for word in options if word.startswith("--")} <= known, command
            case ["curl", *options]:
                asked = json.loads(options[options.index("-d") + 1])["vllm_xargs"]
                config = Config("vase(1024)", interval=128)  # of the engine on that page
                Settings.of(config, types.SimpleNamespace(extra_args=asked, seed=None))
            case ["kvpolicy", "generate", *options]:
                given = typer.main.get_command(cli.app).commands["generate"]  # type: ignore[attr-defined]
                values = given.make_context("generate", list(options)).params
                if values["policy"].partition("(")[0] in written:  # known once it is installed
                    continue
                Policy.parse(values["policy"])
                if values["max_new_tokens"] <= CHEAP:
                    folder = request.getfixturevalue("model_folder")
                    monkeypatch.setattr(default_model, "default_model", lambda folder=folder: folder)
                    assert cli.run(words[1:]) == 0, command
            case ["kvpolicy", "trace" | "plot" as what, *options]:  # tests/cli/test_trace.py runs them
                group: Any = typer.main.get_command(cli.app)
                values = group.commands[what].make_context(what, list(options)).params
                if what == "trace":
                    Policy.parse(values["policy"])
                else:
                    assert values["kind"] in plot.KINDS, command
            case ["kvpolicy", "lm-eval", *options]:  # tests/evaluation/test_harness.py runs one
                found = re.search(r"policy=(\w+\(.*?\))", options[options.index("--model_args") + 1])
                assert found is not None, command
                Policy.parse(found[1])
            case ["kvpolicy", "eval", *options]:  # minutes, and files: what it asks for is read, and not run
                evaluate_page.check(options)
            case ["benchmarks/quality.sh", *sections]:
                script = (ROOT / "benchmarks/quality.sh").read_text("utf-8")
                assert set(sections) <= set(re.findall(r"^        (\w+)\)$", script, re.MULTILINE)), command
            case ["kvpolicy", *arguments]:
                assert cli.run(arguments) == 0, command
            case _:
                pytest.fail(f"{name(page)}: nobody checks {command!r}; teach this test")


def printed_by(words: list[str]) -> list[str]:
    """Return the lines that a command prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.run(words[1:]) == 0, words
    return printed.getvalue().splitlines()


def prints(page: Path, command: str) -> list[str] | None:
    """Return the lines that a page says a command prints."""
    block = next(block for block in blocks(page, "console") if f"$ {command}\n" in block.code)
    return None if block.prints is None else block.prints.splitlines()


def served(options: list[str]) -> Config | None:
    """Return what the options of vLLM's server ask for, read as vLLM's processes read it."""
    given = json.loads(options[options.index("--additional-config") + 1])
    return Config.of(types.SimpleNamespace(additional_config=given))


def run_on_processes(page: Path, file: str, options: list[str], folder: Path) -> None:
    """Run the file that a page shows under torchrun, and compare what it prints with what the page says."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no torch.distributed with gloo")
    block = next(block for block in blocks(page, "python") if block.title == file)
    (folder / file).write_text(block.code, "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", *options, file]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=processes(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as started:
        try:
            printed, said = started.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # torchrun, and what it has started
            pytest.fail(f"{block}: {shlex.join(command)} did not end")
    assert started.returncode == 0, said[-3000:]
    assert printed == block.prints


def extras(requirement: str) -> list[str]:
    found = re.fullmatch(r"kvpolicy(?:\[([\w,]+)\])?", requirement)
    assert found, requirement
    return found[1].split(",") if found[1] else []


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


# What pages list


def test_every_public_name_is_in_the_reference() -> None:
    reference = "\n".join(page.read_text("utf-8") for page in sorted((ROOT / "docs/api").glob("*.md")))
    words = set(re.findall(r"\w+", reference))
    assert not [one for one in kvpolicy.__all__ if one not in words]


def signature(function: Any) -> str:
    """Return a signature without annotations."""
    found = inspect.signature(function)
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_every_option_is_in_the_reference() -> None:
    page = (ROOT / "docs/api/command-line.md").read_text("utf-8")
    group: Any = typer.main.get_command(cli.app)
    for command, about in group.commands.items():
        assert f"\n## kvpolicy {command}\n" in page
        options = {word for one in about.params for word in (*one.opts, *one.secondary_opts) if word.startswith("--")}
        missing = sorted(word for word in options - {"--help"} if f"`{word}" not in page)
        assert not missing, f"docs/api/command-line.md: {command} has {missing}"


@pytest.mark.parametrize("page", [pytest.param(page, id=name(page)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if not re.match(r"[a-z]+:", target):
            file = target.partition("#")[0]
            assert not file or (page.parent / file).exists(), f"{name(page)}: {target}"
