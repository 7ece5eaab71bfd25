"""The worker's side: :class:`Evictor` evicts before a step what the steps before have made due, and plans the step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger

from kvpolicy.adapters.summing import summed
from kvpolicy.adapters.vllm.arena import Arena
from kvpolicy.adapters.vllm.buffers import Buffers
from kvpolicy.adapters.vllm.config import Config
from kvpolicy.adapters.vllm.cutting import Cutter
from kvpolicy.adapters.vllm.memory import Pages
from kvpolicy.adapters.vllm.progress import Progress, Request
from kvpolicy.adapters.vllm.refusals import insist_on_layer
from kvpolicy.adapters.vllm.requests import places_of, table_of
from kvpolicy.adapters.vllm.selftest import WriteWatch, check_attention
from kvpolicy.errors import IntegrityError
from kvpolicy.eviction import LogitSpec
from kvpolicy.view import LayerSpec

__all__ = ["Evictor", "reserve"]

_log = init_logger(f"vllm.{__name__}")  # below vLLM's own logger, which is the one that is shown


class Evictor:
    """Let the layers of one KV cache group of a worker evict.

    Args:
        spec: an ``EvictionSpec``, with the block size of the kernels.
        layer_names: of the group.
        vllm_config: of the engine.
        device: of the caches.

    Attributes:
        buffers: what a step's kernels are told.
    """

    def __init__(self, spec: Any, layer_names: Sequence[str], vllm_config: Any, device: Any) -> None:
        found = vllm_config.compilation_config.static_forward_context
        modules = [found[name] for name in layer_names]
        for name, module in zip(layer_names, modules, strict=True):
            insist_on_layer(name, module, spec)
            module.impl.kvpolicy_reserved = None
        table = table_of(vllm_config)
        assert table is not None, "the logits processor is made before the layers' metadata builders"
        # What several groups of a model do at once is counted once.
        self._counters = None if table.evicts else table.counters
        table.evicts = True
        self._table, self._step, self._first = table, table.step, modules[0]
        config: Config = spec.config
        self._exact, self._block, device = config.exact, spec.block_size, torch.device(device)
        heads = (spec.num_kv_heads, modules[0].impl.num_heads)
        layer = LayerSpec(*heads, spec.head_size, spec.head_size_v, config.plan.capacity, spec.dtype, device)
        arena = Arena(layer, [_index(name) for name in layer_names], table.places, config.ring)
        arena.set_aside(config.default[0])
        for number, module in enumerate(modules):
            module.impl.kvpolicy_queries = None if arena.queries is None else arena.queries[number]
        self._pages = Pages(modules, spec.head_size, spec.head_size_v, packed=device.type == "cpu")
        self._logits = _logits(modules, spec, vllm_config, config, device)
        self._cutter = Cutter(arena, self._pages, self._logits, self._counters)
        scheduler = vllm_config.scheduler_config
        sizes = (scheduler.max_num_seqs + 1, scheduler.max_num_batched_tokens)
        self.buffers = Buffers(*sizes, table.places, config.ring, device)
        self._progress: dict[int, Progress] = {}  #: by place
        if self._counters is not None:
            decode = spec.reservation(config.plan).decode
            _log.info(
                "kvpolicy evicts from %d layers by %r: a request that decodes holds %d slots in %d blocks of %d; "
                "%.1f MiB are remembered of %d places beside the cache",
                len(modules), config.default[0], config.plan.capacity, decode, spec.block_size,
                arena.nbytes() / 2**20, table.places,
            )  # fmt: skip
        self._watch, self._untested = WriteWatch(self._pages), True

    def test(self, build: Any, cm: Any) -> None:
        """Compare this engine with the full cache, before its first step.

        Args:
            build: of the stock metadata builder.
            cm: of that step.
        """
        if not self._untested:
            return
        cache = self._first.kv_cache
        busy = cm.seq_lens.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if isinstance(cache, Tensor) and cache.dim() == 4 and len(cache) > 2 and not busy:
            self._untested = False
            check_attention(build, cm, self._first, self._pages, self._logits, self._block)

    def step(self, cm: Any) -> Any:
        """Evict what is due, and return the step's metadata with slots in place of tokens.

        Writes ``cm.slot_mapping`` in place: what writes keys and values reads the same memory.

        Args:
            cm: vLLM's ``CommonAttentionMetadata``.
        """
        counts = np.diff(cm.query_start_loc_cpu.numpy()).astype(np.int64)
        counts = counts[: int((counts > 0).sum())]
        requests = self._requests(cm, len(counts))
        if requests is None:  # a warm-up, or a graph that is captured
            none = np.zeros(0, dtype=np.int64)
            self.buffers.direct(cm.num_actual_tokens, none, none, none)
            return cm.replace(seq_lens=self.buffers.take_lengths(cm.seq_lens))
        self._watch.after()
        seen = cm.seq_lens_cpu_upper_bound[: len(counts)].numpy().astype(np.int64) - counts
        held = [self._progress_of(request, n) for request, n in zip(requests, seen.tolist(), strict=True)]
        due = [(row, one) for row, one in enumerate(held) if one is not None and one.due()]
        if due:
            self._cutter.cut(due, cm.block_table_tensor)
        self._watch_first(held, cm.block_table_tensor)
        # A request that keeps everything has a slot for each token.
        starts = np.array([n if one is None else one.row.length for n, one in zip(seen, held, strict=True)])
        for one, count in zip(held, counts.tolist(), strict=True):
            if one is not None:
                one.advance(count, exact=self._exact)
        self.buffers.map_slots(cm, counts, starts, self._block)
        places = np.array([-1 if one is None else one.request.place for one in held])
        self.buffers.direct(cm.num_actual_tokens, counts, seen, places)
        if self._counters is not None:
            self._counters.set("slots_in_use", float((starts + counts).sum()))
        host = cm.seq_lens_cpu_upper_bound.clone()
        host[: len(counts)] = torch.from_numpy(starts + counts)
        return cm.replace(
            seq_lens=self.buffers.take_lengths(cm.seq_lens, host[: len(counts)]),
            seq_lens_cpu_upper_bound=host,
            max_seq_len=int(host.max()),
            _num_computed_tokens_cache=None,
        )

    def _requests(self, cm: Any, count: int) -> list[Request] | None:
        """Return the requests of a step, or None where there are none."""
        if self._table.step == self._step:
            return None
        self._step = self._table.step
        found = self._table.rows(count, None if cm.req_idx is None else cm.req_idx[:count])
        if found is not None and len(found) != count:
            raise IntegrityError(f"a step of {count} requests, and {len(found)} of them are known: please report it")
        return found

    def _progress_of(self, request: Request, seen: int) -> Progress | None:
        """Return how far a request is, checked; None where it keeps everything."""
        if request.settings.off:
            return None
        held = self._progress.get(request.place)
        if held is not None and held.request is not request:
            held = None  # of the one that had the place before
        if held is not None and held.row.seen == seen:
            return held
        if seen:
            known = None if held is None else held.row.seen
            raise IntegrityError(f"a request is at {seen} tokens, and {known} were counted: please report it")
        if self._counters is not None and (request.again or (held is not None and held.row.evictions)):
            self._counters.add("recomputed_requests", 1)
        self._progress[request.place] = Progress.of(request)
        return self._progress[request.place]

    def _watch_first(self, held: Sequence[Progress | None], table: Tensor) -> None:
        """Look after the first token that is written into a slot other than the one that vLLM would take."""
        if self._watch.done:
            return
        for row, one in enumerate(held):
            if one is not None and one.row.length < one.row.seen:
                self._watch.before(table[row : row + 1], one.row.length)
                return


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
    arena = Arena(spec, [0], places_of(vllm_config, v2=vllm_config.use_v2_model_runner), config.ring)
    arena.set_aside(config.default[0])
    return torch.empty(arena.nbytes(), dtype=torch.uint8, device=device)


def _index(name: str) -> int:
    """Return the index of a layer in the model."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(name))


def _logits(modules: Sequence[Any], spec: Any, vllm_config: Any, config: Config, device: torch.device) -> LogitSpec:
    """Return what the model's attention does, and which heads of it are here."""
    from vllm.distributed import get_tp_group

    impl, model, group = modules[0].impl, vllm_config.model_config, get_tp_group()
    ranks, rank = group.world_size, group.rank_in_group
    total = model.get_total_num_kv_heads()
    sinks = [module.impl.sinks for module in modules if getattr(module.impl, "sinks", None) is not None]
    softcap = getattr(impl, "logits_soft_cap", None)
    return LogitSpec(
        scaling=float(impl.scale),
        softcap=float(softcap) if softcap else None,
        sinks=torch.stack([one.float().to(device) for one in sinks]) if len(sinks) == len(modules) else None,
        num_layers=model.get_total_num_hidden_layers(),
        num_heads=total,
        head_offset=rank * total // ranks,
        # vLLM's own sum knows no integers on a CPU, and overwrites what it is given.
        all_reduce=partial(summed, group=group.device_group) if ranks > 1 else None,
        workspace=config.workspace,
    )
