"""Which tokens are kept after many evictions, against those that should be."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import twin
from benchmarks.peers import reference
from benchmarks.peers.entrants import KVPOLICY, Entrant, Sizes, full, kvpress, pressed
from benchmarks.peers.reference import Recorder, Rule
from benchmarks.report import Section
from kvpolicy import EvictionPolicy
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.policies import snapkv, streaming_llm

__all__ = ["run"]

SINKS = 4

Held = list[list[Tensor]]  # of each layer and head, the positions held, ascending


@dataclass(frozen=True)
class Case:
    """Compare tools under one rule.

    Attributes:
        name: of the method.
        rule: what should be kept.
        forced: tokens that the rule keeps whatever is asked; they do not count.
        policy: ours.
        press: kvpress' scorer.
        attention: the implementations of attention that kvpress runs under.
        sinks: whether the method promises to keep the first tokens.
    """

    name: str
    rule: Rule
    forced: int
    policy: EvictionPolicy
    press: Callable[[], Any]
    attention: tuple[str, ...] = ("sdpa", "eager")
    sinks: bool = False


@dataclass
class Outcome:
    """Hold what a run kept at its end, and the share of victims at each firing that the rule names, too."""

    held: Held
    agreed: list[float]


def run(model: Any, ids: Tensor, sizes: Sizes, firings: int) -> Section:
    """Feed the same tokens to every cache, one by one behind a prompt of the budget's length.

    ``kept`` compares the end with a run of the rule itself, so that errors add up; ``victims`` asks
    the rule at every firing about the tokens that the tool then held.

    Args:
        model: in float64, so that no rounding decides.
        ids: tokens ``[1, budget + firings * interval]``.
        sizes: of all.
        firings: evictions.
    """
    section = Section(
        "kept",
        f"share of the kept tokens that should be kept after {firings} firings, and of the victims at each firing; "
        f"budget {sizes.budget}, interval {sizes.interval}, window {sizes.window}, float64, all layers and heads",
        ["method", "tool", "attention", "kept", f"sinks of {SINKS}", "victims"],
    )
    ids = ids[:, : sizes.budget + firings * sizes.interval]
    for case in _cases(sizes):
        with ExitStack() as presses, torch.no_grad():
            runner = full(twin(model))
            ideal = _decode(runner, ids, sizes, case.rule, obey=True)
            for entrant, attention in _entrants(model, case, sizes, presses):
                found = _decode(entrant, ids, sizes, case.rule)
                share, sinks = _compare(found.held, ideal.held, ids.shape[1] - case.forced)
                victims = statistics.fmean(found.agreed)
                section.rows.append([case.name, entrant.tool, attention, share, sinks if case.sinks else "–", victims])
    return section


def _cases(sizes: Sizes) -> list[Case]:
    budget, interval, window = sizes.budget, sizes.interval, sizes.window
    cases = [
        Case(
            "StreamingLLM",
            reference.streaming(budget),
            0,
            streaming_llm(budget, interval=interval, recent=window),
            _streaming_press,
            ("sdpa",),
            sinks=True,
        )
    ]
    for pool in (sizes.pool, 1):
        cases.append(
            Case(
                f"SnapKV, pooling {pool}",
                reference.snapkv(budget, window, pool),
                window,
                snapkv(budget, window=window, pool=pool, interval=interval),
                partial(_snapkv_press, window, pool),
            )
        )
    return cases


def _streaming_press() -> Any:
    return kvpress().StreamingLLMPress(n_sink=SINKS)


def _snapkv_press(window: int, pool: int) -> Any:
    return kvpress().SnapKVPress(window_size=window, kernel_size=pool)


def _entrants(model: Any, case: Case, sizes: Sizes, presses: ExitStack) -> list[tuple[Entrant, str]]:
    found = list[tuple[Entrant, str]]()
    for attention in case.attention if kvpress() else ():
        own = twin(model)
        own.set_attn_implementation(attention)
        found.append((pressed(own, case.name, case.press(), sizes, presses, hidden_states=256), attention))
    own = twin(model)
    return [*found, (Entrant(KVPOLICY, case.name, own, EvictionCache(own, case.policy)), "sdpa")]


def _decode(entrant: Entrant, ids: Tensor, sizes: Sizes, rule: Rule, *, obey: bool = False) -> Outcome:
    """Decode; ``obey`` makes the entrant, whose cache evicts nothing by itself, keep what the rule says."""
    recorder = Recorder(entrant.model)
    entrant.feed(ids[:, : sizes.budget])
    layers = range(len(entrant.model.model.layers))
    held = [[torch.arange(sizes.budget) for _ in recorder.keys(i)] for i in layers]
    agreed = list[float]()
    for segment in torch.split(ids[:, sizes.budget :], sizes.interval, 1):
        new = torch.arange(entrant.position, entrant.position + segment.shape[1])
        for token in torch.split(segment, 1, 1):
            entrant.feed(token)
        before = [[torch.cat([head, new]) for head in heads] for heads in held]
        due = [recorder.keep(rule, i, before[i]) for i in layers]
        if obey:
            _cut(entrant.cache, due, before)
        held = [_held(entrant, recorder, i) for i in layers]
        agreed.append(_agreement(before, held, due))
    return Outcome(held, agreed)


def _held(entrant: Entrant, recorder: Recorder, layer: int) -> list[Tensor]:
    if isinstance(entrant.cache, EvictionCache):
        return list(entrant.cache.receipt().positions(layer)[0].long())
    return list(recorder.find(layer, entrant.cache.layers[layer].keys[0]))


def _cut(cache: Any, due: Held, before: Held) -> None:
    """Keep what is due of a cache whose slots are in position order."""
    for layer, keep, held in zip(cache.layers, due, before, strict=True):
        slots = torch.stack([torch.isin(b, a).nonzero()[:, 0] for a, b in zip(keep, held, strict=True)])
        slots = slots[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, slots), layer.values.gather(2, slots)


def _agreement(before: Held, held: Held, due: Held) -> float:
    """Return the share of the victims that should be victims."""
    shares = list[float]()
    for heads in zip(before, held, due, strict=True):
        for had, has, should in zip(*heads, strict=True):
            victims = had[~torch.isin(had, has)]
            shares.append(1 - float(torch.isin(victims, should).double().mean()))
    return statistics.fmean(shares)


def _compare(held: Held, ideal: Held, below: int) -> tuple[float, float]:
    """Return the share of kept tokens below a position that should be there, and the sinks kept, per head."""
    pairs = [pair for heads in zip(held, ideal, strict=True) for pair in zip(*heads, strict=True)]
    shares = [float(torch.isin(a[a < below], b).double().mean()) for a, b in pairs]
    return statistics.fmean(shares), statistics.fmean(float((a < SINKS).sum()) for a, _ in pairs)
