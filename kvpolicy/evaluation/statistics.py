"""Intervals: how far a mean, or a difference, may be from what it would be over all such problems.

Problems are the units, always: the seeds of a problem are averaged first, since two answers to one
problem tell less than the answers to two. All intervals have 95 %.

Which method, and why. The bootstrap takes any kind of number, and is used for texts and differences. Its
percentiles are too narrow for few problems, as the normal distribution's are where Student's t is due; they
are expanded as t would expand them. For scores it breaks at the ends: of 0 right in 20, every resample has 0
right, an interval of no width. Wilson's interval has a width there, covers close to 95 % on average even for
few problems, and is narrower than that of Clopper and Pearson, which covers more than it claims.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

from kvpolicy.evaluation.errors import EvaluationError

__all__ = ["Interval", "by_problem", "mean_interval", "paired_interval", "rate_interval"]

RESAMPLES, SEED = 10_000, 0
Z = 1.959963984540054  # the normal distribution has 95 % within this many standard deviations
AT_ONCE = 1 << 20  # indices drawn at once, 8 MB
ENOUGH = 6  # problems that differ, all one way: 2 * 0.5 ** 6 is below 5 %, and 2 * 0.5 ** 5 is not


@dataclass(frozen=True)
class Interval:
    """Hold an estimate and its 95 % interval.

    Attributes:
        estimate: the mean.
        low: the lower end.
        high: the upper end.
        n: problems that it rests on.
    """

    estimate: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Return whether 0 lies outside."""
        return not self.low <= 0 <= self.high


def by_problem(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the mean of each problem over its seeds, sorted by problem.

    >>> by_problem([("b", 1.0), ("a", 0.0), ("b", 0.0)])
    {'a': 0.0, 'b': 0.5}
    """
    values: defaultdict[str, list[float]] = defaultdict(list)
    for problem, value in pairs:
        values[problem].append(value)
    return {problem: math.fsum(values[problem]) / len(values[problem]) for problem in sorted(values)}


def mean_interval(values: Sequence[float]) -> Interval:
    """Return a mean and its expanded percentile bootstrap interval (10,000 resamples, always the same ones).

    One value says nothing of the spread: its interval is the whole line.

    Args:
        values: one for each problem.

    Source: Hesterberg, What teachers should know about the bootstrap, 2015 (arXiv 1411.5279).

    Raises:
        EvaluationError: there is no value.
    """
    n = _count(values)
    data = torch.tensor(values, dtype=torch.float64)
    estimate = float(data.mean())
    if n == 1:
        return Interval(estimate, -math.inf, math.inf, 1)
    means, tail = _resampled_means(data), _tail(n)
    return Interval(estimate, float(means[tail - 1]), float(means[RESAMPLES - tail]), n)


def rate_interval(rates: Sequence[float]) -> Interval:
    """Return a mean of numbers from 0 to 1 and its Wilson interval.

    Made for zeros and ones. For what lies between, whose variance is smaller, it is too wide, never too narrow.

    Args:
        rates: one for each problem.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927; compared
    with others in Brown, Cai and DasGupta, Interval estimation for a binomial proportion, 2001.

    Raises:
        EvaluationError: there is no rate, or one is not from 0 to 1.

    >>> rate_interval([0.0] * 20).high < 0.17
    True
    """
    n = _count(rates)
    if not all(0 <= rate <= 1 for rate in rates):
        raise EvaluationError(f"a rate is from 0 to 1, found {min(rates)} to {max(rates)}: use mean_interval")
    rate = math.fsum(rates) / n
    centre = (rate + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(rate * (1 - rate) / n + (Z / (2 * n)) ** 2) / (1 + Z * Z / n)
    return Interval(rate, min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half)), n)


def paired_interval(ours: Mapping[str, float], baseline: Mapping[str, float]) -> Interval:
    """Return the mean difference over the problems that both have, and its bootstrap interval.

    Where fewer than six problems differ, the interval is made to reach 0: five of one sign come about by
    chance in more than 5 % of cases, which the bootstrap alone would not know.

    Args:
        ours: a value for each problem, its seeds averaged (:func:`by_problem`).
        baseline: what is subtracted.

    Raises:
        EvaluationError: fewer than two problems are shared.
    """
    shared = sorted(ours.keys() & baseline.keys())
    if len(shared) < 2:
        raise EvaluationError(
            f"a difference takes two problems that both have, found {len(shared)} among {len(ours)} and "
            f"{len(baseline)}: run both on the same problems"
        )
    differences = [ours[problem] - baseline[problem] for problem in shared]
    found = mean_interval(differences)
    if sum(difference != 0 for difference in differences) >= ENOUGH:
        return found
    return Interval(found.estimate, min(found.low, 0.0), max(found.high, 0.0), found.n)


def _count(values: Sequence[float]) -> int:
    if not values:
        raise EvaluationError("a mean takes one value at least, found none: run some problems first")
    return len(values)


def _tail(n: int) -> int:
    """Return how many resamples lie beyond each end of the interval of ``n`` values; 2.5 % of them for very many.

    Student's quantile is the first terms of its expansion in ``1 / (n - 1)`` (Abramowitz and Stegun, 26.7.5), to
    1 % from six values on; for fewer no resample lies beyond.

    >>> _tail(10**6), _tail(32), _tail(6), _tail(2)
    (250, 191, 25, 1)
    """
    z, v = Z, n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return max(1, round(RESAMPLES * NormalDist().cdf(-math.sqrt(n / v) * t)))


def _resampled_means(data: torch.Tensor) -> torch.Tensor:
    """Return the sorted means of resamples of the same length, drawn with replacement."""
    generator = torch.Generator().manual_seed(SEED)
    rows = max(1, AT_ONCE // len(data))
    means = [
        data[torch.randint(len(data), (min(rows, RESAMPLES - first), len(data)), generator=generator)].mean(dim=1)
        for first in range(0, RESAMPLES, rows)
    ]
    return torch.cat(means).sort().values
