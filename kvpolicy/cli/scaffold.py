"""The package that ``kvpolicy new`` writes: its names, its files from templates, and the folder it goes to."""

from __future__ import annotations

import builtins
import contextlib
import importlib.util
import keyword
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from kvpolicy.cli.errors import CommandError

__all__ = ["Names", "render", "write"]

_LONGEST = 40  #: letters of a name, so that no line of the package gets too long
#: What the package's own folders and files are called, and what its modules import.
_OWN = ("build", "dist", "docs", "policy", "scorer", "src", "tests")
_IMPORTED = ("Check", "Tensor")


@dataclass(frozen=True)
class Names:
    """Hold the three names of a new package.

    Attributes:
        name: what pip installs, as ``"late-values"``.
        module: what Python imports, and the policy: ``"late_values"``.
        stage: the class of the scorer: ``"LateValues"``.
    """

    name: str
    module: str
    stage: str

    @staticmethod
    def of(name: str) -> Names:
        """Return the names, checked.

        Raises:
            CommandError: the name cannot be one, or something that is installed has it.

        >>> Names.of("late-values")
        Names(name='late-values', module='late_values', stage='LateValues')
        """
        if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
            better = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()).strip("-0123456789")
            hint = f"; {better!r} would be one" if better else ""
            raise CommandError(
                f"{name!r} is no name for a package: write lower-case letters and digits, with single hyphens between, "
                f"and a letter first{hint}"
            )
        if len(name) > _LONGEST:
            raise CommandError(f"{name!r} has {len(name)} letters; {_LONGEST} are most")
        made = Names(name, name.replace("-", "_"), "".join(map(str.capitalize, re.split("[-_]", name))))
        if owner := made._owner():
            raise CommandError(f"{name!r} cannot be the name of a package: {owner}; choose another one")
        return made

    def _owner(self) -> str | None:
        """Return who has one of the names already."""
        import kvpolicy
        from kvpolicy import registry

        if keyword.iskeyword(self.module) or keyword.issoftkeyword(self.module):
            return f"{self.module} is a word of Python's"
        if self.module in sys.stdlib_module_names or self.module in dir(builtins):
            return f"Python has a {self.module} of its own"
        if self.module in _OWN:
            return f"{self.module} is a folder or a module of the package itself"
        for group in (registry.policies(), registry.stages()):
            for word in (self.module, self.stage):
                if word in group:
                    return f"{word} is a {group[word].role} of the package {group[word].distribution!r}"
        for word in (self.module, self.stage):
            if word in kvpolicy.__all__ or word in _IMPORTED:
                return f"{word} is a name of kvpolicy's"
        spec = importlib.util.find_spec(self.module)
        if spec is not None and spec.origin is not None:  # a folder without a module is nobody's
            return f"Python imports {self.module} from {spec.origin}"
        with contextlib.suppress(PackageNotFoundError):
            return f"the package {distribution(self.name).name!r} is installed"
        return None


def render(names: Names) -> dict[str, str]:
    """Return the text of every file by its path within the package, ``/`` between folders."""
    from kvpolicy import __version__

    words = {"<<name>>": names.name, "<<module>>": names.module, "<<Stage>>": names.stage, "<<version>>": __version__}
    made: dict[str, str] = {}
    for path, template in _templates(files("kvpolicy.cli") / "templates" / "package", ""):
        text = template.read_text("utf-8")
        for word, value in words.items():
            text = text.replace(word, value)
        target = path.removesuffix(".in").replace("MODULE", names.module).replace("dot-", ".")
        made[target] = text
    return dict(sorted(made.items()))


def _templates(folder: Traversable, before: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _templates(entry, f"{before}{entry.name}/")
        elif entry.name.endswith(".in"):
            yield f"{before}{entry.name}", entry


def write(texts: Mapping[str, str], folder: Path) -> list[Path]:
    """Write files into a folder that is empty or missing: all of them or none.

    Raises:
        FileExistsError: the folder is not empty, or something else has its name.
        OSError: something could not be written; what was written before is gone again.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError("is a file")
    if folder.is_dir() and (found := sorted(entry.name for entry in folder.iterdir())):
        more = "" if len(found) == 1 else f" and {len(found) - 1} more"
        raise FileExistsError(f"is not empty: it holds {found[0]}{more}")
    made: list[Path] = []  # files and folders, in the order in which they came
    try:
        for name, text in texts.items():
            path = folder / name
            for missing in reversed([one for one in path.parents if not one.exists()]):
                missing.mkdir()
                made.append(missing)
            with path.open("x", encoding="utf-8", newline="\n") as file:
                made.append(path)
                file.write(text)
    except BaseException:
        for path in reversed(made):  # and nothing but what was written here
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise
    return [path for path in made if not path.is_dir()]
