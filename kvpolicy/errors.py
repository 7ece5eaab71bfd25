"""Every error that kvpolicy raises on purpose, and its warnings.

::

    KVPolicyError
    ├── PolicyError                 the policy itself is wrong, before any model is seen
    │   ├── CompositionError        two stages cannot stand beside each other  (also a TypeError)
    │   ├── ParameterError          a parameter is out of its range            (also a ValueError)
    │   └── ParseError              a policy text cannot be read               (also a ValueError)
    ├── BindError                   this policy cannot run on this model or engine
    │   ├── BudgetError             budgets, guards and recent tokens do not fit (also a ValueError)
    │   └── UnsupportedError        the engine cannot give what is needed
    ├── UsageError                  a bound cache was used in a way that cannot be right
    ├── LoadError                   there is no such model, or it cannot be loaded
    ├── RunError                    what was asked is right, and could not be done here
    │   └── OfflineError            the model must be fetched, and its hub cannot be reached
    └── IntegrityError              a store contradicts itself: a bug, please report it

    UntestedVersionWarning          an engine newer than what was tested (a UserWarning)
    IncompleteWarning               something was missing, and work went on without it (a UserWarning)

A message says what was asked, what was found, and what to write instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BindError",
    "BudgetError",
    "CompositionError",
    "IncompleteWarning",
    "IntegrityError",
    "KVPolicyError",
    "LoadError",
    "OfflineError",
    "ParameterError",
    "ParseError",
    "PolicyError",
    "RunError",
    "UnsupportedError",
    "UntestedVersionWarning",
    "UsageError",
]


SIMILAR = 0.65  #: how alike a word is to one that is suggested: "h20" to "h2o" is, "nonsense" to "Constant" is not


class KVPolicyError(Exception):
    """Stand at the root of every error that kvpolicy raises on purpose."""


class PolicyError(KVPolicyError):
    """Report a policy that is wrong whatever the model."""


class CompositionError(PolicyError, TypeError):
    """Report two stages that cannot stand beside each other."""


class ParameterError(PolicyError, ValueError):
    """Report a parameter out of its range."""


class ParseError(PolicyError, ValueError):
    """Report a policy text that cannot be read."""


class BindError(KVPolicyError):
    """Report a policy that cannot run on this model or engine."""


class BudgetError(BindError, ValueError):
    """Report budgets, guards and recent tokens that do not fit into each other."""


class UnsupportedError(BindError):
    """Report something that the engine cannot do correctly."""


class UntestedVersionWarning(UserWarning):
    """Report an engine that is newer than the versions that kvpolicy was tested with."""


class IncompleteWarning(UserWarning):
    """Report that something was missing, such as weights or the end of a file, and that work went on without it."""


class UsageError(KVPolicyError):
    """Report a use of a bound cache that cannot give a right answer."""


class LoadError(KVPolicyError):
    """Report a model that is not there, or that cannot be loaded."""


class RunError(KVPolicyError):
    """Report that what was asked is right and could not be done here: for want of memory, a disk or a package."""


class OfflineError(RunError):
    """Report a model that must be fetched from its hub, which cannot be reached."""


class IntegrityError(KVPolicyError):
    """Report a store whose parts contradict each other."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known word closest to ``word``, or an empty string where none is close.

    >>> nearest("windw", ["window", "pool"]), nearest("topk", ["TopK"]), nearest("nonsense", ["Constant"])
    (" (did you mean 'window'?)", " (did you mean 'TopK'?)", '')
    """
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=SIMILAR)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def one_line(error: BaseException | str, limit: int = 600) -> str:
    """Return a message on one line, and its type where it says nothing.

    >>> one_line("one   or more    spaces")
    'one or more spaces'
    """
    text = " ".join(str(error).split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
