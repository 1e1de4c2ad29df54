"""Baselines that another interpreter runs: the same ids, seeds, rows and resumption as native ones, whatever a runner does."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml

from rfbench import config, envs, external, generate, listing, provenance, records, strict, suites, video
from rfbench.config import Baseline, External
from rfbench.errors import UserError
from rfbench.fetch import fetch
from rfbench.items import items_of
from rfbench.report import leaderboard, tables
from rfbench.suites import Suite, clip_seed
from tests import fake_runs
from tests.test_cli import call

FAKE = """
import os, time
import numpy as np

def load(settings):
    scale = float(open(settings["weights"]).read())
    def run(item):
        rng = np.random.default_rng(item["seed"])
        shape = [item["frames"], settings["height"], settings["width"], 3]
        broken = os.path.exists(settings["broken"])
        word = item["prompt"].split()[-1] if broken else "fine"
        if word == "dies":
            os._exit(1)
        if word == "stuck":
            time.sleep(600)
        if word == "short":
            shape[0] -= 1
        if word == "narrow":
            shape[2] -= 16
        frames = (rng.random(shape) * scale).astype(np.float32 if word == "float" else np.uint8)
        if word != "nothing":
            np.save(item["out"], frames)
        stamps = [[0.5 + 0.25 * i, 2] for i in range(4)] + [[1.5, item["frames"] - 8 - (word == "lost")]]
        return "a word" if word == "row" else {"stamps": stamps, "peak_bytes": None}
    return run
"""
WORDS = ["fine", "dies", "stuck", "short", "narrow", "float", "nothing", "lost", "row", "good"]


def interpreter(name: str, path: str = "") -> None:
    """An environment that is this interpreter, seeing `path` and not what PYTHONPATH names."""
    python = envs.home(name) / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nshift\nexec env PYTHONPATH="{path}" {sys.executable} -s "$@"\n')
    python.chmod(0o755)
    _, definition = envs.load(name)
    built = envs.Built(definition, (), "3.11.0", {}, provenance.now(), 1.0)
    records.write_json(envs.home(name) / envs.MARKER, built)


@pytest.fixture
def fake(folders, tmp_path, monkeypatch):
    """A baseline file `fake.yaml` whose runner makes noise of the clip's seed, or goes wrong as the prompt's last word says."""
    (tmp_path / "runners").mkdir()
    (tmp_path / "runners" / "fake.py").write_text(FAKE)
    monkeypatch.setattr(external, "RUNNERS", tmp_path / "runners")
    interpreter("diffusers")
    (tmp_path / "scale.pt").write_text("255")
    told = {
        **{"title": "Fake", "env": "diffusers", "runner": "fake", "weights": {"file": "scale.pt"}, "license": {"code": "mit", "weights": "mit"}},
        **{"height": 16, "width": 32, "fps": 12, "frames": 9, "steps": [3], "longer": 4, "most": 121, "suffix": ", 8K"},
        **{"settings": {"broken": str(tmp_path / "broken")}, "clip_s": 5.0},
    }
    (tmp_path / "fake.yaml").write_text(yaml.safe_dump(told))
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": f"a video that is {word}"}) + "\n" for word in WORDS))
    (tmp_path / "four.jsonl").write_text("".join(json.dumps({"text": f"a disc number {i}"}) + "\n" for i in range(4)))
    return tmp_path


def make(fake: Path, suite: str = "four.jsonl", **how) -> Path:
    return generate.generate(str(fake / "fake.yaml"), str(fake / suite), **how)


def test_clips_rows_and_times_are_as_of_any_baseline(fake):
    directory = make(fake)
    run, clips = records.read_run(directory), records.read_clips(directory)
    assert run.status == records.DONE and [clip.id for clip in clips] == ["0000-0", "0001-0", "0002-0", "0003-0"]
    for clip in clips:
        assert (clip.frames, clip.fps, clip.height, clip.width) == (9, 12, 16, 32) and clip.seed == clip_seed(0, clip.prompt_id, 0)
        frames, fps = video.read(directory / clip.file)
        assert frames.shape == (9, 16, 32, 3) and fps == 12 and records.sha256_of(directory / clip.file) == clip.sha256
    assert len({clip.sha256 for clip in clips}) == 4, "another seed, another clip"
    assert run.result["times"] == {"timed": "frames as they come", "clip_fps": 6.0, "ttff_s": 0.5, "e2e_fps": 6.0, "hardware": "cpu"}
    assert run.inputs["weights_sha256"] == records.sha256_of(fake / "scale.pt") and run.inputs["environment"] == envs.load("diffusers")[1]
    assert run.recorded["protocol"] == "own protocol: 32x16, 9 frames at 12 per second, 3 steps; its code appends ', 8K' to every prompt"
    assert not list(directory.rglob("*.npy")), "raw frames go once they are a video"
    before = (directory / "clips.jsonl").stat().st_mtime_ns
    assert make(fake) == directory and (directory / "clips.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("pinned", [False, True])
def test_its_speed_is_in_the_table_with_what_counted_and_unpinned_weights_keep_it_open(fake, pinned):
    if pinned:
        told = yaml.safe_load((fake / "fake.yaml").read_text())
        told["weights"]["sha256"] = records.sha256_of(fake / "scale.pt")
        (fake / "fake.yaml").write_text(yaml.safe_dump(told))
    (fake / "long.yaml").write_text("{prompts: four.jsonl, frames: 161, first: 1}")
    directories = make(fake), make(fake, "long.yaml")
    fake_runs.write_scores(directories[0])
    board = leaderboard.read_runs(directories)
    cell, scored = board.cells["fake", "cpu", "profile.clip_fps"], board.cells["fake", "four", board.columns["four"][0]]
    assert (cell.value, cell.repeats) == (6.0, 1), "of clips of its own length alone"
    assert board.cells["fake", "cpu", "profile.ttff_s"].value == 0.5 and board.hardware == ("cpu",) and not board.timings
    assert "timed as it made its own clips: frames as they come" in cell.open
    assert ("weights whose hash is not declared" in scored.open) == (not pinned)
    text = tables.to_markdown(board, [], "", [])
    assert "## Speed on cpu" in text and "6.0" in text and "timed as it made its own clips: frames as they come" in text


def test_speed_is_what_a_profile_would_call_it():
    """A pace needs chunks past those in which a window fills; one clip that was timed as a whole leaves only whole clips."""
    stamps = ((0.5, 1), (1.5, 4), (2.0, 2), (2.5, 1), (4.0, 1))
    rows = [external.ClipTime(name, 9, 4.0, stamps, None) for name in "ab"]
    assert external.summary(rows) == {"timed": "frames as they come", "clip_fps": 9 / 4.0, "ttff_s": 0.5, "e2e_fps": 2 / 2.0}
    short = [external.ClipTime("a", 9, 2.0, ((0.5, 4), (2.0, 5)), 7)]
    assert external.summary(short) == {"timed": "frames as they come", "clip_fps": 4.5, "ttff_s": 0.5, "peak_memory_bytes": 7}
    assert external.summary([external.ClipTime("c", 9, 2.0, ((2.0, 9),), None), *rows]) == {"timed": "whole clips", "clip_fps": 9 / 4.0}


def test_a_sample_is_a_clip_of_the_seed_that_was_given(fake, tmp_path, capsys):
    made = []
    for number, seed in enumerate(("3", "3", "4")):
        out = tmp_path / f"{number}.mp4"
        assert call(capsys, "sample", str(fake / "fake.yaml"), "a disc", "--seed", seed, "--out", str(out))[0] == 0
        made.append(out.read_bytes())
    assert made[0] == made[1] != made[2] and video.read(tmp_path / "0.mp4")[0].shape == (9, 16, 32, 3)
    for arguments, sentence in (
        (("--then", "1=a square"), "makes a clip of one prompt alone; leave it out"),
        (("--out", "x.gif"), "clips of 'fake' are .mp4 files"),
        (("--frames", "2000"), "makes clips of at most 121 frames"),
    ):
        code, _, err = call(capsys, "sample", str(fake / "fake.yaml"), "a disc", *arguments)
        assert code == 2 and sentence in err
    (fake / "broken").touch()
    code, _, err = call(capsys, "sample", str(fake / "fake.yaml"), "a video that is short", "--out", str(tmp_path / "no.mp4"))
    assert code == 1 and "the clip failed: the runner made frames (8, 16, 32, 3)" in err and not (tmp_path / "no.mp4").exists()
    assert "0000-0" not in err, "a sample is no clip of a suite"


@pytest.mark.parametrize("options", [(), ("--ladder",), ("--streams",)])
def test_what_its_authors_run_is_timed_with_its_clips(options, capsys):
    code, _, err = call(capsys, "profile", "nova", *options)
    assert code == 2 and "timed while it makes clips: `rfbench generate nova --suite smoke --json`" in err


def test_shards_make_the_same_clips(fake):
    alone = {clip.id: clip.sha256 for clip in records.read_clips(make(fake, name="alone"))}
    for part in ("1/2", "2/2"):
        directory = make(fake, name="shared", shard=part)
    assert {clip.id: clip.sha256 for clip in records.read_clips(directory)} == alone
    assert records.read_run(directory).status == records.DONE and len(external.times(directory)) == 4


def test_what_fails_is_told_and_tried_again_and_the_rest_is_made(fake):
    (fake / "broken").touch()
    told = r"^8 of 10 clips failed \(first 0001-0: the worker ended with exit code 1\); their logs are in .*failed\.alone\.jsonl; run the command"
    with pytest.raises(UserError, match=told) as raised:
        make(fake, "words.jsonl")
    assert raised.value.code == 1
    directory = Path(str(raised.value).partition(" are in ")[2].partition("/failed.alone")[0])
    assert records.read_run(directory).status == records.FAILED
    assert [clip.id for clip in records.read_clips(directory)] == ["0000-0", "0009-0"]
    reasons = {row.clip: row.error for row in external.failures(directory)}
    expected = {
        **{"0001-0": "ended with exit code 1", "0002-0": "took longer than the 5 s", "0003-0": "(8, 16, 32, 3) of uint8, not (9, 16, 32, 3)"},
        **{"0004-0": "(9, 16, 16, 3) of uint8, not (9, 16, 32, 3)", "0005-0": "of float32", "0006-0": "left no frames"},
        **{"0007-0": "stamped 8 frames of 9", "0008-0": "the runner's row is not one: a word"},
    }
    assert reasons.keys() == expected.keys() and all(expected[clip] in reasons[clip] for clip in expected)
    kept = {clip.id: clip.sha256 for clip in records.read_clips(directory)}
    (fake / "broken").unlink()
    assert make(fake, "words.jsonl") == directory
    clips = {clip.id: clip.sha256 for clip in records.read_clips(directory)}
    assert records.read_run(directory).status == records.DONE and len(clips) == 10 and not external.failures(directory)
    assert kept.items() <= clips.items() and (directory / "failed.alone.jsonl").read_text() == ""


def test_those_that_failed_come_last_when_they_are_tried_again(fake, capsys):
    """So that clips which end one worker after another keep nobody from his turn; who was not tried again keeps his reason."""
    (fake / "four.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a dies", "b dies", "c dies", "d dies", "e good")))
    (fake / "broken").touch()
    with pytest.raises(UserError, match=r"fake\.py failed 3 times in a row \(the worker ended with exit code 1\), so that 2 of 5 were not tried"):
        make(fake)
    assert "clip 0002-0 failed: the worker ended with exit code 1" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^4 of 5 clips failed") as raised:
        make(fake)
    assert "clips that failed before and come last: 3" in capsys.readouterr().err
    directory = Path(str(raised.value).partition(" are in ")[2].partition("/failed.alone")[0])
    assert [clip.id for clip in records.read_clips(directory)] == ["0004-0"]
    with pytest.raises(UserError, match="failed 3 times in a row"):
        make(fake)
    assert sorted(row.clip for row in external.failures(directory)) == [f"000{number}-0" for number in range(4)]


@pytest.mark.parametrize(("frames", "fps", "made"), [(81, 16, 9), (5, 16, 9), (97, 16, 73), (160, 16, 121), (161, 16, 121)])
def test_a_short_suite_gets_the_systems_own_length_and_a_long_one_what_it_asks_for(fake, frames, fps, made):
    cfg: External = strict.build(External, yaml.safe_load((fake / "fake.yaml").read_text()), where="fake")
    found = external.frames_of(cfg, Suite("s", frames, fps, 0, 1, ()), "fake")
    assert found == made and (found - cfg.frames) % 4 == 0
    assert frames <= 81 or (found - 1) / cfg.fps >= (frames - 1) / fps
    with pytest.raises(UserError, match="baseline 'fake' makes clips of at most 121 frames, but suite 'long' asks for 481"):
        external.frames_of(cfg, Suite("long", 481, 12, 0, 1, ()), "fake")
    with pytest.raises(UserError, match="at most 9 frames"):
        external.frames_of(dataclasses.replace(cfg, longer=None, most=None), Suite("long", 481, 12, 0, 1, ()), "fake")


def test_what_a_runner_cannot_load_is_one_sentence(fake, capsys):
    (fake / "scale.pt").write_text("not a number")
    code, out, err = call(capsys, "generate", str(fake / "fake.yaml"), "--suite", str(fake / "four.jsonl"))
    assert (code, out) == (1, "") and "fake.py does not start: it ended with exit code 3 (ValueError: could not convert string to float" in err
    code, _, err = call(capsys, "generate", str(fake / "fake.yaml"), "--random-weights")
    assert code == 2 and "--random-weights" in err


@pytest.mark.parametrize("name", config.names_of(External))
def test_a_shipped_baseline_is_whole(name, capsys):
    cfg = config.load(External, name)
    assert (external.RUNNERS / f"{cfg.runner}.py").is_file() and envs.load(cfg.env) and cfg.width % 2 == cfg.height % 2 == 0
    assert external.frames_of(cfg, suites.load_suite("toy-short"), name) == cfg.frames
    assert config.is_external(name) and config.is_external(name.removeprefix("external/")) and name not in config.names_of(Baseline)
    assert {item.repo for item in items_of(cfg)} == {cfg.weights.repo, *(part.repo for part in cfg.parts.values())}
    code, _, err = call(capsys, "generate", name, "--dry-run")
    assert code == 2 and f"run `rfbench env {cfg.env}`" in err, "the first thing that is missing, and its remedy"


def test_a_folder_is_fetched_whole_and_missed_when_it_is_not(folders, tmp_path, capsys):
    cfg = config.load(External, "external/nova")
    mirror = tmp_path / "mirror" / str(cfg.weights.repo)
    for file in ("model_index.json", "vae/a.safetensors", "text_encoder/deep/b.bin"):
        (mirror / file).parent.mkdir(parents=True, exist_ok=True)
        (mirror / file).write_text(file)
    interpreter("nova")
    assert "fetch" in call(capsys, "generate", "nova", "--dry-run")[2]
    fetch(items_of(cfg), mirror=tmp_path / "mirror", yes=True)
    ready = external.prepare("nova")
    assert ready.program.settings["weights"] == str(folders / "weights" / str(cfg.weights.repo)) and len(ready.sha256["weights"]) == 64
    assert call(capsys, "generate", "nova", "--suite", "smoke", "--dry-run")[0] == 0
    (folders / "weights" / str(cfg.weights.repo) / "vae/a.safetensors").unlink()
    code, _, err = call(capsys, "generate", "nova", "--dry-run")
    assert code == 2 and "lacks 1 of its 3 files, first 'vae/a.safetensors'; fetch it again" in err
    fetch(items_of(cfg), mirror=tmp_path / "mirror", yes=True)
    assert external.prepare("nova").sha256 == ready.sha256


def test_it_is_listed_beside_the_others():
    rows = {row["name"]: row for row in listing.baselines()}
    assert rows["external/nova"]["backbone"] == "its authors' code, in nova" and rows["external/nova"]["licence"] == "apache-2.0"
