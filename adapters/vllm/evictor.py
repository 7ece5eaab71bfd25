"""The worker's side: :class:`Evictor` evicts before a step what the steps before have made due, and plans the step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy.adapters.vllm.arena import Arena
from kvpolicy.adapters.vllm.config import Config
from kvpolicy.adapters.vllm.memory import Pages
from kvpolicy.adapters.vllm.refusals import insist_on_layer
from kvpolicy.adapters.vllm.requests import Request, table_of
from kvpolicy.adapters.vllm.selftest import WriteWatch, check_attention
from kvpolicy.errors import IntegrityError
from kvpolicy.eviction import LogitSpec, evict, is_end
from kvpolicy.host import sent
from kvpolicy.policy import LayerPlan
from kvpolicy.row import Row
from kvpolicy.view import LayerSpec

__all__ = ["Evictor"]


@dataclass
class _Progress:
    """Know how far a request is.

    Attributes:
        row: counts, with the tokens of the last step.
        before: the row before that step.
        turn: that step ended a turn.
        begun: a policy has seen it.
    """

    row: Row
    before: Row
    turn: bool = False
    begun: bool = False


class Evictor:
    """Evict from the layers of one KV cache group of a worker.

    Args:
        spec: an ``EvictionSpec``, with the block size of the kernels.
        layer_names: of the group.
        vllm_config: of the engine.
        device: of the caches.

    Attributes:
        lines: where each token's query of this step goes, ``[tokens]`` int64 on the device, a part of a buffer
            that keeps its address; None where no query is remembered.
    """

    def __init__(self, spec: Any, layer_names: Sequence[str], vllm_config: Any, device: torch.device) -> None:
        found = vllm_config.compilation_config.static_forward_context
        modules = [found[name] for name in layer_names]
        for name, module in zip(layer_names, modules, strict=True):
            insist_on_layer(name, module, spec)
        table = table_of(vllm_config)
        assert table is not None, "the logits processor is made before the layers' metadata builders"
        self._table, self._config, self._device = table, spec.config, torch.device(device)
        self._block = spec.block_size
        plan, impl = self._config.plan, modules[0].impl
        layer = LayerSpec(
            spec.num_kv_heads, impl.num_heads, spec.head_size, spec.head_size_v, plan.capacity, spec.dtype, self._device
        )
        indices = [_index(name) for name in layer_names]
        for module in modules:
            module.impl.kvpolicy_reserved = None
        self._arena = Arena(layer, indices, table.places, self._config.ring)
        self._arena.set_aside(self._config.default[0])
        for number, module in enumerate(modules):
            module.impl.kvpolicy_queries = None if self._arena.queries is None else self._arena.queries[number]
        self._pages = Pages(modules, spec.head_size, spec.head_size_v)
        self._watch, self._untested, self._first = WriteWatch(self._pages), True, modules[0]
        self._logits = _logits(modules, spec, vllm_config, self._config, self._device)
        self._progress: dict[int, tuple[Request, _Progress]] = {}
        self._step = table.step
        rows, tokens = vllm_config.scheduler_config.max_num_seqs + 1, vllm_config.scheduler_config.max_num_batched_tokens
        self._lengths = torch.zeros(max(rows, tokens), dtype=torch.int32, device=self._device)
        self._lines = torch.zeros(tokens + rows, dtype=torch.int64, device=self._device)
        self._written = 0  #: lines that are not all for queries that nobody asks
        self.lines: Tensor | None = None
        self._counters = table.counters

    def test(self, build: Any, cm: Any) -> None:
        """Compare this engine with the full cache, before its first step."""
        cache = self._first.kv_cache
        busy = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._untested and isinstance(cache, Tensor) and cache.dim() == 4 and len(cache) > 2 and not busy:
            self._untested = False
            check_attention(build, cm, self._first, self._pages, self._logits_of(slice(0, 1)), self._block)

    # One step

    def step(self, cm: Any) -> Any:
        """Evict what is due, and return the step's metadata with slots in place of tokens.

        Writes ``cm.slot_mapping`` in place: what writes keys and values reads the same memory.

        Args:
            cm: vLLM's ``CommonAttentionMetadata``.
        """
        counts = np.diff(cm.query_start_loc_cpu.numpy()).astype(np.int64)
        used = int((counts > 0).sum())
        requests = self._requests(cm, used)
        lengths = self._lengths[: len(cm.seq_lens)]
        lengths.copy_(cm.seq_lens)
        if requests is None:  # a warm-up, or a graph that is captured
            self._direct(np.zeros(0, dtype=np.int64), cm.num_actual_tokens)
            return cm.replace(seq_lens=lengths)
        self._watch.after()
        counts = counts[:used]
        seen = cm.seq_lens_cpu_upper_bound[:used].numpy().astype(np.int64) - counts
        held = [self._progress_of(request, int(n)) for request, n in zip(requests, seen, strict=True)]
        self._evict_due(requests, held, cm.block_table_tensor)
        starts = np.array([n if p is None else p.row.length for n, p in zip(seen, held, strict=True)])
        self._watch_first(held, cm.block_table_tensor)
        self._count(requests, held, counts)
        self._place(cm, requests, counts, seen, starts)
        self._counters.set("slots_in_use", float((starts + counts).sum()))
        host = cm.seq_lens_cpu_upper_bound.clone()
        host[:used] = torch.from_numpy(starts + counts).to(host.dtype)
        lengths[:used].copy_(sent(host[:used], self._device))
        return cm.replace(
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=host,
            max_seq_len=int(host.max()),
            _num_computed_tokens_cache=None,
        )

    def _requests(self, cm: Any, used: int) -> list[Request] | None:
        if self._table.step == self._step:
            return None
        self._step = self._table.step
        found = self._table.rows(used, None if cm.req_idx is None else cm.req_idx[:used])
        if found is not None and len(found) != used:
            raise IntegrityError(f"a step of {used} requests, and {len(found)} of them are known: please report it")
        return found

    def _progress_of(self, request: Request, seen: int) -> _Progress | None:
        """Return how far a request is, checked; None where it keeps everything."""
        if request.settings.off:
            return None
        found = self._progress.get(request.place)
        if seen == 0 and (found is None or found[0] is not request or found[1].row.seen):
            row = Row(seed=request.settings.seed)
            if request.again:
                self._counters.add("recomputed_requests", 1)
            found = self._progress[request.place] = (request, _Progress(row, row))
        if found is None or found[0] is not request or found[1].row.seen != seen:
            known = None if found is None or found[0] is not request else found[1].row.seen
            raise IntegrityError(f"a request is at {seen} tokens, and {known} were counted: please report it")
        return found[1]

    def _watch_first(self, held: Sequence[_Progress | None], table: Tensor) -> None:
        """Look after the first token that is written into a slot other than the one that vLLM would take."""
        if not self._watch.done:
            moved = (r for r, one in enumerate(held) if one is not None and one.row.length < one.row.seen)
            for r in itertools.islice(moved, 1):
                self._watch.before(table[r : r + 1], held[r].row.length)

    def _count(self, requests: Sequence[Request], held: Sequence[_Progress | None], counts: np.ndarray) -> None:
        """Count the tokens of this step, which its forward pass will write."""
        for request, progress, count in zip(requests, held, counts.tolist(), strict=True):
            if progress is None:
                continue
            decoding = count == 1 and progress.row.seen >= request.prompt
            progress.before, progress.row = progress.row, progress.row.advanced(count, decoding=decoding)
            # Where prompts are exact, all chunks of a prompt are one turn.
            progress.turn = not decoding and (not self._config.exact or progress.row.seen >= request.prompt)

    def _place(self, cm: Any, requests: Sequence[Request], counts: np.ndarray, seen: np.ndarray, starts: np.ndarray) -> None:
        """Write where keys, values and queries of this step's tokens go."""
        ends = counts.cumsum()
        row = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        slot = torch.from_numpy(np.stack([row, starts[row] + nth]))
        rows, slots = sent(slot, self._device)
        blocks = cm.block_table_tensor[rows, slots // self._block].to(torch.int64)
        cm.slot_mapping[: len(slots)].copy_(blocks * self._block + slots % self._block)
        window = self._config.ring
        if not window:
            return
        places = np.array([request.place for request in requests])
        kept = np.array([not request.settings.off for request in requests])[row]
        newest = nth >= np.repeat(counts, counts) - window
        line = places[row] * window + (seen[row] + nth) % window
        self._direct(np.where(kept & newest, line, self._table.places * window), cm.num_actual_tokens)

    def _direct(self, lines: np.ndarray, tokens: int) -> None:
        """Write where queries go; those of padding go where nobody asks."""
        if not self._config.ring:
            return
        size = max(tokens, len(lines))
        # A graph that was captured for more tokens reads on behind those of this step.
        whole = np.full(max(size, self._written), self._table.places * self._config.ring, dtype=np.int64)
        whole[: len(lines)] = lines
        self._lines[: len(whole)].copy_(sent(torch.from_numpy(whole), self._device))
        self._written, self.lines = len(lines), self._lines[:size]

    # Evicting

    def _evict_due(self, requests: Sequence[Request], held: Sequence[_Progress | None], table: Tensor) -> None:
        """Evict from every request for which it is due."""
        due: list[int] = []
        for r, progress in enumerate(held):
            if progress is not None:
                plan = _plan(requests[r])
                if is_end(plan, progress.before, progress.row, turn=progress.turn):
                    shown = "every_query" in requests[r].settings.policy.needs
                    if shown or progress.row.length > plan.budget:
                        due.append(r)
                progress.turn = False
        if not due:
            return
        begin = time.perf_counter()
        # Rows of one policy stand next to each other; a prompt that is longer than the slots is a batch of its own.
        capacity = self._config.plan.capacity
        due.sort(key=lambda r: (held[r].row.length > capacity, repr(requests[r].settings.policy), r))
        for _, batch in itertools.groupby(due, key=lambda r: (r if held[r].row.length > capacity else -1)):
            rows = list(batch)
            self._evict([requests[r] for r in rows], [held[r] for r in rows], table[rows])
        self._counters.add("compaction_seconds", time.perf_counter() - begin)

    def _evict(self, requests: Sequence[Request], held: Sequence[_Progress], table: Tensor) -> None:
        policies, plans = [one.settings.policy for one in requests], [_plan(one) for one in requests]
        places, rows = [one.place for one in requests], [one.row for one in held]
        over = [row.length > plan.budget for row, plan in zip(rows, plans, strict=True)]
        kept = [plan.budget if cut else row.length for row, plan, cut in zip(rows, plans, over, strict=True)]
        after = rows
        for at in self._parts(rows):
            store = self._arena.taken(at, places, policies, plans, rows, [one.begun for one in held])
            store.memory, write = self._pages.open(at, table, [row.length for row in rows], kept)
            evict(store, over, self._logits_of(at))
            write()
            self._arena.put(store, at, places)
            after = store.rows
        for progress, row in zip(held, after, strict=True):
            self._counters.add("evictions", row.evictions - progress.row.evictions)
            self._counters.add("evicted_tokens", progress.row.length - row.length)
            progress.row, progress.begun = row, True

    def _parts(self, rows: Sequence[Row]) -> list[slice]:
        """Return parts of the layers whose copies fit into the workspace."""
        spec = self._arena.spec
        slots = max(spec.capacity, *(row.length for row in rows)) * spec.num_heads * 16
        queries = self._config.ring * spec.num_query_heads * spec.head_dim * spec.dtype.itemsize
        most = max(1, self._config.workspace // 2 // (len(rows) * (slots + queries)))
        layers = len(self._arena.layers)
        return [slice(first, min(first + most, layers)) for first in range(0, layers, most)]

    def _logits_of(self, at: slice) -> LogitSpec:
        sinks = self._logits.sinks
        return self._logits if sinks is None else replace(self._logits, sinks=sinks[at])


def reserve(vllm_config: Any, impl: Any) -> Tensor | None:
    """Return memory of a GPU, as much as one layer's requests will be remembered in.

    Args:
        vllm_config: of the engine.
        impl: of the layer, with its heads.
    """
    config, device = Config.of(vllm_config), torch.get_default_device()
    if config is None or device.type == "cpu":
        return None
    size, dtype = impl.head_size, vllm_config.model_config.dtype
    heads = (impl.num_kv_heads, impl.num_heads)
    spec = LayerSpec(*heads, size, size, config.plan.capacity, dtype, torch.device("meta"))
    arena = Arena(spec, [0], vllm_config.scheduler_config.max_num_seqs, config.ring)
    arena.set_aside(config.default[0])
    return torch.empty(arena.nbytes(), dtype=torch.uint8, device=device)


def _plan(request: Request) -> LayerPlan:
    plan = request.settings.plan
    assert plan is not None
    return plan


def _index(name: str) -> int:
    """Return the index of a layer in the model."""
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(name)


def _logits(modules: Sequence[Any], spec: Any, vllm_config: Any, config: Config, device: torch.device) -> LogitSpec:
    """Return what the model's attention does, and which heads of it are here."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_reduce,
    )

    impl, model = modules[0].impl, vllm_config.model_config
    ranks, rank, heads = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank(), spec.num_kv_heads
    total = model.get_total_num_kv_heads()
    sinks = [getattr(module.impl, "sinks", None) for module in modules]
    softcap = getattr(impl, "logits_soft_cap", None) or getattr(impl, "soft_cap", None)
    return LogitSpec(
        scaling=float(impl.scale),
        softcap=float(softcap) if softcap else None,
        sinks=None if sinks[0] is None else torch.stack([one.float().to(device) for one in sinks]),
        num_layers=model.get_total_num_hidden_layers(),
        num_heads=total,
        head_offset=rank * total // ranks,
        all_reduce=tensor_model_parallel_all_reduce if ranks > 1 else None,
        workspace=config.workspace,
    )
