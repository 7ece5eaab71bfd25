"""What is built from the tree installs into an empty environment, and all of it can be imported.

Slow (two minutes, mostly torch) and in need of a package index: `make packaging` runs it, a plain
pytest does not. Everything starts from a fresh repository that holds a copy of the working tree, so
that nothing ignored or left over from earlier builds takes part.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("probe.py")
FOLDERS = ("kvpolicy", "policies", "adapters")

# What a part of the package may miss where its extra is not installed, and nothing else may.
OPTIONAL = {
    "kvpolicy.adapters.hf": {"transformers", "accelerate", "safetensors"},
    "kvpolicy.adapters.vllm": {"vllm", "triton", "numpy"},  # numpy comes with vLLM
    "kvpolicy.adapters.flash_attn": {"flash_attn", "triton"},
    "kvpolicy.cli": {"typer", "rich", "transformers", "gguf", "math_verify"},
    "kvpolicy.evaluation": {"transformers", "rich", "matplotlib", "lm_eval", "numpy"},
    "kvpolicy.testing": {"hypothesis", "pytest"},
    "kvpolicy.tracing": {"transformers"},
}
# What the extras hf and cli leave out; only these may still be missing then.
NOT_IN_HF_CLI = {"vllm", "flash_attn", "triton", "math_verify", "matplotlib", "lm_eval", "hypothesis", "pytest"}

CHECK_METADATA = """
from importlib.metadata import entry_points, files, version
import kvpolicy
assert kvpolicy.__version__ == version("kvpolicy"), kvpolicy.__version__
for group in ("kvpolicy.stages", "kvpolicy.policies"):
    assert entry_points(group=group), group
    for entry in entry_points(group=group):
        assert entry.load().__name__ == entry.name, entry
packaged = {str(file) for file in files("kvpolicy")}
for group in ("vllm.general_plugins", "vllm.logits_processors"):  # whether they load, only vLLM can tell
    (entry,) = entry_points(group=group)
    module = entry.module.replace(".", "/")
    assert {f"{module}.py", f"{module}/__init__.py"} & packaged, entry
"""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command away from this checkout, without its settings; return what it prints."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GIT_", "COV_"))}
    done = subprocess.run([str(part) for part in command], cwd=cwd or "/", env=kept, capture_output=True, text=True)
    if done.returncode:
        shown = " ".join(str(part) for part in command)
        pytest.fail(f"{shown}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


class Environment:
    """A virtual environment that sees nothing of the one that runs the tests."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", folder)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")

    def pip(self, *arguments: str | Path) -> None:
        """`pip install` with these arguments."""
        run(self.bin / "python", "-m", "pip", "install", "-q", *arguments)

    def python(self, program: str) -> str:
        """What a program prints."""
        return run(self.bin / "python", "-c", program).strip()

    @property
    def packages(self) -> Path:
        """Where pip installs to."""
        return Path(self.python("import sysconfig; print(sysconfig.get_path('purelib'))"))

    def add_to_path(self, folder: Path) -> None:
        """Import from a folder too, after what is installed."""
        with Path(self.packages, "added.pth").open("a") as file:
            file.write(f"{folder}\n")

    def failures(self, modules: list[str]) -> dict[str, str]:
        """Import each module; of those that fail, the name of the missing one, or the error."""
        found: dict[str, str] = json.loads(run(self.bin / "python", PROBE, *modules))
        return found


def modules_of(tree: Path) -> list[str]:
    """The names of all modules in a tree, as they are imported."""
    names: list[str] = []
    for folder in FOLDERS:
        for dirpath, _, files in os.walk(tree / folder):  # does not follow links
            for file in files:
                path = Path(dirpath, file).relative_to(tree).with_suffix("")
                if file.endswith(".py") and file != "__main__.py":
                    parts = path.parts[:-1] if path.name == "__init__" else path.parts
                    names.append(".".join(parts if folder == "kvpolicy" else ("kvpolicy", *parts)))
    return sorted(names)


def excused(module: str, missing: str) -> bool:
    """Whether a module may miss this package where only torch is installed."""
    parts = [name for name in OPTIONAL if module == name or module.startswith(f"{name}.")]
    return any(missing.partition(".")[0] in OPTIONAL[name] for name in parts)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh repository with one commit: the files that git would take from the working tree."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    new = tmp_path_factory.mktemp("repository")
    listed = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, new / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    run("git", "init", "-q", cwd=new)
    run("git", "add", "--force", "--all", cwd=new)
    run("git", "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "all", cwd=new)
    return new


@pytest.fixture(scope="session")
def linkless(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which symbolic links are small text files, as on Windows by default."""
    new = tmp_path_factory.mktemp("linkless") / "clone"
    run("git", "-c", "core.symlinks=false", "clone", "-q", repository, new)
    assert (new / "kvpolicy" / "policies").is_file()
    return new


def build(tree: Path, out: Path, *what: str) -> None:
    """Build with the hatchling that is installed here."""
    run(sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", out, tree)


@pytest.fixture(scope="session")
def built(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    build(repository, out)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def torch_only(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with torch and nothing else; the others see it, and stay as empty."""
    pins = (ROOT / "constraints.txt").read_text().split()
    new = Environment(tmp_path_factory.mktemp("torch"))
    new.pip(next(pin for pin in pins if pin.startswith("torch==")))
    return new


@pytest.fixture
def environment(torch_only: Environment, tmp_path: Path) -> Environment:
    """An environment of one test: torch and nothing else."""
    new = Environment(tmp_path / "environment")
    new.add_to_path(torch_only.packages)
    return new


def in_wheel(wheel: Path) -> set[str]:
    """The names of the files in a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_the_package_and_nothing_else(repository: Path, built: tuple[Path, Path]) -> None:
    tracked = run("git", "ls-files", "-z", cwd=repository).split("\0")
    expected = {
        name if name.startswith("kvpolicy/") else f"kvpolicy/{name}"
        for name in tracked
        if name.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and not (repository / name).is_symlink()
    }
    assert in_wheel(built[1]) == expected
    assert "kvpolicy/py.typed" in expected


def test_sdist_holds_what_a_reader_needs(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = "LICENSE README.md CHANGELOG.md CITATION.cff pyproject.toml constraints.txt Makefile"
    assert not set(files.split()) - names
    for folder in ("kvpolicy", "policies", "adapters", "tests", "docs"):
        assert any(name.startswith(f"{folder}/") for name in names), folder
    assert not any(name.startswith(("kvpolicy/policies", "kvpolicy/adapters")) for name in names)


def test_same_wheel_from_every_tree(repository: Path, linkless: Path, built: tuple[Path, Path], tmp_path: Path) -> None:
    for tree in (repository, linkless):
        out = tmp_path / tree.name
        build(tree, out, "--wheel")
        assert in_wheel(next(out.glob("*.whl"))) == in_wheel(built[1])


def test_wheel_with_torch_alone_then_with_extras(
    repository: Path, built: tuple[Path, Path], environment: Environment
) -> None:
    modules, wheel = modules_of(repository), built[1]
    environment.pip(wheel)
    failures = environment.failures(modules)
    assert not {m: why for m, why in failures.items() if not excused(m, why)}
    environment.python(CHECK_METADATA)

    environment.pip("-c", ROOT / "constraints.txt", f"{wheel}[hf,cli]")
    failures = environment.failures(modules)
    assert not {m: why for m, why in failures.items() if why.partition(".")[0] not in NOT_IN_HF_CLI}
    assert "generate" in run(environment.bin / "kvpolicy", "--help")


def test_editable_install(repository: Path, environment: Environment) -> None:
    environment.pip("-e", repository)
    check_import_from(repository, environment)


def test_editable_install_without_links(linkless: Path, environment: Environment) -> None:
    environment.pip("-e", linkless)
    check_import_from(linkless, environment)


def test_checkout_without_links_on_the_path(linkless: Path, environment: Environment) -> None:
    environment.add_to_path(linkless)
    check_import_from(linkless, environment)


def check_import_from(tree: Path, environment: Environment) -> None:
    """Everything that needs only torch is imported, and from this tree."""
    failures = environment.failures(modules_of(tree))
    assert not {m: why for m, why in failures.items() if not excused(m, why)}
    program = """
import os, kvpolicy, kvpolicy.policies, kvpolicy.adapters
for module in (kvpolicy, kvpolicy.policies, kvpolicy.adapters):
    print(os.path.realpath(module.__file__))
"""
    files = environment.python(program).splitlines()
    assert files == [str(tree.resolve() / folder / "__init__.py") for folder in FOLDERS]
