"""VBench-Long's arithmetic against brute force, closed forms and numpy."""

from __future__ import annotations

import ast
import bisect
import collections
import itertools
import os
import random
import re
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rfbench import video
from rfbench.errors import UserError
from rfbench.vbench.dimensions import T2V
from rfbench.vbench.long import SECONDS, _tables, dimension, drift, first_static, fused, mapped, mean_of_videos, seconds, segments
from rfbench.vbench.prompts import Entry
from rfbench.vbench.rows import BETWEEN, Asked, Row
from rfbench.vbench_worker.video import Footage
from tests.vbench_suite import ENTRIES

UNIT = st.floats(0, 1)


@given(frames=st.integers(1, 500), fps=st.integers(1, 30), length=st.sampled_from([2, 10]))
def test_clips_cover_the_video_are_equally_long_and_only_the_last_overlaps(frames, fps, length):
    found, size = segments(frames, fps, length), fps * length
    assert set(itertools.chain.from_iterable(range(*clip) for clip in found)) == set(range(frames))
    assert {end - begin for begin, end in found} == {min(size, frames)}
    assert all(begin == end for (_, end), (begin, _) in itertools.pairwise(found[:-1]))
    assert len(found) == max(1, -(-frames // size)) and found[-1][1] == frames


def test_a_minute_of_the_papers_models_is_thirty_clips():
    """240 latent frames are 957 at 16 fps: 29 whole clips of 2 s, and a last one that shares three frames with the one before."""
    assert len(segments(957, 16, 2)) == 30 and segments(957, 16, 2)[-2:] == [(896, 928), (925, 957)]
    assert segments(81, 16, 10) == [(0, 81)]


def test_clips_are_as_long_as_the_longest_of_the_prompts_dimensions():
    known = [
        Entry("x", ("appearance_style",)),
        Entry("x", ("overall_consistency", "aesthetic_quality", "imaging_quality")),
        Entry("y", ("appearance_style",)),
        Entry("z", ("human_action",)),
    ]
    assert [seconds(entry, known, "longest") for entry in known] == [10, 10, 2, 10]
    assert [seconds(entry, known, "2s") for entry in known] == [2, 2, 2, 2]


@given(videos=st.dictionaries(st.text(min_size=1, max_size=3), st.lists(st.none() | UNIT, min_size=1, max_size=6), min_size=1, max_size=6))
def test_a_dimension_is_the_mean_of_the_means_of_videos(videos):
    means = [statistics.fmean([v for v in clips if v is not None]) for clips in videos.values() if any(v is not None for v in clips)]
    if not means:
        with pytest.raises(UserError, match="long videos has a value"):
            mean_of_videos(videos)
        return
    value, count = mean_of_videos(videos)
    assert value == pytest.approx(statistics.fmean(means)) and count == len(means)
    assert mean_of_videos(dict(reversed(videos.items()))) == (value, count), "to the last bit in any order"


@given(quality=st.lists(st.floats(0, 100), min_size=2, max_size=40))
def test_drift_is_the_sample_standard_deviation_and_the_printed_formula_is_zero(quality):
    assert drift(quality) == pytest.approx(np.std(quality, ddof=1), abs=1e-9)
    assert np.sum(np.array(quality) - np.mean(quality)) == pytest.approx(0, abs=1e-9), "without the square nothing is left"


@pytest.mark.parametrize("dimension", ["subject_consistency", "background_consistency"])
def test_the_tables_rise_from_nothing_to_one(dimension):
    table = _tables()[dimension]
    assert len(table) == 101 and (table[0], table[-1]) == (0, 1) and table == sorted(table)


@given(between=st.floats(-0.5, 1.5), dimension=st.sampled_from(["subject_consistency", "background_consistency"]))
def test_between_the_points_of_the_table_it_is_linear(between, dimension):
    assert mapped(between, dimension) == pytest.approx(np.interp(between, np.arange(101) / 100, _tables()[dimension]))


def test_consistency_is_half_within_and_half_between_clips_where_there_is_a_between():
    assert fused(0.9, 0.5, "subject_consistency") == pytest.approx((0.9 + 0.932674917380015) / 2)
    assert fused(0.9, 0.005, "background_consistency") == pytest.approx((0.9 + 0.873691544930448 / 2) / 2)
    assert fused(0.9, None, "subject_consistency") == fused(0.9, 0.0, "subject_consistency") == 0.9


def test_the_first_five_static_clips_of_a_prompt_are_first_by_path():
    clips = {(prompt, sample, k): (sample, k) != (1, 1) for prompt in (3, 4) for sample in (0, 1, 2, 10) for k in range(2)}
    paths = sorted(f"x-{sample}/x-{sample}_{k:03d}.mp4" for p, sample, k in clips if p == 3 and (sample, k) != (1, 1))
    kept = first_static(clips)
    assert sorted(f"x-{sample}/x-{sample}_{k:03d}.mp4" for p, sample, k in kept if p == 3) == paths[:5] and len(kept) == 10
    assert {key[1:] for key in kept if key[0] == 4} == {(0, 0), (0, 1), (1, 0), (10, 0), (10, 1)}


def test_some_frames_of_a_file_are_read_as_they_are(tmp_path):
    with video.writing(tmp_path / "whole.mp4", fps=16, height=32, width=48) as write:
        write(np.stack([np.full((32, 48, 3), 6 * t, np.uint8) for t in range(40)]))
    whole, some = (Footage(tmp_path / "whole.mp4", frames=40, at=at).bgr for at in (None, [0, 32, 38]))
    assert np.array_equal(some, whole[[0, 32, 38]])


# VBench-Long's own code, which does not import beside a current torchvision: its plain functions, out of the installed package


@pytest.fixture(scope="module")
def original():
    python = os.environ.get("RFBENCH_VBENCH_PYTHON", "")
    if not python:
        pytest.skip("needs the environment vbench; `make test` builds it")
    where = "import importlib.util as u; print(u.find_spec('vbench2_beta_long').origin)"
    origin = subprocess.run([python, "-P", "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    known = {"os": os, "re": re, "yaml": yaml, "bisect_left": bisect.bisect_left, "defaultdict": collections.defaultdict}
    tree = ast.parse(Path(origin).with_name("utils.py").read_text(encoding="utf-8"))
    wanted = {"reorganize_clips_results", "fuse_inclip_clip2clip", "linear_interpolate", "get_duration_from_json"}
    exec(compile(ast.Module([n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in wanted], []), origin, "exec"), known)
    return known


@pytest.mark.parametrize("name", BETWEEN.values())
def test_with_compat_consistency_is_that_of_vbench_longs_own_code(original, tmp_path, name):
    """Videos of one to four clips; ours without `compat` is another number where they are not equally long."""
    rng = random.Random(0)
    values = {(f"a bird-{i}", k): rng.uniform(0.6, 1) for i in range(6) for k in range(1 + i % 4)}
    between = {video: rng.uniform(0.3, 1) for video, k in values if k == 1}
    clips = [{"video_path": f"/v/split_clip/{video}/{video}_{k:03d}.mp4", "video_results": value} for (video, k), value in values.items()]
    first = [{"video_path": f"/v/firsts/{video}.mp4", "video_results": value} for video, value in between.items()]
    short = {"subject_consistency": "sb", "background_consistency": "bg"}[name]
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({k / 100: value for k, value in enumerate(_tables()[name])}))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({f"w_inclip_{short}": 0.5, f"w_clip2clip_{short}": 0.5}))
    paths = {"slow_fast_eval_config": tmp_path / "params.yaml", f"{short}_mapping_file_path": tmp_path / "table.yaml"}
    _, _, grouped = original["reorganize_clips_results"](clips)
    wanted, _ = original["fuse_inclip_clip2clip"](0.0, 0.0, grouped, first, name, dev_flag=True, **paths)

    key = next(key for key, of in BETWEEN.items() if of == name)
    there = [Row(f"sha {video}", name, "1", value, 31.0, begin=32 * k, end=32 * k + 32) for (video, k), value in values.items()]
    there += [Row(f"sha {video}", key, "1", value, 1.0) for video, value in between.items()]
    asked = {name: [Asked(video, 0, int(video[-1]), f"sha {video}", begin=32 * k, end=32 * k + 32) for video, k in values]}
    asked[key] = [Asked(video, 0, int(video[-1]), f"sha {video}") for video in between]
    versions = {name: "1", key: "1"}
    assert dimension(name, asked, there, versions, compat=True)["value"] == pytest.approx(100 * wanted)
    assert dimension(name, asked, there, versions)["fused"] != pytest.approx(100 * wanted, abs=1e-3)


def test_a_dimension_of_vbench_long_is_the_mean_over_clips_and_ours_over_videos(original):
    values = {(0, 0): 0.1, (0, 1): 0.2, (0, 2): 0.3, (1, 0): 0.8}
    clips = [{"video_path": f"/v/split_clip/x-{i}/x-{i}_{k:03d}.mp4", "video_results": value} for (i, k), value in values.items()]
    there = [Row(f"sha{i}", "scene", "1", value, 16.0, begin=k, end=k + 1) for (i, k), value in values.items()]
    asked = {"scene": [Asked(f"x-{i}", 0, i, f"sha{i}", begin=k, end=k + 1) for i, k in values]}
    assert dimension("scene", asked, there, {"scene": "1"}, compat=True)["value"] == pytest.approx(
        100 * original["reorganize_clips_results"](clips)[0]
    )
    assert dimension("scene", asked, there, {"scene": "1"})["value"] == pytest.approx(100 * (0.2 + 0.8) / 2)


def test_how_long_clips_are_is_vbench_longs_own_rule(original):
    lengths = {name: SECONDS.get(name, 2) for name in T2V.dimensions}
    known = [Entry(e["prompt_en"], tuple(e["dimension"])) for e in ENTRIES]
    for entry in known:
        wanted = original["get_duration_from_json"](f"/v/{entry.text}-0.mp4", ENTRIES, lengths)
        assert seconds(entry, known, "longest") == wanted
