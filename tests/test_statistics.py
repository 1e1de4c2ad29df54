"""Intervals against closed forms, scipy and simulation; verdicts against their definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from rfbench import statistics
from rfbench.statistics import CONTRADICTED, INCONCLUSIVE, LEVEL, REPRODUCED, Interval, detectable, difference, mean, sample, student, verdict


def grid(y_SPN: statistics.Array, *, backwards: bool = False) -> statistics.Sample:
    """A Sample from values by seed, prompt and clip, listed in this order or from the end."""
    listed = list(np.ndenumerate(y_SPN))[:: -1 if backwards else 1]
    return sample([value for _, value in listed], [place[1] for place, _ in listed], [place[0] for place, _ in listed])


def ends(found: Interval) -> tuple[float, float]:
    """Both ends of an interval that has to be there."""
    assert found.low is not None and found.high is not None, found.why
    return found.low, found.high


def width(found: Interval) -> float:
    return ends(found)[1] - ends(found)[0]


@pytest.mark.parametrize("freedom", [1, 1.3, 2, 3.5, 10, 57.5, 1e4])
@pytest.mark.parametrize("level", [0.5, 0.6, 0.95, 0.99])
def test_student_is_the_quantile_that_scipy_knows(freedom: float, level: float) -> None:
    assert student(freedom, level) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-4)


def test_student_of_infinite_freedom_is_normal() -> None:
    assert student(math.inf, 0.95) == pytest.approx(stats.norm.ppf(0.975), rel=1e-4)


def test_interval_of_many_prompts_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(3).exponential(size=400)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0)).confidence_interval
    ours = mean(sample(values, range(400)))
    assert ours.value == pytest.approx(values.mean())
    assert ends(ours) == pytest.approx((theirs.low, theirs.high), abs=0.04 * (theirs.high - theirs.low))


def test_interval_of_few_prompts_is_students() -> None:
    values = np.random.default_rng(5).normal(size=8)
    values = np.concatenate([values, -values])  # symmetric, so that the bootstrap is as well
    expected = stats.t.interval(0.95, 15, loc=values.mean(), scale=stats.sem(values))
    ours = mean(sample(values, range(16)))
    assert ours.error == pytest.approx(stats.sem(values))
    assert ours.freedom == pytest.approx(15)
    assert ends(ours) == pytest.approx(expected, abs=0.06 * (expected[1] - expected[0]))


def test_clips_of_one_prompt_are_one_piece_of_evidence() -> None:
    values = np.random.default_rng(1).normal(size=12)
    once = mean(sample(values, range(12)))
    repeated = mean(sample(np.repeat(values, 5), np.repeat(np.arange(12), 5).tolist()))
    assert ends(repeated) == pytest.approx(ends(once))
    assert (repeated.clips, repeated.prompts) == (60, 12)


def test_unequal_numbers_of_clips_weigh_clips_and_match_the_ratio_estimator() -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 5, size=200)
    prompts = np.repeat(np.arange(200), counts)
    values = rng.normal(size=len(prompts)) + rng.normal(size=200)[prompts]
    ours = mean(sample(values, prompts.tolist()))
    draws = rng.integers(0, 200, size=(4000, 200))
    totals = np.bincount(prompts, weights=values)
    brute = totals[draws].sum(1) / counts[draws].sum(1)
    assert ours.value == pytest.approx(values.mean())
    assert ours.error == pytest.approx(brute.std(), rel=0.05)
    assert ends(ours) == pytest.approx(np.quantile(brute, [0.025, 0.975]), abs=0.1 * brute.std())


def test_seeds_that_disagree_widen_the_interval_and_agreeing_ones_do_not() -> None:
    y_p = np.random.default_rng(4).normal(size=(1, 20, 1))
    agree = mean(grid(np.concatenate([y_p, y_p])))
    alone = mean(grid(y_p))
    apart = mean(grid(np.concatenate([y_p - 1, y_p + 1])))
    assert width(agree) == pytest.approx(width(alone), rel=0.02)
    assert width(apart) > 10  # t of one degree of freedom times a standard error of 1, nearly
    assert apart.freedom == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("seeds", "prompts", "seed_sd", "least"),
    [(1, 6, 0.0, 0.90), (1, 12, 0.0, 0.92), (1, 30, 0.0, 0.92), (2, 12, 0.3, 0.92), (2, 12, 1.0, 0.84), (3, 24, 1.0, 0.88)],
)
def test_intervals_cover_the_truth_as_often_as_they_say(seeds: int, prompts: int, seed_sd: float, least: float) -> None:
    rng = np.random.default_rng(11)
    tables, covered, plain = 400, 0, 0
    for _ in range(tables):
        y = rng.normal(size=(1, prompts)) + seed_sd * rng.normal(size=(seeds, 1)) + 0.5 * rng.normal(size=(seeds, prompts))
        found = mean(grid(y[..., None]))
        covered += ends(found)[0] <= 0 <= ends(found)[1]
        draws = statistics._draws(y, np.ones(prompts), 0)
        low, high = np.quantile(draws, [0.025, 0.975])
        plain += low <= 0 <= high
    assert least <= covered / tables <= 0.99
    assert covered >= plain  # what the stretching is for


def test_difference_is_paired() -> None:
    rng = np.random.default_rng(7)
    hard = rng.normal(size=(1, 24, 2)) * 10  # prompts differ far more than contenders
    one, other = hard + 1 + 0.1 * rng.normal(size=(1, 24, 2)), hard + 0.1 * rng.normal(size=(1, 24, 2))
    found = difference(grid(one), grid(other))
    by_prompt = (one - other).mean(axis=(0, 2))
    assert found.value == pytest.approx((one - other).mean())
    assert found.error == pytest.approx(stats.sem(by_prompt))
    assert 0.9 < ends(found)[0] < 1 < ends(found)[1] < 1.1
    assert ends(mean(grid(one)))[0] < ends(mean(grid(other)))[1]  # unpaired, nobody could tell them apart


def test_difference_is_antisymmetric_whatever_the_order_of_prompts_and_seeds() -> None:
    rng = np.random.default_rng(8)
    y, z = rng.normal(size=(2, 10, 2)), rng.normal(size=(2, 10, 2))
    forward = difference(grid(y), grid(z))
    shuffled = grid(z, backwards=True)
    assert difference(grid(y), shuffled).value == pytest.approx(forward.value)
    assert difference(grid(y), shuffled).error == pytest.approx(forward.error)
    back = difference(grid(z), grid(y))
    assert (back.value, *ends(back)) == pytest.approx((-forward.value, -ends(forward)[1], -ends(forward)[0]))


def test_difference_of_a_trained_and_an_untrained_contender_counts_the_seeds_of_the_trained_one() -> None:
    rng = np.random.default_rng(9)
    trained, fixed = rng.normal(size=(3, 15, 1)) + rng.normal(size=(3, 1, 1)), rng.normal(size=(1, 15, 1))
    found = difference(grid(trained), grid(fixed))
    by_prompt, by_seed = trained.mean(axis=(0, 2)) - fixed.mean(axis=(0, 2)), trained.mean(axis=(1, 2))
    assert found.value == pytest.approx(by_prompt.mean())
    assert found.error**2 == pytest.approx(by_prompt.var(ddof=1) / 15 + by_seed.var(ddof=1) / 3)


def test_difference_of_unequal_numbers_of_seeds_takes_both_seed_variances() -> None:
    rng = np.random.default_rng(10)
    y, z = rng.normal(size=(3, 12, 1)), rng.normal(size=(2, 12, 1))
    found = difference(grid(y), grid(z))
    parts = (y.mean((0, 2)) - z.mean((0, 2))).var(ddof=1) / 12, y.mean((1, 2)).var(ddof=1) / 3, z.mean((1, 2)).var(ddof=1) / 2
    assert found.error**2 == pytest.approx(sum(parts))
    assert found.seeds == 2


def test_one_prompt_has_no_interval_and_says_so() -> None:
    found = mean(sample([1.0, 2.0], [0, 0]))
    assert (found.value, found.low, found.high, found.why) == (1.5, None, None, "one prompt")
    assert detectable(found) is None
    assert verdict(found.low, found.high) == INCONCLUSIVE


def test_no_spread_is_no_certainty_for_a_mean() -> None:
    found = mean(sample([1.0] * 30, range(30)))
    assert (found.value, found.low) == (1.0, None)
    assert "every prompt" in found.why


@pytest.mark.parametrize(("prompts", "expected"), [(5, INCONCLUSIVE), (6, REPRODUCED)])
def test_the_same_difference_everywhere_decides_from_six_prompts_on(prompts: int, expected: str) -> None:
    found = difference(sample([1.0] * prompts, range(prompts)), sample([0.0] * prompts, range(prompts)))
    assert verdict(found.low, found.high) == expected
    assert (stats.binomtest(prompts, prompts).pvalue < 1 - LEVEL) == (expected == REPRODUCED)


def test_identical_contenders_are_never_told_apart() -> None:
    values = np.random.default_rng(0).normal(size=20)
    found = difference(sample(values, range(20)), sample(values, range(20)))
    assert verdict(found.low, found.high) == INCONCLUSIVE


@pytest.mark.parametrize(
    ("values", "prompts", "seeds"),
    [([], [], None), ([1.0, math.nan], [0, 1], None), ([1.0, math.inf], [0, 1], None), ([1.0], [0, 1], None), ([1.0, 2, 3], [0, 1, 0], [0, 0, 1])],
)
def test_what_is_missing_or_not_finite_is_refused(values: list[float], prompts: list[int], seeds: list[int] | None) -> None:
    with pytest.raises(ValueError):
        sample(values, prompts, seeds)


@pytest.mark.parametrize("other", [[0, 1, 3], [0, 1, 2, 2]])
def test_a_difference_over_other_clips_is_refused(other: list[int]) -> None:
    with pytest.raises(ValueError):
        difference(sample([1.0, 2.0, 3.0], [0, 1, 2]), sample([1.0] * len(other), other))


def test_a_difference_of_the_detectable_size_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(12)
    size = detectable(Interval(0, -1, 1, 1 / math.sqrt(25), 24, 25, 25, 1))
    assert size is not None
    found = [ends(mean(sample(rng.normal(loc=size, size=25), range(25))))[0] > 0 for _ in range(400)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_verdict_is_its_definition(low: float, width: float, margin: float) -> None:
    high = low + width
    expected = REPRODUCED if low > margin else CONTRADICTED if high < margin else INCONCLUSIVE
    assert verdict(low, high, margin) == expected


def test_verdict_refuses_what_is_no_interval() -> None:
    with pytest.raises(ValueError):
        verdict(math.nan, math.nan)
    with pytest.raises(ValueError):
        verdict(2.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda s: st.integers(2, 7).flatmap(
            lambda p: st.lists(st.floats(-1e3, 1e3), min_size=s * p, max_size=s * p).map(lambda v: np.reshape(v, (s, p, 1)))
        )
    ),
    st.floats(0.1, 10),
    st.floats(-100, 100),
)
def test_interval_holds_its_estimate_and_moves_with_units(y: statistics.Array, scale: float, shift: float) -> None:
    found, moved = mean(grid(y)), mean(grid(y * scale + shift))
    assert moved.value == pytest.approx(found.value * scale + shift, rel=1e-6, abs=1e-6)
    if found.error > 1e-6:
        low, high = ends(found)
        assert low <= found.value <= high
        assert ends(moved) == pytest.approx((low * scale + shift, high * scale + shift), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("n", range(1, 15))
def test_order_interval_holds_the_median_in_95_of_100_cases_and_no_shorter_one_does(n: int) -> None:
    """Every one of the 2^n ways in which n values can lie below and above the median, counted."""
    below = np.bitwise_count(np.arange(2**n))  # how many values lie below it

    def coverage(k: int) -> float:
        """Of the interval from the k-th smallest to the k-th largest."""
        return float(((below >= k) & (below <= n - k)).mean())

    found = statistics.order_interval([float(10 * i) for i in range(1, n + 1)][::-1])
    enough = [k for k in range(1, n // 2 + 1) if coverage(k) >= LEVEL]
    assert found == ((10.0 * max(enough), 10.0 * (n + 1 - max(enough))) if enough else None)
    assert (found is None) == (n < statistics.FEWEST_ALIKE)


def test_order_interval_of_many_values_is_the_binomial_one() -> None:
    for n in (100, 1500):
        k = int(stats.binom.ppf((1 - LEVEL) / 2, n, 0.5))  # the least k with P(below <= k) above 2.5 %
        assert statistics.order_interval(list(range(1, n + 1))) == (k, n + 1 - k)


positive = st.floats(0.01, 100)


@given(st.lists(positive, min_size=6, max_size=12), st.floats(0.1, 10))
def test_a_ratio_does_not_see_what_happens_to_both(drift: list[float], factor: float) -> None:
    """The machine may do in each round what it likes: what is the same factor in all rounds is found exactly."""
    found = statistics.ratio([[factor * value for value in drift]], [drift])
    assert (found.value, found.low, found.high) == pytest.approx((factor,) * 3)
    assert (found.rounds, found.processes) == (len(drift), 1)


def test_one_disturbed_round_of_nine_decides_nothing() -> None:
    fast, slow = [1.1 + 0.001 * i for i in range(9)], [1.0] * 9
    fast[4] = 0.2
    found = statistics.ratio([fast], [slow])
    assert found.low is not None and found.low == pytest.approx(1.1)
    assert statistics.ratio([fast[:8]], [slow[:8]]).low == pytest.approx(0.2)  # but one of eight does


def test_few_processes_have_to_agree_and_many_speak_for_themselves() -> None:
    one = [[1.0] * 6]
    few = statistics.ratio([[1.1, 1.2, 1.3, 1.4, 1.5, 1.6], [0.9, 1.1, 1.2, 1.3, 1.4, 1.5]], one * 2)
    assert [few.low, few.high, few.processes] == pytest.approx([0.9, 1.6, 2])
    assert few.value == pytest.approx((1.35 + 1.25) / 2)
    many = statistics.ratio([[1.1 + 0.1 * i, 5.0, 0.1] for i in range(6)], [[1.0] * 3] * 6)
    assert [many.low, many.high, many.rounds, many.processes] == pytest.approx([1.1, 1.6, 18, 6])


def test_a_ratio_without_an_interval_says_why_and_one_that_is_none_is_refused() -> None:
    found = statistics.ratio([[2.0, 4.0]], [[1.0, 2.0]])
    assert (found.value, found.low, found.high) == (2.0, None, None)
    assert found.why == "2 rounds in a process, the least is 6"
    for better, than in (([], []), ([[1.0]], [[1.0, 2.0]]), ([[]], [[]])):
        with pytest.raises(ValueError, match="rounds in which both were timed"):
            statistics.ratio(better, than)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive values"):
            statistics.ratio([[1.0]], [[value]])


@pytest.mark.parametrize("freedom", [1, 1.3, 2, 5.5, 23, 945, 1e5])
@pytest.mark.parametrize("t", [0.0, 0.3, -1.96, 4.0, 9.0])
def test_tail_of_student_is_scipys(t: float, freedom: float) -> None:
    assert statistics.beyond(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-3)


def test_p_value_of_paired_clips_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(4)
    one, other = rng.normal(size=(2, 40)) + np.array([[0.4], [0.0]])
    theirs = stats.ttest_rel(one, other)
    ours = difference(sample(one, range(40)), sample(other, range(40)))
    assert ours.p() == pytest.approx(theirs.pvalue, rel=1e-3)
    assert ours.p(0.2) == pytest.approx(stats.ttest_rel(one - 0.2, other).pvalue, rel=1e-3)
    alike = difference(sample(one + 1, range(40)), sample(one, range(40)))
    assert alike.p() == pytest.approx(stats.binomtest(40, 40).pvalue)


def test_sign_test_is_scipys() -> None:
    rng = np.random.default_rng(8)
    for size in (6, 9, 30):
        values = rng.normal(0.3, size=size)
        assert statistics.sign_test(values.tolist()) == pytest.approx(stats.binomtest(int((values > 0).sum()), size).pvalue)
    assert statistics.sign_test([0.0, 1.0, 1.0]) == pytest.approx(stats.binomtest(2, 2).pvalue)
    found = statistics.ratio([[1.1 + 0.01 * k for k in range(9)]], [[1.0] * 9])
    assert found.p() == pytest.approx(stats.binomtest(9, 9).pvalue)
    assert found.p(1.14) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_that_of_statsmodels_and_of_its_definition(p_values: list[float]) -> None:
    adjusted = statistics.holm(p_values)
    for level in (0.01, 0.05, 0.2):
        kept, order = set(), sorted(range(len(p_values)), key=p_values.__getitem__)
        for rank, place in enumerate(order):  # step down until one is not small enough
            if p_values[place] * (len(p_values) - rank) > level:
                break
            kept.add(place)
        assert {place for place, p in enumerate(adjusted) if p <= level} == kept
    assert adjusted == pytest.approx(multipletests(p_values, method="holm")[1])


def test_rank_intervals_hold_all_true_ranks_as_often_as_they_say() -> None:
    """Ten systems in steps of a tenth of the noise per prompt, and in steps that cannot be missed."""
    rng = np.random.default_rng(12)
    for step, certain in ((0.1, False), (5.0, True)):
        missed = 0
        for _ in range(40):
            prompts = rng.normal(size=30)
            systems = [sample(prompts + rng.normal(size=30) * 0.5 - step * k, range(30)) for k in range(10)]
            found = statistics.ranks(systems, higher_is_better=True)
            missed += any(not low <= rank <= high for rank, (low, high) in enumerate(found, start=1))
            if certain:
                assert found == [(rank, rank) for rank in range(1, 11)]
                assert statistics.ranks(systems, higher_is_better=False) == found[::-1]
        assert missed <= 6  # of 40: more than that has a probability of 1 % where 5 % are allowed
    alike = sample([1.0, 2.0, 3.0], range(3))
    assert statistics.ranks([alike, alike, alike], higher_is_better=True) == [(1, 3)] * 3
    assert statistics.ranks([alike], higher_is_better=True) == [(1, 1)]
    assert statistics.ranks([], higher_is_better=True) == []


@pytest.mark.parametrize("kind", ["plain", "unequal", "seeds", "alike"])
def test_all_pairs_at_once_are_the_pairs_one_by_one(kind: str) -> None:
    rng, prompts = np.random.default_rng(4), [0, 0, 1, 1, 2, 3, 3, 4] if kind == "unequal" else [0, 0, 1, 1, 2, 2, 3, 3]
    rows = rng.normal(size=(5, 2, 8))
    if kind == "alike":
        rows[1], rows[2] = rows[0], rows[0] + 3
    several = 2 if kind == "seeds" else 1
    samples = [sample(row[:several].ravel(), prompts * several, sorted([*range(several)] * 8)) for row in rows]
    pairs = list(itertools.combinations(samples, 2))
    for got, (one, other) in zip(statistics.contrasts(samples), pairs, strict=True):
        wanted = statistics.contrast(one, statistics.paired(one, other))
        assert (got.value, got.error, got.freedom) == pytest.approx((wanted.value, wanted.error, wanted.freedom))
        assert (got.error == 0) == (wanted.error == 0)


def test_detectable_difference_is_that_of_the_power_of_statsmodels() -> None:
    for n in (8, 30, 200):
        of = difference(sample(np.random.default_rng(n).normal(size=n), range(n)), sample(np.zeros(n), range(n)))
        exact = TTestPower().solve_power(nobs=n, power=0.8, alpha=0.05) * of.error * math.sqrt(n)
        assert detectable(of) == pytest.approx(exact, rel=0.04)


def test_detectable_difference_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(2)
    of = difference(sample(rng.normal(size=60), range(60)), sample(rng.normal(size=60), range(60)))
    size = detectable(of)
    assert size is not None
    found = [statistics.beyond((size + of.error * stats.t.rvs(59, random_state=rng)) / of.error, 59) <= 0.05 for _ in range(2000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)
