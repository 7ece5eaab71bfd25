"""The scheduler's side: :class:`EvictionManager` gives a request its blocks once, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from kvpolicy.adapters.vllm.lengths import Reservation
from kvpolicy.adapters.vllm.settings import Settings

__all__ = ["EvictionManager"]


@dataclass
class _Held:
    """What is known of a request.

    Attributes:
        end: tokens after which it decodes.
        reservation: how many blocks it holds; None where it keeps everything.
        known: whether the request itself was seen; before, it has the engine's policy.
    """

    end: int
    reservation: Reservation | None
    known: bool = False


class EvictionManager(SingleTypeKVCacheManager):  # pyright: ignore[reportUntypedBaseClass]
    """Give each request, when it is admitted, all the blocks that it will ever hold.

    What a prompt needs beyond the slots of a policy goes back once a worker has cut it. So decoding asks for
    nothing, and nothing is preempted for it. A request that keeps everything grows as in stock vLLM.
    """

    def __init__(self, kv_cache_spec: Any, *arguments: Any, **keywords: Any) -> None:
        super().__init__(kv_cache_spec, *arguments, **keywords)
        # vLLM shows requests to managers that cache, and to no others. What else it does with such a manager is
        # overridden below: nothing is found, and nothing is ever cached.
        self.enable_caching = True
        self._spec = kv_cache_spec
        self._default = kv_cache_spec.reservation(kv_cache_spec.config.plan)
        self._requests: dict[str, _Held] = {}

    # Admission and growth

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        *_: Any,
        **__: Any,
    ) -> int:
        """Return the blocks that a request lacks."""
        held = self._requests.setdefault(request_id, _Held(0, self._default))
        if num_tokens - total_computed_tokens > 1 or not self.req_to_blocks.get(request_id):
            held.end = max(held.end, num_tokens)  # a prompt, or what is computed again after a preemption
        return max(0, self._wanted(request_id, num_tokens) - len(self.req_to_blocks.get(request_id, ())))

    def _wanted(self, request_id: str, num_tokens: int) -> int:
        """Return the blocks that a request is to hold, so that ``num_tokens`` have passed through it."""
        held = self._requests[request_id]
        if held.reservation is None:
            return -(-max(num_tokens, held.end) // self.block_size)
        if num_tokens > held.end:
            return held.reservation.decode
        return held.reservation.prefill(held.end)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *_: Any, **__: Any) -> list[Any]:
        """Return new blocks, behind those that the request holds."""
        blocks = self.req_to_blocks[request_id]
        missing = self._wanted(request_id, num_tokens) - len(blocks)
        if missing <= 0:
            return []
        new = self.block_pool.get_new_blocks(missing)
        blocks.extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new)
        return new

    def cache_blocks(self, request: Any, *_: Any, **__: Any) -> None:
        """Read what a request asks for; nothing is cached."""
        held = self._requests.get(request.request_id)
        if held is None or held.known:
            return
        held.known = True
        settings = Settings.served(self._spec.config, request.sampling_params)
        held.reservation = None if settings.plan is None else self._spec.reservation(settings.plan)

    # Giving back

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None, *_: Any, **__: Any
    ) -> None:
        """Give back what a prompt needed, once a step has decoded behind it: the worker has cut it by then."""
        held = self._requests.setdefault(request_id, _Held(0, self._default))
        held.end = max(held.end, num_prompt_tokens or 0)
        blocks = self.req_to_blocks.get(request_id)
        if held.reservation is None or not blocks or processed_computed_tokens <= held.end:
            return
        # A worker's table still lists them, behind the slots that the request will ever use.
        surplus = blocks[held.reservation.decode :]
        if surplus:
            del blocks[held.reservation.decode :]
            self.block_pool.free_blocks(reversed(surplus))

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """Forget a request, and return its blocks."""
        self._requests.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    # Prefixes: none

    def add_local_computed_blocks(self, request_id: str, *_: Any, **__: Any) -> None:
        """Note that a request runs; it has found nothing."""
        self.num_cached_block.setdefault(request_id, 0)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Return 0: which slots are free only the worker knows."""
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *_: Any, **__: Any
    ) -> tuple[tuple[list[Any], ...], int]:
        """Return nothing: slots that were compacted are no prefix."""
        return tuple([] for _ in kv_cache_group_ids), 0
