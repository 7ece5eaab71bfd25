"""What every task shares: a text that makes it again, and checks of its parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvpolicy.evaluation.errors import EvaluationError

__all__ = ["Named"]


class Named:
    """Give a frozen dataclass, as its ``repr``, the text that a user types for it.

    Parameters at their defaults are left out, but for tasks, and the brackets with them where nothing is left.
    """

    def __repr__(self) -> str:
        given = [
            f"{field.name}={value!r}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]  # subclasses are dataclasses
            if (value := getattr(self, field.name)) != _default(field) or isinstance(value, Named)
        ]
        return f"{type(self).__name__}({', '.join(given)})" if given else type(self).__name__

    def at_least(self, **least: int) -> None:
        """Check that parameters are whole numbers, each at least what is given for its name.

        Raises:
            EvaluationError: one is not.
        """
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < bound:
                raise EvaluationError(
                    f"{type(self).__name__}: {name}={value!r}, but it is a whole number from {bound} on"
                )


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
