"""The scorer around the worker: what is asked, kept, resumed and refused, and what its note says; the worker is a fake one."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rfbench import config, doctor, envs, records, strict, suites, video
from rfbench.config import Baseline
from rfbench.errors import UserError
from rfbench.evaluate import evaluate
from rfbench.records import Run
from rfbench.report import checking, leaderboard
from rfbench.scorers import vbench as scorer
from rfbench.scorers.base import check_pace
from rfbench.vbench import driver, long, totals
from rfbench.vbench.dimensions import T2V
from rfbench.vbench.rows import BETWEEN, CUSTOM
from tests import fake_runs, hostile, vbench_suite

BASELINE = strict.as_plain(config.load(Baseline, "toy/teacher"))


@pytest.fixture(autouse=True)
def worker(folders, monkeypatch):
    vbench_suite.publish(monkeypatch)
    monkeypatch.setattr(envs, "python", lambda name, *options: Path(sys.executable))
    monkeypatch.setattr(driver, "MODULE", "tests.fake_vbench_worker")
    scorer._checked.cache_clear()
    yield
    scorer._checked.cache_clear()


def made(folder, suite, content=lambda clip: f"{clip.id} static", status=records.DONE, frames=lambda clip: clip.frames):
    """A finished run of a suite; its videos are texts."""
    (folder / "videos").mkdir(parents=True)
    clips = []
    for prompt, sample in suite.items:
        clip = vbench_suite.clip(prompt.id, sample, prompt.text, given=prompt.generate_from)
        clip = dataclasses.replace(clip, frames=frames(clip))
        (folder / clip.file).write_text(content(clip))
        clips.append(dataclasses.replace(clip, sha256=records.sha256_of(folder / clip.file)))
    records.write_rows(folder / "clips.jsonl", clips)
    inputs = {"suite": suites.declared(suite) | {"sha256": suites.suite_sha256(suite)}, "weights_sha256": "0" * 64}
    recorded = fake_runs.RECORDED | {"baseline": BASELINE}
    records.write_run(folder, Run("generate", f"x/{suite.name}", inputs, records.fingerprint(inputs), recorded, status=status))
    return folder


def note(run, name="vbench"):
    return json.loads((run / "scores" / f"{name}.json").read_text())


def lines(path):
    return path.read_text().splitlines()


def sessions(run):
    path = run / "scores" / "vbench" / "sessions.txt"
    return [int(line) for line in lines(path)] if path.exists() else []


def raw(run):
    return [json.loads(line) for line in lines(run / "scores" / "vbench" / "rows.jsonl")]


def test_a_whole_run_has_every_dimension_and_a_total(tmp_path):
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing"), frames=lambda clip: 81 + clip.sample)
    evaluate(run, ["vbench"])
    summary = note(run)["summary"]
    assert list(summary["dimensions"]) == list(T2V.dimensions) and "partial" not in summary["totals"]
    for name, found in summary["dimensions"].items():
        mine = [row for row in raw(run) if row["dimension"] == name]
        assert found["clips"] == found["asked"] == len(mine) == (10 if name in ("overall_consistency", "aesthetic_quality", "imaging_quality") else 5)
        weighted = sum(row["value"] * row["weight"] for row in mine) / sum(row["weight"] for row in mine)
        assert found["value"] == pytest.approx(100 * weighted)
        differs = name in ("subject_consistency", "appearance_style")
        assert ("in_several_processes" in found) == differs
    subject = [row["value"] for row in raw(run) if row["dimension"] == "subject_consistency"]
    assert summary["dimensions"]["subject_consistency"]["in_several_processes"] == pytest.approx(100 * statistics.mean(subject))
    assert summary["totals"] == totals.total({name: found["value"] for name, found in summary["dimensions"].items()})
    scores = records.read_rows(run / "scores" / "vbench.jsonl", records.Score)
    assert {(s.clip, s.metric) for s in scores} == {
        (f"{p.id:04d}-{i}", d) for p, i in suites.load_suite("vbench-forcing").items for d in p.dimensions
    } | {(f"0008-{i}", "color_seen") for i in range(5)}


def test_a_report_has_the_totals_of_a_whole_run_and_none_of_a_part(tmp_path):
    """They come out of the run and of its record alike."""
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing"))
    evaluate(run, ["vbench"])
    wanted = note(run)["summary"]["totals"]
    assert note(run)["whole"] == wanted and set(wanted) == {"total", "quality", "semantic"}
    board = leaderboard.read_runs([run])
    (row,), (suite,) = board.rows, board.suites
    for name, value in wanted.items():
        cell = board.cells[row.name, suite, f"vbench.{name}"]
        assert cell.value == pytest.approx(value) and cell.low < value < cell.high, "over prompts"
    ((place, text),) = checking.condensed(board).items()
    records.write_text(tmp_path / "records" / place, text)
    again = leaderboard.read_runs([tmp_path / "records" / place])
    assert {key: cell.value for key, cell in again.cells.items()} == {key: cell.value for key, cell in board.cells.items()}
    few = made(tmp_path / "few", suites.load_suite("vbench-forcing", limit=2))
    evaluate(few, ["vbench"])
    assert note(few)["whole"] == {}
    assert not any(metric == "vbench.total" for _, _, metric in leaderboard.read_runs([few]).cells)


def test_each_prompt_is_asked_for_its_dimensions_with_what_to_look_for(tmp_path):
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing"))
    evaluate(run, ["vbench"])
    asked = json.loads((run / "scores" / "vbench" / "job.json").read_text())["items"]
    items = {" ".join(json.loads(item["id"])[:2]): item for item in asked}
    assert items["0008-2 color"]["about"] == {"color": "red"} and items["0008-2 color"]["prompt"] == "a red car"
    assert items["0002-0 scene"]["about"] == {"scene": {"scene": "alley"}} and items["0002-0 background_consistency"]["about"] == {}
    assert {item["frames"] for item in items.values()} == {81} and len(items) == 5 * sum(len(e["dimension"]) for e in vbench_suite.ENTRIES)


def test_flicker_is_that_of_the_first_five_static_clips(tmp_path):
    moving = {0, 10, 2}
    run = made(tmp_path / "run", suites.load_suite("vbench"), lambda clip: f"{clip.id} {'moving' if clip.sample in moving else 'static'}")
    evaluate(run, ["vbench"])
    found = note(run)["summary"]["dimensions"]["temporal_flickering"]
    values = {row["sha256"]: row["value"] for row in raw(run) if row["dimension"] == "temporal_flickering"}
    clips = {clip.sample: clip.sha256 for clip in records.read_clips(run) if clip.prompt_id == 1}
    assert found["value"] == pytest.approx(100 * statistics.mean(values[clips[i]] for i in (1, 11, 12, 13, 14)))
    assert (found["clips"], found["asked"]) == (5, 5)
    told = {(s.clip, s.metric): s.value for s in records.read_rows(run / "scores" / "vbench.jsonl", records.Score)}
    assert told["0001-2", "static"] == 0 and ("0001-2", "temporal_flickering") not in told and ("0001-24", "temporal_flickering") in told


def test_few_static_clips_are_told_and_none_is_no_total(tmp_path):
    run = made(tmp_path / "few", suites.load_suite("vbench"), lambda clip: f"{clip.id} {'static' if clip.sample == 7 else 'moving'}")
    evaluate(run, ["vbench"])
    assert note(run)["summary"]["dimensions"]["temporal_flickering"]["note"] == "1 prompts have fewer than five static clips"
    run = made(tmp_path / "none", suites.load_suite("vbench"), lambda clip: f"{clip.id} moving")
    evaluate(run, ["vbench"])
    summary = note(run)["summary"]
    assert summary["dimensions"]["temporal_flickering"] == {"value": None, "why": "temporal_flickering: of 0 clips 0 have a value; score them"}
    assert summary["totals"] is None and "one of its dimensions is missing (temporal_flickering)" in summary["why"]


def test_an_object_that_was_never_seen_does_not_count(tmp_path):
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing"), lambda clip: f"{clip.id} {'unseen' if clip.sample < 2 else 'static'}")
    evaluate(run, ["vbench"])
    found = note(run)["summary"]["dimensions"]["color"]
    assert (found["clips"], found["asked"]) == (3, 5) and found["note"].startswith("2 clips do not count")
    told = {(s.clip, s.metric): s.value for s in records.read_rows(run / "scores" / "vbench.jsonl", records.Score)}
    assert [told["0008-1", "color_seen"], told["0008-2", "color_seen"]] == [0, 100] and ("0008-1", "color") not in told


def test_a_clip_that_kills_the_worker_costs_itself_alone_and_is_tried_again_when_mended(tmp_path):
    deadly = {"0003-2": "die", "0009-0": "torn"}
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing"), lambda clip: deadly.get(clip.id, f"{clip.id} static"))
    with pytest.raises(UserError, match=r"2 of 60 clips, first 0003-2 \(clip 0003-2: VBench's worker died of it \(Segmentation fault\)\)"):
        evaluate(run, ["vbench"])
    there = note(run)
    assert set(there["refused"]) == {"0003-2", "0009-0"} and len(records.read_rows(run / "scores" / "vbench.jsonl", records.Score)) == 95 + 5 - 2
    assert there["summary"] is None, "nobody asked for numbers of a part"
    assert len(sessions(run)) < 30

    clips = records.read_clips(run)
    for clip in clips:
        if clip.id in there["refused"]:
            (run / clip.file).write_text(f"{clip.id} static")
    clips = [dataclasses.replace(clip, sha256=records.sha256_of(run / clip.file)) for clip in clips]
    records.write_rows(run / "clips.jsonl", clips)
    before = len(sessions(run))
    evaluate(run, ["vbench"])
    assert sessions(run)[before:] == [2], "only what was not answered is asked"
    assert "partial" not in note(run)["summary"]["totals"]


def test_a_clip_that_the_worker_never_ends_with_costs_itself_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "PATIENCE", {"cpu": 1.0, "cuda": 1.0})
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing"), lambda clip: "hang" if clip.id == "0002-2" else f"{clip.id} static")
    with pytest.raises(UserError, match=r"could not score clip 0002-2 .*VBench's worker was at it for 1 s and was ended.*; the others are kept"):
        evaluate(run, ["vbench"])
    assert set(note(run)["refused"]) == {"0002-2"} and len(sessions(run)) == 2
    assert not any(row["sha256"] == clip.sha256 for clip in records.read_clips(run) if clip.id == "0002-2" for row in raw(run))


@pytest.mark.parametrize("driven", ["fast", "official"])
def test_whoever_is_late_costs_himself_alone_with_both_drivers(tmp_path, monkeypatch, driven):
    """vbench's own functions have the time of all clips that they are given at once, and are then given half of them."""
    monkeypatch.setattr(driver, "PATIENCE", {"cpu": 0.5})
    items = asked(tmp_path, ["fine", "hang", "fine", "good"], ["color", "scene"])
    begun = time.monotonic()
    found = {row["id"]: row for row in driver.answers(Path(sys.executable), items, {"driver": driven, "device": "cpu", "random": None}, tmp_path)}
    assert set(found) == {item["id"] for item in items}
    assert {name for name, row in found.items() if row["value"] is None} == {"1 color", "1 scene"}
    assert found["1 color"]["reason"] == "VBench's worker was at it for 0.5 s and was ended"
    assert 0.5 <= time.monotonic() - begun < 20


def test_an_answer_that_comes_when_time_runs_out_counts(tmp_path, monkeypatch):
    """As if the clock had struck just before the answer was seen: it is read, and who was next gets all of his time."""
    wait, late = select.select, list[bool]()

    def strike(*files):
        if files[3] is None or late:
            return wait(*files)
        late.append(True)
        time.sleep(1.5)  # in which the worker answers everything but the clip that holds it up
        return [], [], []

    monkeypatch.setattr(select, "select", strike)
    items = asked(tmp_path, ["slow", "good", "hang"], ["color"])
    monkeypatch.setattr(driver, "PATIENCE", {"cpu": 1.0})
    found = {row["id"]: row for row in driver.answers(Path(sys.executable), items, {"driver": "fast", "device": "cpu", "random": None}, tmp_path)}
    assert late and [row["value"] is None for row in found.values()] == [False, False, True]
    assert (tmp_path / "sessions.txt").read_text().split() == ["3", "1"]


def asked(folder, contents, dimensions):
    """Items of clips that hold these texts."""
    for number, content in enumerate(contents):
        (folder / f"{number}.mp4").write_text(content)
    about = {"prompt": "", "about": {}, "frames": 4}
    return [
        {"id": f"{number} {name}", "path": str(folder / f"{number}.mp4"), "dimension": name, **about}
        for number in range(len(contents))
        for name in dimensions
    ]


def test_a_rehearsal_with_drawn_weights_says_so_and_is_never_closed(tmp_path):
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing"))
    evaluate(run, ["vbench-random", "vbench"])
    assert json.loads((run / "scores" / "vbench-random" / "job.json").read_text())["random"] == 0
    assert all("drawn weights" in metric["text"] for metric in note(run, "vbench-random")["metrics"].values())
    cells = leaderboard.read_runs([run]).cells
    drawn = {metric: cell.open for (_, _, metric), cell in cells.items() if metric.startswith("vbench-random.")}
    assert len(drawn) >= len(T2V.dimensions) and all("scored by drawn weights" in why for why in drawn.values())
    assert not any("drawn" in cell.open for (_, _, metric), cell in cells.items() if metric.startswith("vbench."))


def test_a_clip_that_is_no_video_is_refused_and_the_others_are_not_touched(tmp_path):
    good = made(tmp_path / "good", suites.load_suite("vbench-forcing"))
    evaluate(good, ["vbench"])
    bad = made(tmp_path / "bad", suites.load_suite("vbench-forcing"), lambda clip: "broken" if clip.id == "0008-0" else f"{clip.id} static")
    with pytest.raises(UserError, match="clip 0008-0: not a video"):
        evaluate(bad, ["vbench"], partial=True)
    color = note(bad)["summary"]["dimensions"]["color"]
    assert color["partial"] and (color["clips"], color["asked"]) == (4, 5) and note(bad)["summary"]["totals"]["partial"]
    told = [{(s.clip, s.metric): s.value for s in records.read_rows(run / "scores" / "vbench.jsonl", records.Score)} for run in (good, bad)]
    assert {key: value for key, value in told[0].items() if key[0] != "0008-0"} == told[1]


def test_a_clip_of_another_pace_than_its_row_is_refused(tmp_path):
    """Dynamic degree would leave out other frames."""
    frames = np.random.default_rng(0).integers(0, 256, (33, 16, 16, 3), np.uint8)
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing", limit=2))
    clips = records.read_clips(run)
    for number, clip in enumerate(clips[:3]):
        (run / clip.file).unlink()
        hostile.encode(run / clip.file, frames, fps=30 if number else 16, times=[3 * t + 3 * (t > 16) for t in range(33)] if number == 2 else None)
        clips[number] = dataclasses.replace(clip, sha256=records.sha256_of(run / clip.file))
    check_pace(clips[0], run / clips[0].file)
    records.write_rows(run / "clips.jsonl", clips)
    with pytest.raises(UserError, match="does not show 16 frames per second throughout"):
        evaluate(run, ["vbench"])
    assert {clips[1].id, clips[2].id} <= set(note(run)["refused"]) and clips[3].id not in note(run)["refused"]


def test_other_weights_of_one_dimension_are_other_values(tmp_path, monkeypatch):
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing"))
    evaluate(run, ["vbench"])
    evaluate(run, ["vbench"])
    assert len(sessions(run)) == 1, "what is there is not asked again"
    first = note(run)["version"]
    monkeypatch.setenv("FAKE_VERSION", "others")
    scorer._checked.cache_clear()
    evaluate(run, ["vbench"])
    assert len(sessions(run)) == 2 and note(run)["version"] != first
    monkeypatch.delenv("FAKE_VERSION")
    scorer._checked.cache_clear()
    evaluate(run, ["vbench"])
    assert len(sessions(run)) == 2 and note(run)["version"] == first, "the first rows are still there"
    evaluate(run, ["vbench"], fresh=True)
    assert sessions(run) == [95]


def test_a_dimension_that_cannot_run_is_named_with_its_fix(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_LACKS", "scene")
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing"))
    with pytest.raises(UserError, match=r"VBench's scene cannot run here: not on this machine: it\.pth; curl it\.pth"):
        evaluate(run, ["vbench"])
    assert not (run / "scores" / "vbench.json").exists()
    evaluate(made(tmp_path / "whole", suites.load_suite("vbench-forcing")), ["vbench"], partial=True)
    summary = note(tmp_path / "whole")["summary"]
    assert set(summary["dimensions"]) == set(T2V.dimensions) - {"scene"} and summary["why"].startswith("there is no VBench total: one")
    assert note(tmp_path / "whole")["version"].endswith("-in-part")
    with pytest.raises(UserError, match="VBench's scene cannot run here"):  # what is there is no answer to this
        evaluate(tmp_path / "whole", ["vbench"])
    with pytest.raises(UserError, match="its prompt is for none of the dimensions of 'vbench-quality'"):
        evaluate(run, ["vbench-quality"], partial=True)
    summary = note(run, "vbench-quality")["summary"]
    assert len(summary["dimensions"]) == 7 and summary["totals"] is None and "9 of its 16 dimensions are missing" in summary["why"]


def test_without_the_static_filter_there_is_no_flicker_of_what_it_would_have_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_LACKS", "static")
    run = made(tmp_path / "run", suites.load_suite("vbench"))
    with pytest.raises(UserError, match=r"25 of 80 clips, first 0001-0 .*: its prompt is for none of the dimensions of 'vbench' that can run here"):
        evaluate(run, ["vbench"], partial=True)
    assert "temporal_flickering" not in note(run)["summary"]["dimensions"]


def test_the_doctor_tells_dimension_by_dimension_what_mends_it(monkeypatch):
    monkeypatch.setenv("FAKE_LACKS", "color")
    told = {check.name: check for check in doctor._vbench()}
    assert set(told) == {f"vbench {name}" for name in (*T2V.dimensions, "static")}
    assert [(name, check.found, check.fix) for name, check in told.items() if check.state != "ok"] == [
        ("vbench color", "not on this machine: it.pth", "curl it.pth")
    ]


def test_prompts_of_ones_own_have_the_dimensions_that_need_no_more_and_no_total(tmp_path):
    run = made(tmp_path / "run", suites.load_suite("smoke"))
    evaluate(run, ["vbench"])
    summary = note(run)["summary"]
    assert set(summary["dimensions"]) == set(CUSTOM) and summary["totals"] is None and "7 of its 16 dimensions are missing" in summary["why"]


def test_an_unfinished_run_says_partial_on_every_number(tmp_path):
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing"), status=records.FAILED)
    clips = records.read_clips(run)
    records.write_rows(run / "clips.jsonl", [clip for clip in clips if clip.sample < 3])
    with pytest.raises(UserError, match="is not finished"):
        evaluate(run, ["vbench"])
    evaluate(run, ["vbench"], partial=True)
    summary = note(run)["summary"]
    assert all(found["partial"] and found["asked"] in (3, 6) for found in summary["dimensions"].values()) and summary["totals"]["partial"]


def test_prompts_that_are_not_vbenchs_are_refused(tmp_path):
    suite = suites.load_suite("vbench-forcing")
    changed = dataclasses.replace(suite, prompts=(dataclasses.replace(suite.prompts[0], text="a cat"), *suite.prompts[1:]))
    with pytest.raises(UserError, match="prompt 0 is not that of VBench's list"):
        evaluate(made(tmp_path / "run", changed), ["vbench"])


def test_a_worker_that_does_not_work_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "MODULE", "tests.there_is_no_such_module")
    run = made(tmp_path / "run", suites.load_suite("smoke"))
    with pytest.raises(UserError, match=r"the environment 'vbench' does not work \(.*No module named tests.there_is_no_such_module\)"):
        evaluate(run, ["vbench"])
    assert os.environ.get("FAKE_LACKS") is None


# VBench-Long


def test_a_long_video_is_the_mean_of_its_clips_and_its_drift_is_over_them(tmp_path):
    run = made(tmp_path / "run", suites.load_suite("smoke"), frames=lambda clip: 100)
    evaluate(run, ["vbench-long"])
    mine = [json.loads(line) for line in lines(run / "scores" / "vbench-long" / "rows.jsonl")]
    told = {(s.clip, s.metric): s.value for s in records.read_rows(run / "scores" / "vbench-long.jsonl", records.Score)}
    for clip in records.read_clips(run):
        parts = {(r["begin"], r["end"]): 100 * r["value"] for r in mine if (r["sha256"], r["dimension"]) == (clip.sha256, "imaging_quality")}
        assert set(parts) == {(0, 32), (32, 64), (64, 96), (68, 100)}
        assert told[clip.id, "imaging_quality"] == pytest.approx(statistics.mean(parts.values()))
        assert told[clip.id, "drift"] == pytest.approx(statistics.stdev(parts.values()))
        whole = [r for r in mine if (r["sha256"], r["dimension"], r["begin"]) == (clip.sha256, "dynamic_degree", None)]
        assert told[clip.id, "dynamic_degree_whole"] == pytest.approx(100 * whole[0]["value"]) and len(whole) == 1
    found = note(run, "vbench-long")["summary"]["dimensions"]["subject_consistency"]
    assert found["value"] == pytest.approx(statistics.mean(told[clip.id, "subject_consistency"] for clip in records.read_clips(run)))
    assert found["clips"] == found["asked"] == 2


def test_drift_of_any_long_video_needs_two_networks_alone(tmp_path, monkeypatch):
    """The toy world's drift refuses such clips and says whose it is."""
    monkeypatch.setenv("FAKE_LACKS", "scene")
    (tmp_path / "mine.jsonl").write_text('{"text": "Petra at dawn"}')
    run = made(tmp_path / "run", suites.load_suite(str(tmp_path / "mine.jsonl")), frames=lambda clip: 100)
    evaluate(run, ["vbench-drift"])
    told = {s.metric: s.value for s in records.read_rows(run / "scores" / "vbench-drift.jsonl", records.Score)}
    assert set(told) == {"imaging_quality", "drift", "dynamic_degree", "dynamic_degree_whole"} == set(scorer.DRIFT_ALONE.metrics)
    mine = [json.loads(line) for line in lines(run / "scores" / "vbench-drift" / "rows.jsonl")]
    assert told["drift"] == pytest.approx(statistics.stdev(100 * row["value"] for row in mine if row["dimension"] == "imaging_quality"))
    with pytest.raises(UserError, match=r"is not of the toy world: .*; -s vbench-drift is for any video"):
        evaluate(run, ["drift"])


def test_between_clips_the_first_frames_are_compared(tmp_path):
    """Their consistency is a metric of its own, and stands beside that within clips; a video of one clip has none."""
    run = made(tmp_path / "run", suites.load_suite("smoke"), frames=lambda clip: 100 if clip.prompt_id == 0 else 32)
    evaluate(run, ["vbench-long"])
    asked = [item for item in json.loads((run / "scores" / "vbench-long" / "job.json").read_text())["items"] if "at" in item]
    assert [(item["dimension"], item["at"]) for item in asked] == [
        ("subject_consistency", [0, 32, 64, 68]),
        ("background_consistency", [0, 32, 64, 68]),
    ]
    mine = [json.loads(line) for line in lines(run / "scores" / "vbench-long" / "rows.jsonl")]
    told = {(s.clip, s.metric): s.value for s in records.read_rows(run / "scores" / "vbench-long.jsonl", records.Score)}
    for name, of in BETWEEN.items():
        (row,) = (row for row in mine if row["dimension"] == name)
        assert row["weight"] == 3 and told["0000-0", name] == pytest.approx(100 * row["value"]) and ("0001-0", name) not in told
        within = [told["0000-0", of] / 100, told["0001-0", of] / 100]
        found = note(run, "vbench-long")["summary"]["dimensions"][of]
        assert found["value"] == found["within"] == pytest.approx(100 * statistics.mean(within))
        assert found["between"] == pytest.approx(100 * row["value"])
        assert found["fused"] == pytest.approx(100 * statistics.mean([long.fused(within[0], row["value"], of), within[1]]))


def written(parts, target, fps):
    """Texts stand for videos here."""
    records.write_text(target, f"first of {[part.stem for part in parts]}")
    return target


def test_with_compat_the_longest_dimension_cuts_clips_are_files_and_consistency_is_fused(tmp_path, monkeypatch):
    monkeypatch.setattr(long, "write_part", lambda source, target, *part: records.write_text(target, source.read_text()))
    monkeypatch.setattr(long, "write_first_frames", written)
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing", limit=8), frames=lambda clip: 320)
    evaluate(run, ["vbench-long-compat"])
    mine = [json.loads(line) for line in lines(run / "scores" / "vbench-long-compat" / "rows.jsonl")]
    clips = {clip.sha256: clip for clip in records.read_clips(run)}
    lengths: dict[tuple[int, str], set[int]] = {}
    for row in mine:
        if row["begin"] is not None:
            lengths.setdefault((clips[row["sha256"]].prompt_id, row["dimension"]), set()).add(row["end"] - row["begin"])
    assert lengths[0, "subject_consistency"] == {32} and lengths[7, "human_action"] == {160}
    assert lengths[5, "imaging_quality"] == {160}, "beside overall consistency, it is cut into 10 s"
    assert lengths[3, "appearance_style"] == {160}, "its text is there for overall consistency too"
    assert all("/reencoded" in row["version"] for row in mine)
    job = json.loads((run / "scores" / "vbench-long-compat" / "job.json").read_text())
    assert job["driver"] == "official" and not any("begin" in item or "at" in item for item in job["items"]), (
        "whole files, for vbench's own functions"
    )
    assert not (run / "scores" / "vbench-long-compat" / "clips").exists()
    told = [s.value for s in records.read_rows(run / "scores" / "vbench-long-compat.jsonl", records.Score) if s.metric == "subject_consistency"]
    found = note(run, "vbench-long-compat")["summary"]["dimensions"]["subject_consistency"]
    assert found["value"] == found["fused"] != found["within"] and found["value"] == pytest.approx(statistics.mean(told))


def test_what_a_killed_scorer_has_cut_is_not_taken_for_another_video(tmp_path):
    """The clip was damaged and made again since: its parts are those of the new bytes."""
    parts = []
    for shade in (0, 200):
        clip = dataclasses.replace(vbench_suite.clip(0, 0, "a bird"), fps=16, sha256=f"{shade:03d}" + 61 * "0")
        with video.writing(tmp_path / "0000-0.mp4", fps=16, height=64, width=64) as write:
            write(np.full((40, 64, 64, 3), shade, np.uint8))
        parts.append(scorer.LONG_COMPAT._part(clip, tmp_path / "0000-0.mp4", 0, 32, tmp_path).read_bytes())
    assert parts[0] != parts[1]


def test_flicker_of_long_videos_is_that_of_the_first_five_static_clips_of_a_prompt(tmp_path):
    run = made(tmp_path / "run", suites.load_suite("vbench"), lambda clip: f"{clip.id} static moving32 ", frames=lambda clip: 64)
    evaluate(run, ["vbench-long"])
    mine = [json.loads(line) for line in lines(run / "scores" / "vbench-long" / "rows.jsonl")]
    shas = {clip.sample: clip.sha256 for clip in records.read_clips(run) if clip.prompt_id == 1}
    first = [r["value"] for i in (0, 1, 10, 11, 12) for r in mine if (r["sha256"], r["dimension"], r["begin"]) == (shas[i], "temporal_flickering", 0)]
    found = note(run, "vbench-long")["summary"]["dimensions"]["temporal_flickering"]
    assert found["value"] == pytest.approx(100 * statistics.mean(first)) and (found["clips"], found["asked"]) == (5, 25)


def test_a_clip_written_to_a_file_has_its_frames_nearly(tmp_path):
    import av

    ramp = np.stack([np.full((64, 64, 3), 5 * t, np.uint8) for t in range(40)])
    with video.writing(tmp_path / "whole.mp4", fps=16, height=64, width=64) as write:
        write(ramp)
    long.write_part(tmp_path / "whole.mp4", tmp_path / "clips" / "part.mp4", 8, 40, 16)
    with av.open(str(tmp_path / "clips" / "part.mp4")) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
        assert stored != sorted(stored), "frames lie in the file in another order than they are shown"
    check_pace(vbench_suite.clip(0, 0, "a bird"), tmp_path / "clips" / "part.mp4")
    with av.open(str(tmp_path / "clips" / "part.mp4")) as container:
        assert container.streams.video[0].average_rate == 16
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (32, 64, 64, 3) and np.abs(frames.astype(int) - ramp[8:]).mean() < 3
    long.write_part(tmp_path / "whole.mp4", tmp_path / "clips" / "rest.mp4", 30, 40, 16)
    first = long.write_first_frames([tmp_path / "clips" / "part.mp4", tmp_path / "clips" / "rest.mp4"], tmp_path / "first.mp4", 16)
    with av.open(str(first)) as container:
        assert [round(frame.to_ndarray(format="rgb24").mean() / 5) for frame in container.decode(video=0)] == [8, 30]


# As VBench itself


def test_compat_is_vbenchs_own_functions_and_counts_what_is_missing_as_0(tmp_path, monkeypatch):
    """Beside the refusal, under a name of its own: no table has it."""
    run = made(tmp_path / "run", suites.load_suite("vbench"), lambda clip: f"{clip.id} moving")
    evaluate(run, ["vbench", "vbench-compat"])
    assert json.loads((run / "scores" / "vbench-compat" / "job.json").read_text())["driver"] == "official"
    ours, theirs = note(run)["summary"], note(run, "vbench-compat")["summary"]
    assert ours["dimensions"] == theirs["dimensions"] and ours["totals"] is theirs["totals"] is None and "as_released" not in ours
    known = {name: one["value"] for name, one in ours["dimensions"].items() if one["value"] is not None}
    assert theirs["as_released"] == totals.total(known | {"temporal_flickering": 0.0}) | {"missing_as_0": ["temporal_flickering"]}
    assert note(run, "vbench-compat")["whole"] == {}
