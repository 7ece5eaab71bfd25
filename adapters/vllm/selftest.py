"""Whether this vLLM does what the adapter relies on: asked of the engine itself, once, when it starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpolicy.adapters.vllm.config import ADAPTER
from kvpolicy.adapters.vllm.memory import Pages
from kvpolicy.compaction import moves
from kvpolicy.errors import UnsupportedError
from kvpolicy.eviction import LogitSpec

__all__ = ["WriteWatch", "check_attention"]

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def check_attention(build: Any, cm: Any, layer: Any, pages: Pages, logits: LogitSpec, block_size: int) -> None:
    """Compare one decoded token over compacted slots with the full cache and a mask.

    Writes random keys and values, drops some in each head, lets the engine's own kernels attend, and computes the
    same by hand. Uses the last blocks of the cache.

    Args:
        build: of the stock metadata builder.
        cm: metadata of any step, which names what this version has in it.
        layer: the first layer of the group.
        pages: of the group.
        logits: what the model's attention does.
        block_size: slots of a block.

    Raises:
        UnsupportedError: the answers differ, or this version cannot be asked.
    """
    try:
        error, size = _difference(build, cm, layer, pages, logits, block_size)
    except Exception as problem:
        raise UnsupportedError(f"{_version()}: {ADAPTER} could not compare itself with the full cache") from problem
    if not error <= _TOLERANCE.get(layer.kv_cache.dtype, 6e-2) * size:
        raise UnsupportedError(
            f"{_version()}: attention over compacted slots differs from the full cache with a mask by {error:.1e}; "
            "nothing is served. Install a version that kvpolicy was tested with, and please report it"
        )


def _version() -> str:
    from vllm import __version__

    return f"vLLM {__version__}"


def _difference(
    build: Any, cm: Any, layer: Any, pages: Pages, logits: LogitSpec, block_size: int
) -> tuple[float, float]:
    """Return how far the engine's answer is from ours, and how large ours is."""
    cache, impl = layer.kv_cache, layer.impl
    device, blocks, heads = cache.device, 2, impl.num_kv_heads
    tokens, stay = blocks * block_size, block_size + 1
    generator = torch.Generator().manual_seed(0)
    if device.type == "cpu":
        torch.cpu._init_amx()  # vLLM's kernels take it for granted; a model's first product of matrices does it

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, cache.dtype)

    keys, values = random(tokens, heads, impl.head_size), random(tokens, heads, pages.value_dim)
    query = random(1, impl.num_heads, impl.head_size)
    table = torch.arange(len(cache) - blocks, len(cache), dtype=torch.int32, device=device)[None]
    places = (table[0, :, None].to(torch.int64) * block_size + torch.arange(block_size, device=device)).flatten()
    impl.do_kv_cache_update(layer, keys, values, cache, places)
    kept = torch.stack([torch.randperm(tokens, generator=generator)[:stay] for _ in range(heads)]).to(device)
    mask = torch.zeros(1, heads, tokens, dtype=torch.bool, device=device).scatter_(2, kept[None], True)
    counts = torch.tensor([tokens, stay], device=device)[:, None, None].expand(-1, 1, heads)
    source, target = moves(mask, None, counts[0], counts[1], tokens - stay)
    memory, write = pages.open(slice(0, 1), table, [tokens], [stay])
    memory.move_(slice(0, 1), source, target)
    write()
    one = torch.tensor([0, 1], dtype=torch.int32)
    lengths = torch.tensor([stay], dtype=torch.int32)
    metadata = build(
        0,
        cm.replace(
            query_start_loc=one.to(device), query_start_loc_cpu=one, seq_lens=lengths.to(device), num_reqs=1,
            num_actual_tokens=1, max_query_len=1, max_seq_len=stay, block_table_tensor=table,
            slot_mapping=places[stay - 1 : stay], seq_lens_cpu_upper_bound=lengths, positions=None,
            is_prefilling=torch.tensor([False]), _num_computed_tokens_cache=None, _token_to_req_indices_cache=None,
        ),
    )  # fmt: skip
    out = torch.zeros_like(query) if pages.value_dim == impl.head_size else random(1, impl.num_heads, pages.value_dim)
    # Some kernels write the newest token themselves: it is given what lies in its slot already.
    newest = [_slot(pages, table, stay - 1, tokens, which).contiguous() for which in (0, 1)]
    impl.forward(layer, query, *newest, cache, metadata, out)
    expected = _by_hand(query, keys, values, mask[0], logits)
    return float((out.view(expected.shape).float() - expected).abs().max()), float(expected.abs().max())


def _slot(pages: Pages, table: Tensor, slot: int, tokens: int, which: int) -> Tensor:
    """Return the keys (0) or values (1) of a slot, ``[1, H, D]``."""
    memory, _ = pages.open(slice(0, 1), table, [tokens], [tokens])
    found = memory.slots(slice(0, 1), tokens)[which]
    return found[:, :, slot]


def _by_hand(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, logits: LogitSpec) -> Tensor:
    """Return attention over the whole cache where a mask ``[H, tokens]`` allows it, ``[Hq, Dv]`` float32."""
    group = query.shape[1] // keys.shape[1]
    q, k, v = query[0].float(), *(x.float().transpose(0, 1).repeat_interleave(group, 0) for x in (keys, values))
    logit = (k @ q[:, :, None])[..., 0] * logits.scaling
    if logits.softcap is not None:
        logit = logits.softcap * torch.tanh(logit / logits.softcap)
    logit = logit.masked_fill(~mask.repeat_interleave(group, 0), -torch.inf)
    if logits.sinks is not None:
        logit = torch.cat([logit, logits.sinks[0][:, None]], 1)
    weights = torch.softmax(logit, 1)[:, : len(keys)]
    return (weights[:, None] @ v)[:, 0]


class WriteWatch:
    """Look, once, whether vLLM has written a token where the evictor told it to.

    Args:
        pages: of the group.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._seen: tuple[Tensor, int, Tensor] | None = None
        self.done = False

    def before(self, table: Tensor, slot: int) -> None:
        """Write something into a free slot of a row, before a step writes a token there."""
        layer = self._pages.layers[0]
        key, value = (_slot(self._pages, table, slot, slot + 1, which) for which in (0, 1))
        size = layer.kv_cache.shape[2]
        place = table[0, slot // size].to(torch.int64)[None] * size + slot % size
        # Not what a token could write there, even one that was there before.
        layer.impl.do_kv_cache_update(layer, (key + 1).contiguous(), value.contiguous(), layer.kv_cache, place)
        self._seen = table.clone(), slot, self._read(table, slot)

    def after(self) -> None:
        """Compare, at the next step.

        Raises:
            UnsupportedError: the step has left the slot as it was.
        """
        if self.done or self._seen is None:
            return
        table, slot, held = self._seen
        self._seen, self.done = None, True
        if torch.equal(self._read(table, slot), held):
            raise UnsupportedError(
                f"{_version()} has not written a token into the slot that {ADAPTER} named: nothing more is served. "
                "Install a version that kvpolicy was tested with, and please report it"
            )

    def _read(self, table: Tensor, slot: int) -> Tensor:
        return _slot(self._pages, table, slot, slot + 1, 0).clone()
