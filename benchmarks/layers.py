"""All layers of a model in one view, against one view a layer."""

from __future__ import annotations

from benchmarks.report import Section
from benchmarks.stores import Shape, filled, grow, logits_of
from benchmarks.timing import clock, median_ms, ratio, take_turns
from kvpolicy.eviction import evict
from kvpolicy.policies import vase
from kvpolicy.store import Store

__all__ = ["run"]


def run(shapes: dict[str, tuple[Shape, int]], budgets: list[int], repeats: int) -> Section:
    """Evict a whole model, its layers together or one by one.

    Args:
        shapes: of a layer, and how many there are, by what to call them.
        budgets: slots kept.
        repeats: evictions of each.
    """
    section = Section(
        "layers",
        f"CPU ms of one vase eviction of all layers, {repeats} repeats",
        ["layers", "budget", "one view", "one by one", "one view / one by one"],
    )
    for name, (shape, layers) in shapes.items():
        for budget in budgets:
            together = [filled(vase(budget), shape, range(layers))]
            apart = [filled(vase(budget), shape, range(i, i + 1)) for i in range(layers)]
            contestants = {
                "together": lambda stores=together: _evict(stores),
                "apart": lambda stores=apart: _evict(stores),
            }
            take_turns(contestants, 1)
            seconds = take_turns(contestants, repeats)
            one, many = seconds["together"], seconds["apart"]
            section.rows.append([name, budget, median_ms(one), median_ms(many), ratio(one, many)])
    return section


def _evict(stores: list[Store]) -> float:
    for store in stores:
        grow(store)
    start = clock()
    for store in stores:
        evict(store, [True], logits_of(store))
    return clock() - start
