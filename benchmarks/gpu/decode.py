"""Tokens a second of an evicting cache, beside full caches of either form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.decoder import Cache, Decoder, ModelShape
from benchmarks.gpu.device import Mark, peak_bytes, reset_peak, synchronize
from benchmarks.gpu.full import Concatenating, Preallocated
from benchmarks.gpu.stepper import Stepper
from benchmarks.report import Cell, Section, Target
from kvpolicy import Policy
from kvpolicy.adapters.flash_attn import Backend, FlashCache, select_backend
from kvpolicy.adapters.flash_attn.backends.torch_varlen import TorchVarlen
from kvpolicy.policies import vase, vase_dkv
from kvpolicy.policy import ModelSpec

__all__ = ["HALFWAY", "Sizes", "evicting", "run"]

EMPTY = "–"
LEAD = ("batch", "tokens", "cache")
PREALLOCATED, CONCATENATING = "full, preallocated", "full, concatenating"

#: Tokens a full cache holds on average while 16,384 are generated behind a prompt of 256: a step takes as long
#: as the whole run does on average, since its time grows with the length.
HALFWAY = 256 + 16384 // 2
#: By shape, batch, tokens and cache: tokens a second that VaSE's authors print over those of their full cache,
#: which concatenates, for such a run.
PUBLISHED = {
    ("14B", 16, HALFWAY, name): speed / 132.9
    for name, speed in {
        "vase(2048)": 384.1,
        "vase(4096)": 333.4,
        "vase_dkv(2048)": 410.9,
        "vase_dkv(4096)": 364.8,
    }.items()
}
CHUNK = 256  #: of a prompt
EVICTING = 0.02  #: of the time of decoding, at most


@dataclass(frozen=True)
class Sizes:
    """Say what is decoded.

    Attributes:
        batches: requests.
        contexts: tokens that a full cache holds at the first timed step; the most telling first.
        budgets: of the evicting cache.
        interval: tokens between two evictions; an evicting cache is timed over one.
        steps: that a full cache is timed over.
        warm_up: steps before them.
    """

    batches: list[int]
    contexts: list[int]
    budgets: list[int]
    interval: int = 128
    steps: int = 64
    warm_up: int = 8


@dataclass(frozen=True)
class Speed:
    """Hold what decoding with one cache took.

    Attributes:
        ms: a step of the whole batch.
        evicting: the share of the time that ``cache.step()`` takes: evictions, and what counts tokens.
        peak: bytes, or None where the device does not count them.
    """

    ms: float
    evicting: float
    peak: int | None


def run(name: str, model: str, shape: ModelShape, sizes: Sizes, dtype: torch.dtype, deadline: Deadline) -> Section:
    """Decode with every cache.

    Args:
        name: of the section.
        model: the shape's name.
        shape: of the model, whose weights are random.
        sizes: what is decoded.
        dtype: of weights, keys and values.
        deadline: cases beyond it are skipped.
    """
    device = deadline.device
    backend = select_backend("auto", device=device, dtype=dtype, head_dim=shape.head_dim)
    if isinstance(backend, TorchVarlen):  # a full cache is long: let the kernel split it
        backend = replace(backend, num_splits=None)
    how = "between two attentions CUDA graphs, caches eager" if device.type == "cuda" else "all eager"
    section = Section(
        name,
        f"decoding with a model of random weights, shape {model}, {str(dtype).removeprefix('torch.')}, attention by "
        f"{backend.text}, {how}; an eviction every {sizes.interval} tokens, one in the time; peak with weights; what "
        "an evicting cache holds does not depend on the tokens seen, so that it is measured once a batch and budget",
        [*LEAD, "tokens/s", "ms a step", "peak GiB", "in step() %", "to preallocated", "to concatenating", "published"],
    )
    decoder = deadline.attempt(lambda: Decoder(shape, dtype, device))
    if isinstance(decoder, str):
        section.notes.append(f"no decoder: {decoder}")
        return section
    for batch in sizes.batches:
        stepper = deadline.attempt(partial(Stepper, decoder, batch))
        if isinstance(stepper, str):
            section.notes.append(f"batch {batch}: no steps: {stepper}")
            continue
        ours = {
            name: deadline.attempt(partial(_evicting, stepper, batch, policy, backend))
            for name, policy in _policies(sizes).items()
        }
        for context in sizes.contexts:
            full = {
                kind: deadline.attempt(partial(_full, kind, stepper, batch, context, sizes, backend))
                for kind in (PREALLOCATED, CONCATENATING)
            }
            for kind, speed in full.items():
                section.rows.append([batch, context, kind, *_cells(batch, speed), *[EMPTY] * 3])
            for cache, speed in ours.items():
                ratios = [_ratio(speed, full[kind]) for kind in (PREALLOCATED, CONCATENATING)]
                published = PUBLISHED.get((model, batch, context, cache))
                section.rows.append([batch, context, cache, *_cells(batch, speed), *ratios, published or EMPTY])
                if published and isinstance(ratios[1], float):
                    what = f"batch {batch}, {context} tokens, {cache}: time to concatenating, the published one"
                    section.targets.append(Target(what, 1 / ratios[1], 1 / published))
        section.targets += [
            Target(f"batch {batch}, {cache}: share of the time in step()", speed.evicting, EVICTING)
            for cache, speed in ours.items()
            if isinstance(speed, Speed)
        ]
    return section


def _policies(sizes: Sizes) -> dict[str, Policy]:
    made: dict[str, Callable[..., Policy]] = {"vase": vase, "vase_dkv": vase_dkv}
    return {
        f"{name}({budget})": make(budget, interval=sizes.interval, recent=min(64, sizes.interval))
        for budget in sizes.budgets
        for name, make in made.items()
    }


def _cells(batch: int, speed: Speed | str) -> list[Cell]:
    if isinstance(speed, str):
        return [speed, *[EMPTY] * 3]
    peak = EMPTY if speed.peak is None else speed.peak / 2**30
    return [batch / speed.ms * 1e3, speed.ms, peak, speed.evicting * 100]


def _ratio(speed: Speed | str, full: Speed | str) -> float | str:
    """Return how many times the tokens a second of a full cache these are."""
    if isinstance(speed, str) or isinstance(full, str):
        return EMPTY
    return full.ms / speed.ms


def _full(kind: str, stepper: Stepper, batch: int, context: int, sizes: Sizes, backend: Backend) -> Speed:
    decoder, after = stepper.decoder, sizes.warm_up + sizes.steps
    shape, dtype, device = decoder.shape, decoder.dtype, decoder.device

    def make() -> Preallocated | Concatenating:
        if kind == PREALLOCATED:
            cache: Preallocated | Concatenating = Preallocated(shape, batch, context + after, dtype, device, backend)
        else:
            cache = Concatenating(shape, batch, dtype, device, backend)
        cache.fill(context - sizes.warm_up)
        return cache

    return _measured(stepper, make, context - sizes.warm_up, sizes.warm_up, sizes.steps)


def _evicting(stepper: Stepper, batch: int, policy: Policy, backend: Backend) -> Speed:
    decoder = stepper.decoder
    sizes = policy.plan(ModelSpec(1)).layers[0]
    assert sizes is not None
    assert sizes.interval is not None

    def make() -> Cache:
        cache = evicting(decoder, batch, policy, backend)
        _fill(cache, decoder, batch, sizes.budget)
        return cache

    return _measured(stepper, make, sizes.budget, sizes.interval, sizes.interval)  # an eviction warms up, too


def evicting(decoder: Decoder, batch: int, policy: Policy, backend: Backend) -> FlashCache:
    """Return an empty cache that evicts, for a decoder."""
    shape = decoder.shape
    return FlashCache(
        policy,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_query_heads=shape.query_heads,
        head_dim=shape.head_dim,
        batch_size=batch,
        dtype=decoder.dtype,
        device=decoder.device,
        backend=backend,
    )


def _fill(cache: Cache, decoder: Decoder, batch: int, length: int) -> None:
    """Let a cache take a prompt of random keys and values, in chunks, which evicts nothing."""
    shape = decoder.shape
    for first in range(0, length, CHUNK):
        width = min(CHUNK, length - first)
        q, k, v = (
            torch.empty(batch, width, heads, shape.head_dim, dtype=decoder.dtype, device=decoder.device).normal_()
            for heads in (shape.query_heads, shape.heads, shape.heads)
        )
        for layer in range(shape.layers):
            cache.attend(layer, q, k, v)
        cache.step()


def _measured(stepper: Stepper, make: Callable[[], Cache], position: int, warm_up: int, steps: int) -> Speed:
    """Decode, and look at the steps behind the warm-up."""
    device = stepper.decoder.device
    cache = make()
    reset_peak(device)
    stepper.start(position)
    for _ in range(warm_up):
        stepper.step(cache)
        cache.step()
    synchronize(device)
    start, ends = Mark(device), list[tuple[Mark, Mark]]()
    for _ in range(steps):
        stepper.step(cache)
        before = Mark(device)
        cache.step()
        ends.append((before, Mark(device)))
    stop = Mark(device)
    synchronize(device)
    whole = start.until(stop)
    return Speed(whole / steps, sum(a.until(b) for a, b in ends) / whole, peak_bytes(device))
