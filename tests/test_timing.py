"""Every metric against a second computation from the raw times that looks at single frames and sorts by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfbench import timing
from rfbench.timing import Chunk, Key, Round, Turn


def steady(chunks: int, *, steps: float = 0.4, decode: float = 0.05, context: float = 0.1, slower: float = 0.0) -> tuple[Chunk, ...]:
    """A stream whose every chunk takes the same time, or `slower` longer than the one before."""
    rows, now = [], 0.0
    for index in range(chunks):
        begin, factor = now, 1 + slower * index
        denoised = begin + steps * factor
        readable = denoised + decode
        now = readable + context * factor
        rows.append(Chunk(index, 9 if index == 0 else 12, begin, denoised, readable, now))
    return tuple(rows)


def turn(stream: tuple[Chunk, ...] = (), *, name: str = "a", **more: object) -> Turn:
    clip = tuple(dataclasses.replace(chunk, cached=None if chunk.index == 6 else chunk.cached) for chunk in steady(7))
    return dataclasses.replace(Turn(name, 16, clip, stream, None, 1000, None, None, None), **more)  # type: ignore[arg-type]


def measured(one: Turn) -> dict[str, float]:
    found = {name: definition.of(one) for name, definition in timing.TIMINGS.items()}
    return {name: value for name, value in found.items() if value is not None}


sixteenths = st.integers(1, 60).map(lambda count: count / 16)  # so that sums of floats are exact


@st.composite
def streams(draw: st.DrawFn, least: int = 5) -> tuple[Chunk, ...]:
    rows, now = [], 0.0
    for index in range(draw(st.integers(least, 14))):
        begin = now
        denoised = begin + draw(sixteenths)
        readable = denoised + draw(sixteenths)
        now = readable + draw(sixteenths)
        rows.append(Chunk(index, 9 if index == 0 else 12, begin, denoised, readable, now))
    return tuple(rows)


@given(streams(8), streams(), st.sampled_from([4, 16]), st.integers(3, 6))
def test_every_metric_is_what_a_plain_reading_of_its_definition_gives(stream, clip, fps, first):
    """Frame by frame and by sorted lists; nothing of rfbench.timing but the raw rows goes in."""
    clip = (*clip[:-1], dataclasses.replace(clip[-1], cached=None))
    switched = Chunk(len(stream), 12, stream[-1].readable, stream[-1].readable + 2, stream[-1].readable + 2.25, None)
    one = turn(stream, clip=clip, fps=fps, switched=switched, reserved_bytes=7, device_bytes=8, cold_start_s=3.5, warm_up_s=5.5, joules=30.0)
    one = dataclasses.replace(one, steady=first)
    counted = [chunk for chunk in stream if chunk.index not in range(first)]
    bare = sorted(chunk.denoised - chunk.begin for chunk in counted)
    whole = [(chunk.denoised - chunk.begin) + (chunk.cached - chunk.readable) for chunk in counted]
    gaps = sorted(counted[i + 1].readable - counted[i].readable for i in range(len(counted) - 1))

    def middle(numbers: list[float]) -> float:
        ordered = sorted(numbers)
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    def smallest_that_covers(share: float) -> float:
        return next(gap for i, gap in enumerate(gaps, start=1) if i / len(gaps) >= share - 1e-12)

    third = len(counted) // 3 or 1
    wanted = {
        "dit_fps": 12 / middle(whole),
        "dit_fps_no_context": 12 / middle(bare),
        "e2e_fps": 12 * len(counted) / (stream[-1].readable - stream[first - 1].readable),
        "clip_fps": 81 / clip[-1].readable,
        "ttff_s": clip[0].readable,
        "ttff_cached_s": stream[0].readable,
        "switch_s": 2.25,
        "cold_start_s": 3.5,
        "warm_up_s": 5.5,
        "joules_per_frame": 30 / (9 + 12 * len(stream)),
        "rtf": 12 * len(counted) / fps / (stream[-1].readable - stream[first - 1].readable),
        "jitter_p50_s": smallest_that_covers(0.5),
        "jitter_p95_s": smallest_that_covers(0.95),
        "jitter_max_s": gaps[-1],
        "slowdown": middle(whole[len(whole) - third :]) / middle(whole[:third]),
        "peak_memory_bytes": 1000,
        "reserved_memory_bytes": 7,
        "device_memory_bytes": 8,
    }
    arrivals = [(chunk.readable, chunk.index) for chunk in stream for _ in range(chunk.frames)]
    for buffer in (0, 1, 2):
        start = stream[buffer].readable
        in_time = sum(arrival <= start + number / fps for number, (arrival, _) in enumerate(arrivals))
        shown = start
        stalls: dict[int, float] = {}
        for arrival, index in arrivals:
            if arrival > shown:
                stalls[index] = stalls.get(index, 0.0) + arrival - shown
            shown = max(shown, arrival) + 1 / fps
        wanted |= {f"deadline_{buffer}": 100 * in_time / len(arrivals), f"underruns_{buffer}": len(stalls), f"stall_{buffer}_s": sum(stalls.values())}
    assert measured(one) == pytest.approx(wanted)


@given(st.integers(1, 8), st.integers(1, 40))
def test_chunks_count_from_that_on_before_which_the_window_is_full(chunk, window):
    """By counting: from the first counted chunk on, each looks back at as many frames as any later one, and the one before may have seen fewer."""
    first = timing.full(chunk, window)
    seen = [min(chunk * (index + 1), window) for index in range(80)]
    assert len(set(seen[first:])) == 1 and first >= timing.STEADY
    assert first == timing.STEADY or chunk * first >= window > chunk * (first - 1)
    assert timing.full(chunk, None) == timing.STEADY


def test_a_stream_of_known_speed():
    found = measured(turn(steady(20)))
    assert found["dit_fps"] == pytest.approx(12 / 0.5)
    assert found["dit_fps_no_context"] == pytest.approx(12 / 0.4)
    assert found["e2e_fps"] == pytest.approx(12 / 0.55)
    assert found["rtf"] == pytest.approx(12 / 0.55 / 16)
    assert found["clip_fps"] == pytest.approx(81 / (7 * 0.45 + 6 * 0.1))
    assert found["ttff_cached_s"] == pytest.approx(0.45)
    assert [found[f"jitter_{name}_s"] for name in ("p50", "p95", "max")] == pytest.approx([0.55] * 3)
    assert found["slowdown"] == pytest.approx(1)
    assert [found[f"deadline_{buffer}"] for buffer in (0, 1, 2)] == [100, 100, 100]
    assert [found[f"stall_{buffer}_s"] for buffer in (0, 1, 2)] == [0, 0, 0]


def test_where_context_passes_go_along_steps_are_told_from_a_stream_where_they_do_not():
    found = measured(turn(steady(20, steps=0.45, context=0.0), joint=True, apart=steady(8)))
    assert found["dit_fps"] == pytest.approx(12 / 0.45)
    assert found["dit_fps_no_context"] == pytest.approx(12 / 0.4)
    assert "dit_fps_no_context" not in measured(turn(steady(20), joint=True))


def test_a_stream_that_gets_slower_says_so():
    found = measured(turn(steady(33, slower=0.1)))
    assert found["slowdown"] == pytest.approx((1 + 0.1 * 27.5) / (1 + 0.1 * 7.5))
    assert found["jitter_max_s"] > found["jitter_p95_s"] > found["jitter_p50_s"]


def test_a_late_stream_stalls_less_the_more_is_in_store():
    found = measured(turn(steady(12, steps=0.8)))  # 0.95 s for 0.75 s of video
    assert 0 < found["deadline_0"] < found["deadline_1"] < found["deadline_2"] < 100
    assert found["stall_0_s"] > found["stall_1_s"] > found["stall_2_s"] > 0
    assert found["underruns_0"] == 11


def test_the_chunks_that_fill_the_window_are_not_counted():
    stamps = ("begin", "denoised", "readable", "cached")
    slow = [dataclasses.replace(row, **{name: getattr(row, name) + 5 for name in stamps}) for row in steady(12)]
    slow[0] = Chunk(0, 9, 0.0, 5.0, 5.01, 5.02)
    names = ("dit_fps", "dit_fps_no_context", "e2e_fps", "rtf", "slowdown", "jitter_max_s")
    found, wanted = measured(turn(tuple(slow))), measured(turn(steady(12)))
    assert [found[name] for name in names] == pytest.approx([wanted[name] for name in names])
    assert found["ttff_cached_s"] == 5.01


def test_what_does_not_apply_is_not_there():
    assert set(measured(turn())) == {"clip_fps", "ttff_s", "peak_memory_bytes"}
    assert set(measured(turn(steady(4)))) == {"clip_fps", "ttff_s", "ttff_cached_s", "peak_memory_bytes"}


def test_a_99th_percentile_needs_662_gaps():
    assert "jitter_p99_s" not in measured(turn(steady(665)))
    many = list(steady(666))
    late = {20, 40, 60, 80, 100, 120, 140}  # 7 of 662 gaps are longer: just more than one in a hundred
    shift = 0.0
    for i, chunk in enumerate(many):
        shift += 1.0 if i in late else 0.0
        many[i] = dataclasses.replace(chunk, readable=chunk.readable + shift)
    assert measured(turn(tuple(many)))["jitter_p99_s"] == pytest.approx(1.55)
    assert measured(turn(tuple(many)))["jitter_p95_s"] == pytest.approx(0.55)


def test_rounds_that_were_written_before_there_was_more_to_write_are_read():
    plain = dataclasses.asdict(Round(0, 0, (turn(steady(6)),)))
    for one in plain["turns"]:
        for name in ("joint", "warm_up_s", "apart", "joules", "whole"):
            del one[name]
        for chunk in (*one["clip"], *one["stream"]):
            del chunk["held_bytes"], chunk["decoded"]
    assert timing.as_rounds([plain], "old") == [Round(0, 0, (turn(steady(6)),))]


@given(st.integers(1, 7))
def test_everybody_goes_at_every_place_and_before_everybody_else_equally_often(count):
    names = [f"c{i}" for i in range(count)]
    rounds = [timing.order(names, number) for number in range(2 * count)]
    assert rounds[0] == tuple(names)
    assert all(sorted(each) == names for each in rounds)
    for name in names:
        assert sorted(each.index(name) for each in rounds) == sorted([*range(count), *range(count)])
    for one, other in itertools.permutations(names, 2):
        assert sum(each.index(one) < each.index(other) for each in rounds) == count


def rounds_of(values: dict[str, list[list[float]]]) -> list[Round]:
    """Rounds in which contender -> process -> round has this clip FPS."""
    (first, *_) = values.values()
    return [
        Round(
            process, number, tuple(turn(name=name, clip=(Chunk(0, 81, 0.0, 0.0, 81 / fps[process][number], None),)) for name, fps in values.items())
        )
        for process in range(len(first))
        for number in range(len(first[process]))
    ]


@given(st.lists(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), min_size=1, max_size=5))
def test_processes_are_weighed_by_their_medians(fps):
    spread = timing.spread(timing.values(rounds_of({"a": fps}), "run")["a"]["clip_fps"])
    medians = fps[0] if len(fps) == 1 else [sorted(one)[1] for one in fps]
    assert (spread.median, spread.low, spread.high) == pytest.approx((median(medians), min(medians), max(medians)))
    assert spread.repeats == len(medians)


def column(values: list[float], run: str = "run", process: int = 0) -> dict[Key, float]:
    return {(run, process, number): value for number, value in enumerate(values)}


def test_only_rounds_of_the_same_run_and_process_are_pairs():
    fast, slow = [3.0, 6.0, 9.0, 3.0, 6.0, 9.0], [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]
    found = timing.compared(column(fast), column(slow), higher_is_better=True)
    assert (found.value, found.low, found.high, found.rounds) == (3.0, 3.0, 3.0, 6)
    found = timing.compared(column(fast), column(slow), higher_is_better=False)
    assert found.value == pytest.approx(1 / 3)
    for other in (column(slow, run="another"), column(slow, process=1)):
        with pytest.raises(ValueError, match="rounds in which both were timed"):
            timing.compared(column(fast), other, higher_is_better=True)
    shared = timing.compared(column(fast) | column([1.0], "another"), column(slow) | column([9.0], "third"), higher_is_better=True)
    assert (shared.value, shared.rounds) == (3.0, 6)
    assert math.isclose(timing.compared(column(fast[:2]), column(slow), higher_is_better=True).value, 3.0)
