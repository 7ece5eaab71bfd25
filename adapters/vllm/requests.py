"""Which requests a step holds: :class:`RequestTable`, told by vLLM's interface for logits processors.

That interface is how vLLM tells a worker the sampling parameters of its requests. Logits are left alone.
"""

from __future__ import annotations

import weakref
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from kvpolicy.adapters.vllm.board import announce, configs
from kvpolicy.adapters.vllm.config import KEY, Config, insist_on_key
from kvpolicy.adapters.vllm.plugin import warn_of_version
from kvpolicy.adapters.vllm.progress import Request
from kvpolicy.adapters.vllm.refusals import insist_on_engine, insist_on_some
from kvpolicy.adapters.vllm.settings import Settings
from kvpolicy.errors import KVPolicyError

__all__ = ["RequestTable", "places_of", "table_of"]

#: Of the engines of this process, by vLLM's name of their configuration.
_tables: weakref.WeakValueDictionary[str, RequestTable] = weakref.WeakValueDictionary()


class RequestTable(LogitsProcessor, LogitsProcessorV2):  # pyright: ignore[reportUntypedBaseClass]
    """Follow which request is in which row, for model runners V1 and V2.

    Attributes:
        step: how many batches were told.
        evicts: some layer evicts; if none does, the first step is an error.
        places: requests that can be held at once.
    """

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.config = Config.of(vllm_config)
        self.step, self.evicts = 0, False
        self._rows: dict[int, Request] = {}
        self._states = None if len(_) > 1 else _[0]  # of runner V2
        if self.config is None:
            return
        insist_on_engine(vllm_config)
        warn_of_version()
        self.places = places_of(vllm_config, v2=self._states is not None)
        self._free = list(range(self.places))[::-1]
        self._known: dict[int, Request] = {}  #: in the order in which they were last in a batch
        parallel = vllm_config.parallel_config
        name = f"{vllm_config.instance_id}-{parallel.data_parallel_rank}"
        self.counters = announce(self.config, name, parallel.rank)
        weakref.finalize(self, self.counters.close)
        _tables[vllm_config.instance_id] = self

    def rows(self, count: int, req_idx: Any) -> list[Request] | None:
        """Return the requests of the rows of a step, or None where they are none, as in a warm-up.

        Args:
            count: rows, pads among them.
            req_idx: ``[count]``, the number that runner V2 gives each request, or None.
        """
        if req_idx is not None:
            return [self._rows[int(i)] for i in req_idx if int(i) in self._rows] or None
        return [self._rows[i] for i in range(count) if i in self._rows] or None

    def _begin(self) -> None:
        self.step += 1
        if self.config is not None:
            insist_on_some(self.evicts)

    # Runner V1

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that came, went and changed rows."""
        self._begin()
        if self.config is None or batch_update is None:
            return
        rows = self._rows
        for index in batch_update.removed:
            self._leave(index)
        for index, params, prompt, output in batch_update.added:
            self._leave(index)
            rows[index] = self._request(params, prompt, output)
        for first, second, direction in batch_update.moved:
            moved, other = rows.pop(first, None), rows.pop(second, None)
            if moved is not None:
                rows[second] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                rows[first] = other

    def _leave(self, index: int) -> None:
        """Take a request out of a row: it ends, or waits for a step."""
        request = self._rows.pop(index, None)
        if request is not None and self._known.pop(id(request.output), None) is request:
            self._known[id(request.output)] = request

    def _request(self, params: Any, prompt: list[int] | None, output: list[int]) -> Request:
        """Return the record of a request, which may have been in a batch before."""
        found = self._known.get(id(output)) or self._again(prompt, output)
        if found is None:
            settings = Settings.served(self._asked, params)
            found = Request(self._place(), len(prompt or ()), settings, bool(output), prompt, output)
        self._known.pop(id(found.output), None)
        found.output = output
        self._known[id(output)] = found
        return found

    def _again(self, prompt: list[int] | None, output: list[int]) -> Request | None:
        """Return a request that comes back with another list: async scheduling makes a new one of its output."""
        here = {id(request) for request in self._rows.values()}
        waiting = [one for one in self._known.values() if one.tokens is prompt and id(one) not in here]
        return waiting[0] if output and prompt is not None and len(waiting) == 1 else None

    @property
    def _asked(self) -> Config:
        assert self.config is not None
        return self.config

    def _place(self) -> int:
        """Return a place that nobody needs."""
        if self._free:
            return self._free.pop()
        here = {id(request) for request in self._rows.values()}
        oldest = next(key for key, request in self._known.items() if id(request) not in here)
        return self._known.pop(oldest).place

    def apply(self, logits: Any, *_: Any) -> Any:
        """Return the logits."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Return True: logits are left alone."""
        return True

    # Runner V2

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Note a request; return False, since its logits are left alone."""
        if self.config is not None and self._states is not None:
            prompt, filled = (int(t.np[req_idx]) for t in (self._states.prompt_len, self._states.prefill_len))
            settings = Settings.served(self.config, sampling_params)
            self._rows[req_idx] = Request(req_idx, prompt, settings, filled > prompt)
        return False

    def apply_staged_writes(self) -> None:
        """Note that a step begins."""
        self._begin()

    # The process that takes requests

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse what a request cannot ask for.

        vLLM shows no configuration here: the board has those of the engines; a request must fit all of them.
        """
        try:
            insist_on_key(sampling_params.extra_args, "extra_args")
        except KVPolicyError as error:
            raise VLLMValidationError(str(error)) from error
        if (sampling_params.extra_args or {}).get(KEY) is None:
            return
        found = configs()
        try:
            for config in found:
                Settings.of(config, sampling_params)
        except KVPolicyError as error:
            raise VLLMValidationError(str(error)) from error
        if found:
            return
        raise VLLMValidationError(
            "a request asks for kvpolicy in extra_args, and no engine on this machine was started with it: write "
            '--additional-config \'{"kvpolicy": {"policy": "vase(1024)"}}\''
        )


def places_of(vllm_config: Any, *, v2: bool) -> int:
    """Return how many requests are remembered at once.

    Runner V1 does not say when a request ends. One that waits is told from one that ended by who was in a batch
    last, for which there are as many places again.
    """
    seats: int = vllm_config.scheduler_config.max_num_seqs
    return seats if v2 else 2 * seats


def table_of(vllm_config: Any) -> RequestTable | None:
    """Return who follows the requests of an engine of this process."""
    return _tables.get(vllm_config.instance_id)
