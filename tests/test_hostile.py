"""Every scorer that runs here meets broken and odd clips: each is scored rightly or refused by name, and a good clip beside them is unaffected."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rfbench import evaluate, records, world
from rfbench.errors import UserError
from rfbench.records import Clip, Score
from rfbench.registry import pick
from rfbench.report import evidence
from rfbench.scorers.base import LIGHT, SCORERS, ClipError, check_pace
from rfbench.vbench_worker.fast import Networks, TemporalFlickering
from rfbench.vbench_worker.video import Footage, UnreadableError
from tests import fake_runs, hostile
from tests.filming import pixels, scene_of

CHEAP = ("flicker", "appearance", "flow", "reference")
REFUSED = {  # besides what nobody can read
    **{scorer: {"one frame", "1x1", "odd"} for scorer in LIGHT},
    **{scorer: {"one frame", "1x1"} for scorer in ("appearance", "flow")},
    "flicker": {"one frame"},
    "reference": {"1x1"},
}
FROZEN = {
    "flicker": {"temporal_flickering": 100},
    "appearance": {"first_frame_similarity": 100, "colour_drift": 0},
    "flow": {"flow": 0, "fastest_flow": 0, "warping_error": 0},
    "reference": {"psnr": 100, "ssim": 100},
    "motion": {"dynamic_degree": 0, "speed": 0},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good clip of prompt 0, and a hostile one of each further prompt."""
    prompts = ["a red disc", *(["a red disc"] * len(hostile.NAMES))]
    run = fake_runs.write_bench(tmp_path_factory.mktemp("runs"), "student", "short", prompts, samples=1, frames=33)
    good = records.read_clips(run)[0]
    records.write_rows(run / "clips.jsonl", [good, *(hostile.write(run, name, 1 + k) for k, name in enumerate(hostile.NAMES))])
    return run


@pytest.fixture
def run(shared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared, tmp_path / "run"))


def rows_of(run: Path, scorer: str, clip: Clip) -> list[tuple[str, int | None, float]]:
    return [(row.metric, row.segment, row.value) for row in records.read_rows(run / "scores" / f"{scorer}.jsonl", Score) if row.clip == clip.id]


@pytest.mark.parametrize("scorer", [*LIGHT, *CHEAP])
def test_each_clip_is_scored_or_refused_by_name(run, scorer):
    against = run if scorer == "reference" else None
    clips = records.read_clips(run)
    named = dict(zip(("good", *hostile.NAMES), clips, strict=True))
    with pytest.raises(UserError, match=f"scorer '{scorer}' could not score .* of 13 clips, first 00") as caught:
        evaluate.evaluate(run, [scorer], against=against)
    assert caught.value.code == 1
    note = json.loads((run / "scores" / f"{scorer}.json").read_text())
    refused = {*hostile.UNREADABLE, *REFUSED[scorer]}
    assert note["refused"].keys() == {named[name].id for name in refused}
    assert all(reason.startswith(f"clip {clip}") for clip, reason in note["refused"].items())
    for name, clip in named.items():
        assert bool(rows_of(run, scorer, clip)) == (name not in refused)
    for name in {"frozen", "black"} - refused:
        found = {metric: value for metric, segment, value in rows_of(run, scorer, named[name]) if segment is None}
        assert {metric: found[metric] for metric in FROZEN.get(scorer, {})} == pytest.approx(FROZEN.get(scorer, {}), abs=1e-9)
    with pytest.raises(UserError, match="clips could not be scored"):
        evidence.read_scores(evidence.read_bench(run), scorer)

    told = rows_of(run, scorer, named["good"]), rows_of(run, scorer, named[hostile.READABLE[-1]])
    plain = run / "videos" / "plain.mkv"
    shutil.copy(run / named[hostile.READABLE[-1]].file, plain)
    renamed = Clip(**{**vars(named[hostile.READABLE[-1]]), "file": "videos/plain.mkv"})
    records.write_rows(run / "clips.jsonl", [named["good"], renamed])
    shutil.rmtree(run / "scores")
    evaluate.evaluate(run, [scorer], against=against)
    assert (rows_of(run, scorer, named["good"]), rows_of(run, scorer, renamed)) == told


def test_what_a_file_says_of_its_pace_is_checked(run):
    with pytest.raises(UserError):
        evaluate.evaluate(run, ["flicker"])
    note = json.loads((run / "scores" / "flicker.json").read_text())
    paced = [reason for reason in note["refused"].values() if "does not show 16 frames per second throughout" in reason]
    assert len(paced) == 2


def test_the_flicker_of_one_pixel_is_right(run):
    with pytest.raises(UserError):
        evaluate.evaluate(run, ["flicker"])
    clip = records.read_clips(run)[1 + hostile.NAMES.index("1x1")]
    (row,) = rows_of(run, "flicker", clip)
    frames = pixels(world.render(scene_of("a red disc", seed=clip.prompt_id), 33))[:, 20, 20].astype(float)
    assert row[2] == pytest.approx(100 * (255 - np.abs(np.diff(frames, axis=0)).mean()) / 255, abs=1e-5)


def test_vbenchs_flicker_of_each_clip_is_ours_or_is_refused_in_words(run):
    """What its worker sees, whose readers are those of VBench; a pace that is not the run's was refused before it is asked."""
    scorer = pick(SCORERS, "flicker", what="scorer")
    for name in hostile.NAMES:
        clip = next(clip for clip in records.read_clips(run) if clip.file == f"videos/{name}.mkv")
        path = (run / clip.file).rename(run / "videos" / f"{name}.mp4")  # readers look at what is in it
        clip = dataclasses.replace(clip, file=f"videos/{path.name}")
        try:
            check_pace(clip, path)
            value = TemporalFlickering(Networks(torch.device("cpu")))(Footage(path, frames=clip.frames), "", {}).value
        except (ClipError, UnreadableError) as error:
            assert name in (*hostile.UNREADABLE, "one frame") and (name in str(error) or "one frame" in str(error))
            continue
        (answer,) = scorer.score([clip], run)
        assert value is not None and 100 * value == pytest.approx(answer.rows[0].value, abs=1e-5), name
