"""Stages and recipes by name: what installed packages declare as entry points.

Built-ins are declared in the same way as anybody else's, in ``pyproject.toml``::

    [project.entry-points."kvpolicy.stages"]
    Attention = "kvpolicy:Attention"

    [project.entry-points."kvpolicy.policies"]
    vase = "kvpolicy.policies:vase"
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kvpolicy.allocators import Allocator
from kvpolicy.errors import PolicyError
from kvpolicy.stage import Scorer, Selector, Transform

__all__ = ["Registered", "policies", "stages"]


@dataclass(frozen=True)
class Registered:
    """Name a stage or a recipe that some installed package offers.

    Attributes:
        name: as it is written in a policy text.
        entry_point: where it is.
    """

    name: str
    entry_point: EntryPoint

    @property
    def distribution(self) -> str:
        """Return the name of the package that declares it."""
        return self.entry_point.dist.name if self.entry_point.dist else "unknown"

    @property
    def role(self) -> str:
        """Return ``"scorer"``, ``"transform"``, ``"selector"``, ``"allocator"`` or ``"policy"``."""
        loaded = self.load()
        if isinstance(loaded, type):
            roles = {
                Scorer: "scorer",
                Transform: "transform",
                Selector: "selector",
                Allocator: "allocator",
            }
            for base, role in roles.items():
                if issubclass(loaded, base):
                    return role
        return "policy"

    def load(self) -> Callable[..., Any]:
        """Return the stage class or the recipe.

        Raises:
            PolicyError: the package that declares it cannot be imported.
        """
        try:
            return self.entry_point.load()
        except Exception as error:  # importing a package runs whatever it likes
            raise PolicyError(
                f"{self.name} is declared by the package {self.distribution!r} as {self.entry_point.value!r}, "
                f"which cannot be loaded: {error}"
            ) from error


@functools.cache
def stages() -> dict[str, Registered]:
    """Return the registered stages by name.

    Raises:
        PolicyError: two packages declare one name.
    """
    return _group("kvpolicy.stages")


@functools.cache
def policies() -> dict[str, Registered]:
    """Return the registered recipes by name.

    Raises:
        PolicyError: two packages declare one name.
    """
    return _group("kvpolicy.policies")


def _group(group: str) -> dict[str, Registered]:
    found: dict[str, Registered] = {}
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        new, old = Registered(point.name, point), found.get(point.name)
        if old is not None and old.entry_point.value != point.value:
            raise PolicyError(
                f"two packages declare {point.name!r} in {group}: {old.distribution!r} as {old.entry_point.value!r} "
                f"and {new.distribution!r} as {point.value!r}; uninstall one or rename its entry point"
            )
        found.setdefault(point.name, new)
    if not found:
        raise PolicyError(f"no package declares {group}: kvpolicy is not installed here; run `pip install -e .`")
    return found
