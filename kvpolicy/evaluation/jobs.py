"""What is done at once, and who does it: a :class:`Job` goes to a :class:`Worker`, and records come back."""

from __future__ import annotations

import platform
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, get_args

import torch

from kvpolicy.errors import BindError, RunError, one_line
from kvpolicy.evaluation import loops
from kvpolicy.evaluation.generation import Generation
from kvpolicy.evaluation.grading import grade
from kvpolicy.evaluation.problem import Problem
from kvpolicy.evaluation.record import FULL, Cell, Record
from kvpolicy.evaluation.rendering import Asked
from kvpolicy.evaluation.weights import fingerprint, folder_of
from kvpolicy.grammar import parse_policy
from kvpolicy.loading import load, load_tokenizer

__all__ = ["ENGINES", "Answering", "Job", "Model", "Reading", "Worker"]

Engine = Literal["transformers", "vllm"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


@dataclass(frozen=True)
class Model:
    """Name a model, and how it runs.

    Attributes:
        name: a folder, or a name on the hub.
        dtype: ``"bfloat16"``, ...
        device: ``"cpu"``, ``"cuda"``, ...
        engine: what runs it.
    """

    name: str
    dtype: str
    device: str
    engine: Engine = "transformers"


@dataclass(frozen=True)
class Answering:
    """Name some problems of one cell that are answered in one batch.

    Attributes:
        cell: whose they are.
        number: of the batch in the cell.
        problems: what is asked.
        asked: the same in tokens.
    """

    cell: Cell
    number: int
    problems: tuple[Problem, ...]
    asked: tuple[Asked, ...]

    @property
    def longest(self) -> int:
        """Return the tokens that a problem and its answer may have."""
        return max(one.length + one.max_new_tokens for one in self.asked)


@dataclass(frozen=True)
class Reading:
    """Name some texts of one length that are read in one batch, under several policies side by side.

    Attributes:
        cells: those of the policies; they differ in nothing else.
        number: of the batch.
        ids: of the texts.
        digests: what tells each text from another one of this name.
        tokens: of each text.
        prompt_length: tokens of the prompt.
    """

    cells: tuple[Cell, ...]
    number: int
    ids: tuple[str, ...]
    digests: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    prompt_length: int

    @property
    def longest(self) -> int:
        """Return the tokens of the texts."""
        return max(map(len, self.tokens))


Job = Answering | Reading


class Worker:
    """Do jobs with one model; can be sent to another process before :meth:`setup`.

    Args:
        model: which, and how it runs.
        policies: the texts of all policies that jobs may name.
        weights: the model's fingerprint, which must be that of what is loaded where the worker runs.
        working: as of :func:`kvpolicy.loading.load`.
    """

    def __init__(
        self,
        model: Model,
        policies: Sequence[str],
        weights: str,
        working: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.policies, self.weights, self.working = model, tuple(policies), weights, working
        self._engine: Any = None
        self._tokenizer: Any = None

    def setup(self) -> None:
        """Load the model, and bind every policy to it once.

        Raises:
            LoadError: there is no such model.
            RunError: here it is another one.
            BindError: a policy cannot run on it.
        """
        if self._engine is not None:
            return
        here = fingerprint(folder_of(self.model.name))
        if here != self.weights:
            raise RunError(
                f"{self.model.name} has other files here ({here}) than where it was planned ({self.weights})"
            )
        parsed = [parse_policy(text) for text in self.policies if text != FULL]
        if self.model.engine == "vllm":
            from kvpolicy.evaluation.serving import VLLMEngine

            self._tokenizer = load_tokenizer(self.model.name)
            self._engine = VLLMEngine(self.model.name, parsed, dtype=self.model.dtype)
            return
        from kvpolicy.adapters.hf import EvictionCache
        from kvpolicy.evaluation.answering import TransformersEngine

        dtype, device = getattr(torch, self.model.dtype), torch.device(self.model.device)
        loaded = load(self.model.name, dtype, device, self.working)
        for policy in parsed:
            try:
                EvictionCache(loaded.model, policy, max_new_tokens=1).unbind()
            except BindError as error:
                raise type(error)(f"{policy!r}: {error}") from error
        self._tokenizer, self._engine = loaded.tokenizer, TransformersEngine(loaded)

    def __call__(self, batch: Job) -> list[Record]:
        """Return the records of a job.

        Raises:
            RunError: the device has not enough memory, or a policy fails.
        """
        try:
            return self._answer(batch) if isinstance(batch, Answering) else self._read(batch)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise RunError(
                f"{self.model.device} has not enough memory for {len(_rows(batch))} rows at once: write a smaller "
                f"`batch` ({one_line(error, 120)})"
            ) from error

    def _answer(self, job: Answering) -> list[Record]:
        start = time.perf_counter()
        found = self._generate(job)
        seconds = (time.perf_counter() - start) / len(found)
        return [
            self._graded(job, problem, asked, one, seconds)
            for problem, asked, one in zip(job.problems, job.asked, found, strict=True)
        ]

    def _generate(self, job: Answering) -> list[Generation]:
        cell = job.cell
        policy = None if cell.policy == FULL else parse_policy(cell.policy)
        if self.model.engine == "vllm":
            return self._engine.generate(
                [one.pieces[0] for one in job.asked],
                policy,
                max_new_tokens=[one.max_new_tokens for one in job.asked],
                temperature=cell.temperature,
                top_p=cell.top_p,
                seeds=[zlib.crc32(f"{cell.seed} {problem.id}".encode()) for problem in job.problems],
            )
        from kvpolicy.evaluation.answering import Drawing

        names = [zlib.crc32(problem.id.encode()) for problem in job.problems]
        return self._engine.generate(job.asked, policy, Drawing(cell.temperature, cell.top_p, cell.seed), names)

    def _graded(self, job: Answering, problem: Problem, asked: Asked, one: Generation, seconds: float) -> Record:
        output = self._tokenizer.decode(one.tokens, skip_special_tokens=True)
        parts = grade(problem, output)
        details = {
            "output": output,
            "parts": list(parts),
            "prompt_tokens": asked.length,
            "tokens": len(one.tokens),
            "finish": one.finish,
            "loop": loops.ending(output) in ("garbage", "phrase loop"),
            "loop_zip": loops.is_repetitive(output),
            "compression": one.compression,
            "peak_nbytes": one.peak_nbytes,
            "evictions": one.evictions,
            "seconds": seconds,
            "batch": job.number,
            **self._where(asked.digest),
        }
        return Record(job.cell, problem.id, sum(parts) / len(parts), details, self._versions())

    def _read(self, job: Reading) -> list[Record]:
        from kvpolicy.evaluation.texts import read

        start = time.perf_counter()
        policies = [parse_policy(cell.policy) for cell in job.cells]
        names = [zlib.crc32(one.encode()) for one in job.ids]
        starts = [cell.budget for cell in job.cells]
        found = read(self._engine.model, policies, job.tokens, job.prompt_length, job.cells[0].seed, names, starts)
        seconds = (time.perf_counter() - start) / (len(job.ids) * len(job.cells))
        return [
            Record(
                cell,
                one,
                details["kl"],
                {**details, "seconds": seconds, "batch": job.number, **self._where(digest)},
                self._versions(),
            )
            for cell, texts in zip(job.cells, found, strict=True)
            for one, digest, details in zip(job.ids, job.digests, texts, strict=True)
        ]

    def _where(self, digest: str) -> dict[str, str]:
        """Return what was asked, as a digest, of which model as it was named, and on what device."""
        return {"asked": digest, "model": self.model.name, "device": self.model.device}

    def _versions(self) -> dict[str, str]:
        found = {name: version(name) for name in ("kvpolicy", "torch", "transformers")}
        if self.model.engine == "vllm":
            import vllm

            found["vllm"] = vllm.__version__
        return {"python": platform.python_version(), **found}


def _rows(job: Job) -> Sequence[object]:
    return job.problems if isinstance(job, Answering) else job.ids
