"""Lines through the chunks of a stream against SciPy's, and how often their intervals hold the truth."""

from __future__ import annotations

import dataclasses
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rfbench import length
from rfbench.length import BLOCKS, trend
from tests.test_timing import steady, turn


@given(st.floats(-3, 3), st.floats(0.1, 9), st.integers(4, 700))
def test_a_straight_line_is_found_exactly(slope, start, count):
    found = trend([start + slope * index for index in range(count)])
    assert found.chunks == count and found.why == ""
    assert (found.more, found.low, found.high) == pytest.approx((100 * slope,) * 3, abs=1e-7)
    size = -(-count // BLOCKS)
    first = count % size
    assert found.level == pytest.approx(start + slope * (first + count - 1) / 2, abs=1e-7)


@given(st.integers(0, 2**32 - 1))
def test_the_line_is_scipys_through_the_medians_of_blocks(seed):
    values = list(np.random.default_rng(seed).normal(size=BLOCKS * 3))
    heights = [median(values[place : place + 3]) for place in range(0, len(values), 3)]
    wanted = stats.linregress(range(BLOCKS), heights)
    found = trend(values)
    assert found.more == pytest.approx(wanted.slope * 100 / 3, abs=1e-9)
    half = stats.t.ppf(0.975, BLOCKS - 2) * wanted.stderr * 100 / 3
    assert found.low == pytest.approx(wanted.slope * 100 / 3 - half, abs=1e-6)
    assert found.high == pytest.approx(wanted.slope * 100 / 3 + half, abs=1e-6)


def test_a_disturbance_is_no_trend():
    calm = [0.5] * 700
    disturbed = [9.0 if 600 <= index < 610 else seconds for index, seconds in enumerate(calm)]
    assert trend(disturbed) == trend(calm)
    assert (trend(calm).more, trend(calm).low, trend(calm).high) == (0, 0, 0)


@pytest.mark.parametrize("memory", [0.0, 0.7])
def test_intervals_hold_the_truth_as_often_as_they_say(memory):
    """Chunks that take independent times, and such that resemble the chunk before."""
    rng, count, held = np.random.default_rng(0), 700, 0
    for _ in range(300):
        noise = rng.normal(size=count)
        for index in range(1, count):
            noise[index] += memory * noise[index - 1]
        found = trend(list(5 + 0.002 * np.arange(count) + noise))
        assert found.low is not None and found.high is not None
        held += found.low <= 0.2 <= found.high
    assert 0.90 <= held / 300 <= 0.99


def test_few_chunks_have_no_interval():
    assert trend([1.0, 2.0, 3.0]) == length.Trend(3, 2.0, 100.0, None, None, "3 chunks, the least is 4")
    with pytest.raises(ValueError, match="no line through 1 chunks"):
        trend([1.0])


def test_time_and_memory_of_streams_are_told_apart():
    """Time from chunk to chunk, of which the first ones do not count; a round that was disturbed loses against the other two."""
    even = tuple(dataclasses.replace(chunk, held_bytes=1000 + 10 * chunk.index) for chunk in steady(33))
    late = tuple(dataclasses.replace(chunk, readable=chunk.readable * 3) for chunk in even)
    found = length.trends([turn(even), turn(late), turn(even)])
    assert (found["seconds"].chunks, found["bytes"].chunks) == (29, 29)
    assert found["seconds"].level == pytest.approx(0.55) and found["seconds"].more == pytest.approx(0, abs=1e-9)
    assert found["bytes"].more == pytest.approx(1000) and found["bytes"].low == pytest.approx(1000)
    slower = length.trends([turn(steady(33, slower=0.1))])
    assert set(slower) == {"seconds"} and slower["seconds"].more == pytest.approx(100 * 0.1 * 0.45, rel=0.2)
    assert length.trends([turn()]) == {} == length.trends([turn(steady(4))])
