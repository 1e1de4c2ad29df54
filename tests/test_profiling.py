"""Timings of streams whose speed is known, a viewer simulated frame by frame, and one real profile."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfbench import baselines, profiling, records
from rfbench.errors import UserError
from rfbench.records import Chunk
from rfbench.report import evidence
from tests import models


def steady(chunks: int, *, steps: float = 0.4, decode: float = 0.05, context: float = 0.1, slower: float = 0.0) -> list[Chunk]:
    """A stream whose every chunk takes the same time, or `slower` longer than the one before."""
    rows, now = [], 0.0
    for index in range(chunks):
        begin, factor = now, 1 + slower * index
        denoised = begin + steps * factor
        readable = denoised + decode
        now = readable + context * factor
        rows.append(Chunk(0, 0, index, 9 if index == 0 else 12, begin, denoised, readable, now))
    return rows


def test_a_stream_of_known_speed():
    found = profiling.streaming(steady(20), 16)
    assert found["dit_fps"] == pytest.approx(12 / 0.5)
    assert found["dit_fps_no_context"] == pytest.approx(12 / 0.4)
    assert found["e2e_fps"] == pytest.approx(12 / 0.55)
    assert found["rtf"] == pytest.approx(12 / 0.55 / 16)
    assert found["ttff_cached_s"] == pytest.approx(0.45)
    assert [found[f"jitter_{name}_s"] for name in ("p50", "p95", "max")] == pytest.approx([0.55] * 3)
    assert found["slowdown"] == pytest.approx(1)
    assert [found[f"deadline_{buffer}"] for buffer in (0, 1, 2)] == [1, 1, 1]
    assert [found[f"stall_{buffer}_s"] for buffer in (0, 1, 2)] == [0, 0, 0]


def test_a_stream_that_gets_slower_says_so():
    found = profiling.streaming(steady(33, slower=0.1), 16)
    assert found["slowdown"] == pytest.approx((1 + 0.1 * 27.5) / (1 + 0.1 * 7.5))
    assert found["jitter_max_s"] > found["jitter_p95_s"] > found["jitter_p50_s"]


def test_the_chunks_that_fill_the_window_are_not_counted():
    slow_start = [Chunk(0, 0, row.index, row.frames, *(at + 5 for at in (row.begin, row.denoised, row.readable, row.cached))) for row in steady(12)]
    slow_start[0] = Chunk(0, 0, 0, 9, 0.0, 5.0, 5.01, 5.02)
    timed = ("dit_fps", "dit_fps_no_context", "e2e_fps", "rtf", "slowdown", "jitter_max_s")
    found, wanted = profiling.streaming(slow_start, 16), profiling.streaming(steady(12), 16)
    assert [found[name] for name in timed] == pytest.approx([wanted[name] for name in timed])
    assert found["ttff_cached_s"] == 5.01


def test_a_stream_that_is_too_short_says_nothing():
    assert profiling.streaming(steady(4), 16) == {}


@given(st.lists(st.integers(1, 40), min_size=3, max_size=12), st.sampled_from([0, 1, 2]), st.sampled_from([4, 16]))
def test_a_viewer_is_the_one_who_looks_at_every_frame(sixteenths, buffer, fps):
    """Times are sums of sixteenths of a second, so that sums of floats are exact."""
    rows, now = [], 0.0
    for index, took in enumerate(sixteenths):
        now += took / 16
        rows.append(Chunk(0, 0, index, 9 if index == 0 else 12, 0.0, 0.0, now, now))
    arrivals = [row.readable for row in rows for _ in range(row.frames)]
    start = rows[buffer].readable
    in_time = sum(arrival <= start + number / fps for number, arrival in enumerate(arrivals))
    clock, stalled = start, 0.0
    for arrival in arrivals:
        stalled += max(0.0, arrival - clock)
        clock = max(clock, arrival) + 1 / fps
    share, stall = profiling.viewing(rows, fps, buffer)
    assert share == pytest.approx(in_time / len(arrivals))
    assert stall == pytest.approx(stalled)


@given(st.lists(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), min_size=1, max_size=5))
def test_processes_are_weighed_by_their_medians(values):
    taken = [profiling.Times({"e2e_fps": one}, [], {}) for one in values]
    found = profiling.summary(taken)["e2e_fps"]
    medians = values[0] if len(values) == 1 else [sorted(one)[1] for one in values]
    assert (found["median"], found["min"], found["max"], found["n"]) == (median(medians), min(medians), max(medians), len(medians))


def test_a_profile_of_a_student(tmp_path, folders):
    """One process for real: an interpreter of its own, rows that follow each other, numbers that agree with the rows."""
    directory = profiling.profile(models.write(tmp_path, max_latents=24), chunks=9, repeats=2)
    assert directory == folders / "runs" / "profile" / "student" / "cpu"
    run = records.read_run(directory)
    assert (run.verb, run.name, run.status) == ("profile", "student/cpu", "done")
    assert (run.recorded["dtype"], run.recorded["device"]) == ("float32", "cpu")
    assert run.recorded["chunks"] == 7  # 24 latents are 8 chunks, and the last has no context pass
    rows = records.read_rows(directory / "chunks.jsonl", Chunk)
    assert [(row.process, row.repeat, row.index, row.frames) for row in rows] == [(0, r, i, 9 if i == 0 else 12) for r in range(2) for i in range(7)]
    for before, row in zip([None, *rows], rows, strict=False):
        assert 0 <= row.begin < row.denoised < row.readable < row.cached
        assert before is None or row.index == 0 or before.cached <= row.begin
    timing = evidence.read_timing(directory)
    assert set(evidence.TIMINGS) == {name.removeprefix("profile.") for name in timing.metrics}
    found = run.result
    took = [[row.denoised - row.begin + row.cached - row.readable for row in rows if row.repeat == r and row.index >= 3] for r in range(2)]
    fps = [12 / median(seconds) for seconds in took]
    assert found["dit_fps"] == {"median": pytest.approx(sum(fps) / 2), "min": pytest.approx(min(fps)), "max": pytest.approx(max(fps)), "n": 2}
    assert found["dit_fps_no_context"]["median"] > found["dit_fps"]["median"] > found["e2e_fps"]["median"]
    assert found["cold_start_s"]["median"] > found["ttff_s"]["median"]
    assert 5e7 < found["peak_memory_bytes"]["median"] < 4e9
    assert "resident" in run.recorded["memory"]
    files = {path: path.read_bytes() for path in directory.iterdir()}
    profiling.profile(models.write(tmp_path, max_latents=24), chunks=9, repeats=2)
    assert {path: path.read_bytes() for path in directory.iterdir()} == files


def test_a_bidirectional_model_has_only_whole_clips(tmp_path):
    ready = baselines.prepare(models.write(tmp_path, "teacher", sampler=models.TEACHER, max_latents=21))
    assert profiling.possible(ready, 20) == 0
    times = profiling.measure(ready, 0, 0, 2, 1, 0.0)
    assert set(times.values) == {"cold_start_s", "ttff_s", "clip_fps", "peak_memory_bytes"}
    assert times.chunks == []
    assert all(81 / fps == pytest.approx(first) for fps, first in zip(times.values["clip_fps"], times.values["ttff_s"], strict=True))


def test_random_weights_need_no_file_and_are_marked(tmp_path):
    path = models.write(tmp_path)
    (tmp_path / "student.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights 'student\.safetensors'"):
        profiling.profile(path, chunks=5, repeats=1)
    ready = baselines.prepare(path, random_weights=True)
    assert ready.inputs()["weights_sha256"] == "random"
    assert float(ready.open().denoiser.head.head.weight.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets the peak")
def test_memory_held_before_the_meter_starts_is_not_counted():
    mebibyte = 2**20
    held = bytearray(b"x" * (300 * mebibyte))
    del held
    what, peak = profiling.meter()
    before = peak()
    held = bytearray(b"x" * (100 * mebibyte))
    assert what == "resident after warm-up"
    assert 90 * mebibyte < peak() - before < 250 * mebibyte
    del held


def test_too_few_chunks_are_refused(tmp_path, folders):
    with pytest.raises(UserError, match=r"--chunks 4 never gets steady.* the least is 5"):
        profiling.profile(models.write(tmp_path), chunks=4, repeats=1)
    assert not (folders / "runs").exists()
