"""A problem as the tokens of a model: :func:`render`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from kvpolicy.errors import one_line
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.problem import Problem

__all__ = ["Asked", "digest", "render"]


@dataclass(frozen=True)
class Asked:
    """Hold the tokens that a model goes on from.

    Attributes:
        pieces: what is fed, a turn each; one piece for most problems.
        behind: tokens after them that count as decoded.
        max_new_tokens: of the answer, at most.
        answers: what is right.
    """

    pieces: tuple[tuple[int, ...], ...]
    behind: tuple[int, ...]
    max_new_tokens: int
    answers: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Return what tells this problem from another one of its name."""
        return digest(self.pieces, self.behind, self.max_new_tokens, self.answers)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the lengths of all that is fed: problems of one shape go into one batch."""
        return (*map(len, self.pieces), len(self.behind))

    @property
    def length(self) -> int:
        """Return the tokens fed before the answer begins."""
        return sum(self.shape)


def digest(*parts: object) -> str:
    """Return 8 hexadecimal digits that tell some values from others."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def render(problem: Problem, tokenizer: Any) -> Asked:
    """Return a problem's tokens, in the model's chat template where it has one.

    Raises:
        EvaluationError: the template refuses the conversation, or cannot be fed a turn at a time.
    """
    whole = _tokens(problem, len(problem.messages), tokenizer)
    behind = tuple(tokenizer(problem.behind, add_special_tokens=False)["input_ids"]) if problem.behind else ()
    if len(behind) < problem.behind_tokens:
        raise EvaluationError(
            f"{problem.id} has {len(behind)} tokens, fewer than {problem.behind_tokens}, with this tokenizer"
        )
    behind = behind[-problem.behind_tokens :]
    if problem.behind_tokens and not all(answer in tokenizer.decode(behind) for answer in problem.answers):
        raise EvaluationError(
            f"{problem.id}: the fact is not in the last {problem.behind_tokens} tokens, with this tokenizer"
        )
    if not problem.turns:
        return Asked((whole,), behind, problem.max_new_tokens, problem.answers)
    ends = [i + 1 for i, message in enumerate(problem.messages[:-1]) if message.role == "assistant"]
    pieces: list[tuple[int, ...]] = []
    fed = 0
    for end in ends:
        so_far = _tokens(problem, end, tokenizer)
        if whole[: len(so_far)] != so_far:
            raise EvaluationError(
                f"the chat template of this model rewrites earlier turns: {problem.id} cannot be fed a turn at a time"
            )
        pieces.append(so_far[fed:])
        fed = len(so_far)
    return Asked((*pieces, whole[fed:]), behind, problem.max_new_tokens, problem.answers)


def _tokens(problem: Problem, count: int, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens of the first ``count`` messages; after the last of all, the answer begins."""
    messages = problem.messages[:count]
    begins = count == len(problem.messages)
    if not getattr(tokenizer, "chat_template", None):
        text = "\n\n".join(message.text for message in messages)
        return tuple(tokenizer(text)["input_ids"])
    chat = [{"role": message.role, "content": message.text} for message in messages]
    try:
        found = tokenizer.apply_chat_template(chat, add_generation_prompt=begins, return_dict=True)
    except Exception as error:  # a template raises what it likes
        raise EvaluationError(f"the chat template of this model refuses {problem.id}: {one_line(error)}") from error
    return tuple(found["input_ids"])
