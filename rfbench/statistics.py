"""Intervals, paired differences and verdicts over prompts and training seeds, from a clustered bootstrap.

Clips of one prompt are no independent evidence, and neither are the prompts of one trained model: prompts are resampled
whole, and where there are several training seeds they are resampled as well (both apply to every clip: the two are
crossed). The percentile interval of that bootstrap is too short for few prompts and much too short for few seeds, so its
two ends are stretched away from the estimate until its standard error is the unbiased one and its multiplier is
Student's t at Satterthwaite's degrees of freedom. Measured coverage of nominal 95 % intervals, 1500 simulated tables
each (normal prompts; `seed sd` in units of the prompts' standard deviation; `benchmarks/intervals.py`):

    seeds  prompts  seed sd   percentile   BCa   stretched
      1       6       -          86 %      86 %      96 %
      1      12       -          90 %      90 %      94 %
      1      30       -          94 %      93 %      96 %
      2      12       0.3        90 %      90 %      96 %
      2      12       1.0        75 %      75 %      90 %
      3      30       1.0        79 %      80 %      92 %

BCa corrects skewness and bias, not the number of clusters, and buys nothing here. With two seeds that differ more than
the prompts do, the stretched interval is wide and still a little short: the remedy is a third seed.

Shapes: S training seeds, P prompts, R bootstrap resamples, N clips. Nothing here is random: the resamples are fixed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEVEL = 0.95
POWER = 0.80  # of `detectable`
RESAMPLES = 4000
FEWEST_ALIKE = 6  # prompts that all show the same difference: 2 * 2**-6 < 5 % in a sign test, 5 prompts would not do
REPRODUCED, CONTRADICTED, INCONCLUSIVE, NOT_RUN = "reproduced", "contradicted", "inconclusive", "not run"
VERDICTS = (REPRODUCED, CONTRADICTED, INCONCLUSIVE, NOT_RUN)


@dataclass(frozen=True)
class Sample:
    """Clip values of one contender, added up by training seed and prompt."""

    seeds: tuple[Hashable, ...]
    prompts: tuple[Hashable, ...]
    total: Array  # [S, P]
    count: Array  # [P], clips per prompt and seed


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; without `low` and `high`, `why` says what the interval lacks."""

    value: float
    low: float | None
    high: float | None
    error: float  # standard error
    freedom: float  # Satterthwaite degrees of freedom of the error
    clips: int
    prompts: int
    seeds: int
    why: str = ""

    def p(self, margin: float = 0.0) -> float | None:
        """Two-sided p-value of a true value of `margin`: Student's t with the interval's own error; a sign test where all prompts are alike."""
        return p_value(self.value - margin, self.error, self.freedom, self.prompts) if self.low is not None else None


def sample(values: npt.ArrayLike, prompts: Sequence[Hashable], seeds: Sequence[Hashable] | None = None) -> Sample:
    """Group clip values: three sequences of length N; without `seeds` all clips are of one.

    Raises:
        ValueError: nothing, a value that is not finite, or seeds that did not make the same clips.
    """
    flat = np.asarray(values, dtype=np.float64)
    seeds = [0] * len(flat) if seeds is None else seeds
    if not len(flat) or not len(flat) == len(prompts) == len(seeds):
        raise ValueError(f"{len(flat)} values, {len(prompts)} prompts and {len(seeds)} seeds are no sample")
    if not np.isfinite(flat).all():
        raise ValueError("a value is not finite")
    seed_names, prompt_names = tuple(dict.fromkeys(seeds)), tuple(dict.fromkeys(prompts))
    row_of, column_of = ({name: i for i, name in enumerate(names)} for names in (seed_names, prompt_names))
    row, column = (np.fromiter(map(of.__getitem__, names), np.intp) for of, names in ((row_of, seeds), (column_of, prompts)))
    shape, place = (len(seed_names), len(prompt_names)), row * len(prompt_names) + column
    total, count = (np.asarray(np.bincount(place, each, shape[0] * shape[1]), np.float64).reshape(shape) for each in (flat, np.ones(len(flat))))
    if (count != count[0]).any():
        raise ValueError("the training seeds did not make the same number of clips for each prompt")
    return Sample(seed_names, prompt_names, total, count[0])


def mean(of: Sample) -> Interval:
    """Mean over clips, with an interval over prompts and training seeds."""
    return _interval(of, None)


def difference(better: Sample, than: Sample) -> Interval:
    """Mean of `better - than` over the same clips: paired by prompt, and by training seed where both have the same seeds.

    Raises:
        ValueError: the two are not over the same clips.
    """
    return _interval(better, paired(better, than))


def paired(one: Sample, other: Sample) -> Sample:
    """The other sample with its prompts, and its training seeds where both have the same, in the order of the first.

    Raises:
        ValueError: the two are not over the same clips.
    """
    if one.prompts != other.prompts:
        if set(one.prompts) != set(other.prompts):
            raise ValueError("a paired difference needs the same prompts on both sides")
        place = {name: i for i, name in enumerate(other.prompts)}
        order = [place[name] for name in one.prompts]
        other = Sample(other.seeds, one.prompts, other.total[:, order], other.count[order])
    if (one.count != other.count).any():
        raise ValueError("a paired difference needs the same number of clips of each prompt on both sides")
    if one.seeds != other.seeds and set(one.seeds) == set(other.seeds):
        other = Sample(one.seeds, other.prompts, other.total[[other.seeds.index(name) for name in one.seeds]], other.count)
    return other


@dataclass(frozen=True)
class Contrast:
    """mean(one) - mean(other), or mean(one), without an interval: what needs no bootstrap."""

    value: float
    error: float  # standard error; 0 if there is no spread at all
    freedom: float  # Satterthwaite degrees of freedom of the error
    tables: tuple[Array, ...]  # [S, P] each, whose means per clip add up to the value


def contrast(one: Sample, other: Sample | None) -> Contrast:
    """Value and unbiased standard error of a difference of two samples that are `paired`, or of one sample."""
    matched = other is not None and one.seeds == other.seeds
    count, prompts = one.count, len(one.prompts)
    # a difference of two contenders is one table of differences as far as prompts go, and for seeds where they match
    tables = (one.total - other.total,) if matched and other is not None else (one.total, *(() if other is None else (-other.total,)))
    value = float(sum(table.mean(0).sum() for table in tables) / count.sum())
    if prompts == 1:
        return Contrast(value, math.nan, 0.0, tables)
    by_prompt = sum((table.mean(0) for table in tables), np.zeros(prompts))
    parts = [(float(((by_prompt - value * count) / count.mean()).var(ddof=1)) / prompts, prompts - 1)]
    parts += [(float((table.sum(1) / count.sum()).var(ddof=1)) / len(table), len(table) - 1) for table in tables if len(table) > 1]
    error = math.sqrt(sum(variance for variance, _ in parts))
    if error <= 1e-12 * max(1.0, float(np.abs(by_prompt / count).max())):
        return Contrast(value, 0.0, prompts - 1, tables)
    return Contrast(value, error, error**4 / sum(variance**2 / free for variance, free in parts), tables)


def contrasts(samples: Sequence[Sample]) -> list[Contrast]:
    """`contrast` of every pair, first with second, first with third, ...; of one seed each many times as fast, without tables.

    Raises:
        ValueError: two are not over the same clips.
    """
    if not samples:
        return []
    first = samples[0]
    if any(len(one.seeds) > 1 or one.prompts != first.prompts or (one.count != first.count).any() for one in samples) or len(first.prompts) < 2:
        return [contrast(one, paired(one, other)) for one, other in itertools.combinations(samples, 2)]
    totals, count, free = np.concatenate([one.total for one in samples]), first.count, len(first.prompts) - 1
    found = []
    for place in range(len(samples) - 1):
        gaps = totals[place] - totals[place + 1 :]
        values = gaps.sum(1) / count.sum()
        errors = np.sqrt(((gaps - values[:, None] * count) / count.mean()).var(axis=1, ddof=1) / (free + 1))
        still = errors <= 1e-12 * np.maximum(1.0, np.abs(gaps / count).max(1))
        found += [Contrast(value, error, free, ()) for value, error in zip(values.tolist(), np.where(still, 0.0, errors).tolist(), strict=True)]
    return found


def _interval(one: Sample, other: Sample | None) -> Interval:
    """Interval of mean(one) - mean(other), or of mean(one)."""
    sides = [one] if other is None else [one, other]
    count, seeds, prompts = one.count, min(len(side.seeds) for side in sides), len(one.prompts)
    clips = int(count.sum()) * seeds
    found = contrast(one, other)
    value, error, freedom, tables = found.value, found.error, found.freedom, found.tables
    if prompts == 1:
        return Interval(value, None, None, math.nan, 0.0, clips, 1, seeds, "one prompt")
    if error == 0:
        return _alike(value, clips, prompts, seeds, paired=other is not None)
    # seeds that are not matched are drawn apart, and alike whichever side comes first
    streams = (
        [0] if len(tables) == 1 else [int(repr(side.seeds) > repr(rival.seeds)) for side, rival in ((sides[0], sides[-1]), (sides[-1], sides[0]))]
    )
    draws = sum(_draws(table, count, stream) for table, stream in zip(tables, streams, strict=True))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    stretch = student(freedom, LEVEL) * error / (student(math.inf, LEVEL) * float(np.std(draws)))
    return Interval(value, value + stretch * (float(low) - value), value + stretch * (float(high) - value), error, freedom, clips, prompts, seeds)


def _alike(value: float, clips: int, prompts: int, seeds: int, *, paired: bool) -> Interval:
    """No spread at all: the bootstrap is mute, but enough prompts with one and the same difference decide its sign."""
    if paired and prompts >= FEWEST_ALIKE:
        return Interval(value, value, value, 0.0, prompts - 1, clips, prompts, seeds, "the same difference on every prompt")
    return Interval(value, None, None, 0.0, prompts - 1, clips, prompts, seeds, "the same on every prompt")


def _draws(table: Array, count: Array, stream: int) -> Array:
    """Bootstrap resamples of a table's mean per clip: [S, P], [P] -> [R]. Prompts are drawn alike for every `stream`, seeds are not."""
    seeds, prompts = table.shape
    drawn = _weights(prompts, 0)
    total = drawn @ table.mean(0) if seeds == 1 else ((_weights(seeds, 1 + stream) @ table) * drawn).sum(1) / seeds
    clips = count.sum() if (count == count[0]).all() else drawn @ count  # as many of each prompt: as many in each resample
    return np.asarray(total / clips)


@functools.lru_cache(maxsize=64)
def _weights(units: int, stream: int) -> Array:
    """How often each of `units` is drawn in each resample: [R, units]."""
    rng = np.random.default_rng([stream, units])
    return rng.multinomial(units, np.full(units, 1 / units), size=RESAMPLES).astype(np.float64)


@functools.lru_cache(maxsize=4096)
def student(freedom: float, level: float) -> float:
    """The t that a Student variable of `freedom` >= 1 degrees (inf: normal) stays within, either side, at probability `level`.

    With t = sqrt(freedom) tan(angle), the density over the angle is proportional to cos(angle)**(freedom - 1).
    """
    if freedom > 1e6:
        freedom = 1e6
    widest = min(math.pi / 2, 12 / math.sqrt(freedom))
    angle = np.linspace(0, widest, 20_001)
    middle = (angle[1:] + angle[:-1]) / 2
    within = np.concatenate([[0.0], np.cumsum(np.cos(middle) ** (freedom - 1))])
    return float(math.sqrt(freedom) * math.tan(np.interp(level, within / within[-1], angle)))


def beyond(t: float, freedom: float) -> float:
    """The probability that a Student variable of `freedom` >= 1 degrees lies farther from zero than t, either side."""
    freedom = min(freedom, 1e6)
    begin = math.atan(abs(t) / math.sqrt(freedom))
    half = (min(math.pi / 2, begin + 12 / math.sqrt(freedom)) - begin) / 2
    points, weights = _nodes()
    mass = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))  # of cos**(freedom - 1) up to pi / 2
    return min(1.0, half * float(weights @ np.cos(begin + half * (points + 1)) ** (freedom - 1)) / mass)


@functools.cache
def _nodes() -> tuple[Array, Array]:
    """Points and weights of Gauss and Legendre between -1 and 1."""
    return np.polynomial.legendre.leggauss(200)


def p_value(value: float, error: float, freedom: float, prompts: int) -> float:
    """Two-sided p-value of no difference; without any spread that of as many prompts on one side."""
    if error > 0:
        return beyond(value / error, freedom)
    return min(1.0, 2.0 ** (1 - prompts)) if value else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number, so that all that stay below a level are wrong together no more often than it says.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def ranks(samples: Sequence[Sample], *, higher_is_better: bool) -> list[tuple[int, int]]:
    """The best and the worst rank that each sample may have: 1 + those that are better for sure to n - those that are worse for sure.

    For sure: their paired difference is not zero at 95 %, corrected by `holm` for all pairs, so that all rank intervals together
    hold the true ranks at least that often.

    Source: Mogstad, Romano, Shaikh and Wilhelm, Inference for ranks, Review of Economic Studies 91 (2024), in the form for all ranks.

    Raises:
        ValueError: two are not over the same clips.
    """
    pairs = list(itertools.combinations(range(len(samples)), 2))
    found = contrasts(samples)
    enough = [p_value(each.value, each.error, each.freedom, len(samples[i].prompts)) for each, (i, _) in zip(found, pairs, strict=True)]
    adjusted = holm([p if math.isfinite(p) else 1.0 for p in enough])
    better = [0] * len(samples)  # how many are better than this one for sure
    worse = [0] * len(samples)
    for (i, j), each, p in zip(pairs, found, adjusted, strict=True):
        if p <= 1 - LEVEL:
            winner, loser = (i, j) if (each.value > 0) == higher_is_better else (j, i)
            better[loser] += 1
            worse[winner] += 1
    return [(1 + above, len(samples) - below) for above, below in zip(better, worse, strict=True)]


@dataclass(frozen=True)
class Ratio:
    """The typical ratio of two paired timings and its 95 % interval; without `low` and `high`, `why` says what the interval lacks."""

    value: float
    low: float | None
    high: float | None
    rounds: int
    processes: int
    why: str = ""
    draws: tuple[tuple[float, ...], ...] = ()  # what the median is of: those of all processes, or of each

    def p(self, margin: float = 1.0) -> float | None:
        """Two-sided p-value of a true median of `margin`: a sign test, of several processes the one that says least."""
        if self.low is None:
            return None
        return max(sign_test([value - margin for value in own]) for own in self.draws)


def sign_test(values: Sequence[float]) -> float:
    """Two-sided p-value of a median of zero; values of zero say nothing."""
    above, below = sum(value > 0 for value in values), sum(value < 0 for value in values)
    fewer = sum(math.comb(above + below, k) for k in range(min(above, below) + 1))
    return min(1.0, 2 * fewer / 2 ** (above + below))


def ratio(better: Sequence[Sequence[float]], than: Sequence[Sequence[float]]) -> Ratio:
    """The median of `better / than` over rounds in which both were timed; one sequence per process, in the same order of rounds.

    Rounds of one process are alike in more than the two contenders (where memory lies, which core it got), so with enough
    processes the interval is that of their medians. With fewer it reaches over the intervals of all processes: what it says
    holds in each of them, but nothing is known of another start.

    Raises:
        ValueError: the two do not have the same rounds, or a value is not positive.
    """
    if not better or [len(own) for own in better] != [len(own) for own in than] or not all(better):
        raise ValueError("a ratio needs rounds in which both were timed")
    if not all(0 < value < math.inf for own in (*better, *than) for value in own):
        raise ValueError("a ratio needs positive values")
    ratios = [[a / b for a, b in zip(own, other, strict=True)] for own, other in zip(better, than, strict=True)]
    medians = [float(np.median(own)) for own in ratios]
    value, rounds = float(np.median(medians)), sum(map(len, ratios))
    over_processes = order_interval(medians)
    intervals = [over_processes] if over_processes else [order_interval(own) for own in ratios]
    ends = [end for interval in intervals if interval for end in interval]
    if len(ends) < 2 * len(intervals):
        fewest = min(map(len, ratios))
        return Ratio(value, None, None, rounds, len(ratios), f"{fewest} round{'s' * (fewest > 1)} in a process, the least is {FEWEST_ALIKE}")
    draws = [tuple(medians)] if over_processes else [tuple(own) for own in ratios]
    return Ratio(value, min(ends), max(ends), rounds, len(ratios), draws=tuple(draws))


def order_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The shortest interval between two values, equally far from either end, that holds the median with at least 95 %.

    It assumes nothing of the distribution: the median lies below the k-th smallest of n values exactly when fewer than k of
    n fair coins fall heads. None for fewer than 6 values, whose whole range does not hold it often enough.
    """
    n = len(values)
    tails = [ways / 2**n for ways in itertools.accumulate(math.comb(n, heads) for heads in range(n))]  # P(at most so many heads)
    outside = sum(2 * tail <= 1 - LEVEL for tail in tails)  # the k that is meant
    inner = sorted(values)[outside - 1 : n - outside + 1] if outside else []
    return (inner[0], inner[-1]) if inner else None


def detectable(of: Interval) -> float | None:
    """The smallest true difference that a repetition with as much noise would tell from none with a probability of 80 %."""
    if of.low is None or of.error == 0:
        return None
    return (student(of.freedom, LEVEL) + student(of.freedom, 2 * POWER - 1)) * of.error


def verdict(low: float | None, high: float | None, margin: float = 0.0) -> str:
    """What an interval of a difference, positive where the claim says it is, makes of "more than `margin`".

    Without an interval nothing is decided. An interval that lies below the margin contradicts the claim even where the
    difference is positive: it is smaller than was claimed.
    """
    if low is None or high is None:
        return INCONCLUSIVE
    if not low <= high:
        raise ValueError(f"[{low}, {high}] is not an interval")
    if low > margin:
        return REPRODUCED
    return CONTRADICTED if high < margin else INCONCLUSIVE
