"""What the scorers are made of: straight pieces, segments and their spread, videos that are refused, the contract that all keep."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics

import imageio.v3 as iio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfbench import world
from rfbench.errors import UserError
from rfbench.records import sha256_of
from rfbench.registry import pick
from rfbench.scorers.base import LIGHT, SCORERS, read_video, segments
from rfbench.scorers.trajectory import WINDOW, straighten
from tests.filming import SIZE, answered, blurred, measured, pixels, rows_of, save, scene_of

# Straight pieces


@settings(max_examples=50)
@given(data=st.data(), count=st.integers(3, 40))
def test_velocity_is_the_slope_of_the_best_of_all_windows(data, count):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    path = np.cumsum(rng.normal(0, 0.7, (count, 2)), axis=0)
    got = straighten(path % SIZE, np.ones(count, bool), (world.WIDTH, world.HEIGHT))
    assert np.allclose(np.diff(got.xy, axis=0), np.diff(path, axis=0))
    length = min(WINDOW, count)
    fits = []
    for begin in range(count - length + 1):
        window = slice(begin, begin + length)
        lines, residual, *_ = np.polyfit(np.arange(length), path[window], 1, full=True)
        fits.append((residual.sum() if residual.size else 0.0, lines[0], begin))
    for t in range(count):
        misfit, slope, _ = min((fit for fit in fits if fit[2] <= t < fit[2] + length), key=lambda fit: fit[0])
        straight = misfit <= length * 2.5**2
        assert np.allclose(got.velocity[t], slope if straight else 0, atol=1e-6)


def test_a_kink_surprises_nobody_and_a_jump_by_its_length():
    clock = np.arange(60)
    kink = np.stack([np.where(clock < 30, clock, 60 - clock), 0.5 * np.maximum(clock - 30, 0)], axis=1)
    seen = np.ones(60, bool)
    for span in (1, 4):
        assert straighten(kink % SIZE, seen, (64, 48)).surprise(span).max() < 1e-9
    jump = np.stack([0.5 * clock, np.where(clock < 30, 0, 12)], axis=1)
    path = straighten(jump % SIZE, seen, (64, 48))
    assert path.surprise(1)[29] == pytest.approx(12)
    assert np.count_nonzero(path.surprise(1) > 1e-9) == 1
    assert np.count_nonzero(path.surprise(4) > 1e-9) == 4
    assert path.speed == pytest.approx(0.5)


# Segments and drift


@given(frames=st.integers(2, 2000), fps=st.integers(1, 60))
def test_segments_hold_every_frame_once_and_last_two_seconds(frames, fps):
    pieces = segments(frames, fps)
    lengths = [piece.stop - piece.start for piece in pieces]
    assert [t for piece in pieces for t in range(frames)[piece]] == list(range(frames))
    assert len(pieces) >= 2 and min(lengths) >= 1
    if frames >= 3 * fps:
        assert set(lengths[:-1]) == {2 * fps}
        assert fps <= lengths[-1] < 3 * fps


def test_segments_of_the_two_suites():
    assert [piece.stop - piece.start for piece in segments(81, 16)] == [32, 32, 17]
    assert [piece.stop - piece.start for piece in segments(477, 16)] == [32] * 14 + [29]


def test_drift_is_the_sample_deviation_of_the_segments_quality(tmp_path):
    scene = scene_of("a green triangle moves left")
    blur = np.concatenate([blurred(piece, times) for piece, times in zip(np.array_split(world.render(scene, 161), 5), (0, 4, 1, 6, 2), strict=True)])
    rows = rows_of(save(pixels(blur), tmp_path), tmp_path)
    quality = [value for name, segment, value in rows if name == "drift.imaging_quality" and segment is not None]
    whole = {name: value for name, segment, value in rows if segment is None}
    assert len(quality) == 5
    assert whole["drift.drift"] == pytest.approx(statistics.stdev(quality))
    assert whole["drift.imaging_quality"] == pytest.approx(np.average(quality, weights=[32, 32, 32, 32, 33]))
    assert quality[0] > quality[2] > quality[4] > quality[1] > quality[3]


def test_speed_over_time_is_told_per_segment(tmp_path):
    scene = scene_of("a red disc moves left slowly then quickly")
    rows = rows_of(save(pixels(world.render(scene, 161)), tmp_path), tmp_path)
    speed = [value for name, segment, value in rows if name == "motion.speed" and segment is not None]
    slow, quick = (float(np.hypot(*velocity)) for velocity in (scene.velocity_xy, scene.then_velocity_xy or (0, 0)))
    assert speed[0] == pytest.approx(slow, rel=0.02)
    assert speed[2:] == pytest.approx([quick] * 3, rel=0.02)


def test_quality_change_compares_the_two_ends():
    scene = scene_of("a red disc moves left")
    clip = world.render(scene, 200)
    ends = measured(pixels(np.concatenate([blurred(clip[:80], 6), clip[80:]])), "a red disc")
    middle = measured(pixels(np.concatenate([clip[:80], blurred(clip[80:120], 6), clip[120:]])), "a red disc")
    assert ends["drift.quality_change"] > 10
    assert abs(middle["drift.quality_change"]) < 0.5 < 2 < middle["drift.drift"]


# Files


@pytest.fixture
def good(tmp_path):
    return save(pixels(world.render(scene_of("a red disc moves left"), 21)), tmp_path)


def test_a_video_reads_as_the_library_reads_it(tmp_path, good):
    assert np.array_equal(read_video(tmp_path, good), iio.imread(tmp_path / good.file, plugin="pyav"))


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "one bit"])
@pytest.mark.parametrize("scored_before", [False, True])
@pytest.mark.parametrize("scorer", LIGHT)
def test_a_damaged_video_gets_no_score_even_if_it_had_one_before(tmp_path, good, damage, scored_before, scorer):
    score = pick(SCORERS, scorer, what="scorer").score
    if scored_before:
        assert list(score([good], tmp_path))
    path = tmp_path / good.file
    content = path.read_bytes()
    path.unlink()
    if damage == "one bit":
        path.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
    elif damage != "missing":
        path.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    (answer,) = score([good], tmp_path)
    assert answer.rows == () and re.search(r"clip 0000-0: .*0000-0\.mp4 .* generate it again", str(answer.refused))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"frames": 20}, "has 21 frames, its row says 20"),
        ({"frames": 22}, "has 21 frames, its row says 22"),
        ({"height": 64, "width": 48}, "is 64x48, its row says 48x64"),
    ],
)
def test_a_video_that_is_not_what_its_row_says_is_refused(tmp_path, good, change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        read_video(tmp_path, dataclasses.replace(good, **change))
    assert caught.value.code == 1


@pytest.mark.parametrize("keep", [0, 40, 700, -300])
def test_a_file_that_was_broken_when_its_hash_was_taken_is_refused(tmp_path, good, keep):
    path = tmp_path / good.file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError) as caught:
        read_video(tmp_path, dataclasses.replace(good, sha256=sha256_of(path)))
    assert caught.value.code == 1


def test_a_clip_that_is_too_short_to_move_is_refused(tmp_path):
    clip = save(pixels(world.render(scene_of("a red disc"), 2)), tmp_path)
    (answer,) = pick(SCORERS, "motion", what="scorer").score([clip], tmp_path)
    assert answer.rows == () and "at least 3 frames" in str(answer.refused)


# The contract


def test_every_scorer_of_the_toy_world_keeps_the_contract(tmp_path):
    prompts = ["a red disc", "a blue square moves up slowly then down", "a cyan triangle moves left slowly then quickly"]
    clips = [save(pixels(world.render(scene_of(prompt), 53)), tmp_path, prompt, name=f"{k:04}-0") for k, prompt in enumerate(prompts)]
    for name in LIGHT:
        scorer = pick(SCORERS, name, what="scorer")
        assert scorer.name == name and scorer.version
        rows = answered(scorer, clips, tmp_path)
        assert {row.metric for row in rows} == set(scorer.metrics)
        assert all(math.isfinite(row.value) and type(row.value) is float for row in rows)
        assert len({(row.clip, row.metric, row.segment) for row in rows}) == len(rows)
        for metric, about in scorer.metrics.items():
            assert about.unit and about.text.endswith(".")
            if name != "caption" or metric == "caption_agreement":
                assert {row.clip for row in rows if row.metric == metric and row.segment is None} == {clip.id for clip in clips}
        assert rows == [row for clip in clips for row in answered(scorer, [clip], tmp_path)]
