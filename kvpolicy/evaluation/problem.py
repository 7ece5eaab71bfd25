"""What a model is asked, and what is right: :class:`Problem` and :class:`Task`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

__all__ = ["Answers", "Grader", "Message", "Problem", "Task", "Text"]

#: How an answer is compared: by mathematical value, as a word that must occur, or as one of some letters.
Grader = Literal["math", "contains"]


@dataclass(frozen=True)
class Message:
    """Hold one message of a conversation.

    Attributes:
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        text: what is said.
    """

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Problem:
    """Hold one conversation that a model goes on with, and what it should say.

    Attributes:
        id: unique in its task, and the same whenever the task is made again.
        messages: the conversation so far; the model writes the next message of the assistant. A model
            without a chat template gets the texts, a blank line between them.
        answers: what is right, one for each part of the answer; most problems have one part.
        max_new_tokens: a cap that does not cut right answers short.
        grader: how a part is compared.
        behind: text that the model is made to have written already, as if it had decoded it token by
            token: evictions happen on it. Empty for most problems.
        behind_tokens: only the last so many tokens of ``behind`` are fed, so that problems have one length and
            go into one batch; 0 feeds all.
        turns: feed the conversation a turn at a time, through the same cache, rather than as one prompt.
    """

    id: str
    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    max_new_tokens: int
    grader: Grader = "math"
    behind: str = ""
    behind_tokens: int = 0
    turns: bool = False


@dataclass(frozen=True)
class Text:
    """Hold one text that a model reads under a policy, as if it had written it.

    Attributes:
        id: unique in its task.
        text: longer than ``length`` tokens; it is cut there.
        length: tokens that are read.
    """

    id: str
    text: str
    length: int


@runtime_checkable
class Task(Protocol):
    """Name some problems that are answered, or some texts that are read.

    A frozen dataclass whose ``repr``, with defaults left out, is what a user types: ``gsm8k``,
    ``passcode(length=2048)``. A third party registers a class in the entry points
    ``kvpolicy.tasks``.
    """

    def problems(self, data: Path | None) -> Sequence[Problem] | Sequence[Text]:
        """Return all problems, always in the same order.

        Args:
            data: the folder that the user named, or None.

        Raises:
            DataError: the files are not there; the message says where they were looked for.
        """
        ...


#: What :func:`kvpolicy.evaluation.grading.grade` returns: which parts of an answer are right.
Answers = tuple[bool, ...]
