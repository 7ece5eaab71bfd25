"""Decode one token after the other, with as few launches as the dense part of a model allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.gpu.decoder import Cache, Decoder

__all__ = ["Stepper"]

T = TypeVar("T")
Pair = tuple[Tensor, Tensor, Tensor]


class Stepper:
    """Decode one token of every request a step, greedily.

    On a CUDA device everything between two attentions is a CUDA graph, so that no cache is measured
    by what the host takes to launch a model. Caches run eagerly, in between, all alike.

    Args:
        decoder: whose steps.
        batch: requests.
    """

    def __init__(self, decoder: Decoder, batch: int) -> None:
        self.decoder = decoder
        shape, device = decoder.shape, decoder.device
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        size = (batch, 1, shape.query_heads, shape.head_dim)
        self.attended = torch.zeros(size, dtype=decoder.dtype, device=device)
        self.rotation = decoder.rotation(self.positions)
        self.x = decoder.embed(self.tokens)
        works = [self._first, *(self._between(layer) for layer in range(1, shape.layers))]
        if device.type == "cuda":
            self._warm_up([*works, self._last])
            pool = torch.cuda.graph_pool_handle()
            self._parts = [_captured(work, pool) for work in works]
            self._end = _captured(self._last, pool)
        else:
            self._parts, self._end = works, self._last

    def start(self, position: int) -> None:
        """Let the next token have this position."""
        self.positions.fill_(position)

    def step(self, cache: Cache) -> None:
        """Decode one token; the caller ends the pass with ``cache.step()``."""
        for layer, part in enumerate(self._parts):
            self.attended.copy_(cache.attend(layer, *part()))
        self._end()

    # What is captured. Each part reads what the one before it left in ``x``: a graph's output stays
    # where it is, so that a part captured later reads the right address.

    def _first(self) -> Pair:
        self.rotation = self.decoder.rotation(self.positions)
        self.x = self.decoder.embed(self.tokens)
        return self.decoder.before(0, self.x, self.rotation)

    def _between(self, layer: int) -> Callable[[], Pair]:
        def work() -> Pair:
            self.x = self.decoder.after(layer - 1, self.x, self.attended)
            return self.decoder.before(layer, self.x, self.rotation)

        return work

    def _last(self) -> None:
        self.x = self.decoder.after(len(self.decoder.layers) - 1, self.x, self.attended)
        self.tokens.copy_(self.decoder.logits(self.x).argmax(-1, keepdim=True))
        self.positions.add_(1)

    def _warm_up(self, works: list[Callable[[], object]]) -> None:
        """Run everything once on a stream of its own, as graphs ask for."""
        make: Callable[..., Any] = torch.cuda.Stream
        stream = make()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for work in works:
                work()
        torch.cuda.current_stream().wait_stream(stream)


def _captured(work: Callable[[], T], pool: Any) -> Callable[[], T]:
    """Return what replays some work, and gives its first outputs, which it has overwritten."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = work()

    def replay() -> T:
        graph.replay()
        return outputs

    return replay
