"""Videos that were made elsewhere: matched by name letter by letter, scored like any other, and marked wherever they are shown."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from rfbench import importing, records
from rfbench.errors import UserError
from rfbench.report import evidence, leaderboard
from rfbench.suites import load_suite
from tests import fake_runs
from tests.fake_runs import write_video

PROMPTS = ["a red disc moves left", "A blue square", "a café with a green disc moves up", "a cyan disc, quickly"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RFBENCH_TOML", raising=False)
    (tmp_path / "rfbench.toml").write_text('[paths]\nruns = "runs"\nreports = "reports"\n')
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    made = tmp_path / "videos"
    made.mkdir()
    for number, text in enumerate(PROMPTS):
        write_video(made / f"{text}-0.mp4", np.full((9 + number, 48, 64, 3), 40 * number, np.uint8))
    return made


def test_a_folder_becomes_a_run_that_is_scored_and_marked(folder: Path) -> None:
    directory = importing.import_videos(folder, "colleague", "own.jsonl")
    run, clips = records.read_run(directory), records.read_clips(directory)
    assert (run.verb, run.name, run.status) == ("generate", "colleague/own", "done")
    assert run.inputs["weights_sha256"] == run.recorded["weights"] == "imported"
    assert [(clip.prompt, clip.frames, clip.fps, clip.width, clip.height) for clip in clips] == [
        (text, 9 + i, 16, 64, 48) for i, text in enumerate(PROMPTS)
    ]
    assert [(directory / clip.file).read_bytes() for clip in clips] == [(folder / f"{text}-0.mp4").read_bytes() for text in PROMPTS]
    assert importing.import_videos(folder, "colleague", "own.jsonl") == directory  # the same again is done
    fake_runs.write_scores(directory)
    cell = leaderboard.read_runs([directory]).cells["colleague", "own", "drift.imaging_quality"]
    assert "videos made elsewhere" in cell.open and cell.clips == 4
    (folder / f"{PROMPTS[0]}-0.mp4").write_bytes((folder / f"{PROMPTS[1]}-0.mp4").read_bytes())
    with pytest.raises(UserError, match="other inputs"):
        importing.import_videos(folder, "colleague", "own.jsonl")
    assert evidence.read_bench(directory).weights_sha256 == "imported"


def test_a_shipped_baseline_lends_its_marks(folder: Path) -> None:
    directory = importing.import_videos(folder, "wan/reward-forcing", "own.jsonl")
    assert directory.parts[-3:] == ("wan", "reward-forcing", "own")
    assert evidence.read_bench(directory).baseline.saw


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("A blue square-0.mp4", "a blue square-0.mp4", "differs in upper and lower case"),
        (f"{PROMPTS[2]}-0.mp4", unicodedata.normalize("NFD", f"{PROMPTS[2]}-0.mp4"), "its accents are decomposed (Unicode NFD)"),
        (f"{PROMPTS[2]}-0.mp4", f"{PROMPTS[2][:20]}-0.mp4", "it is cut off after 20 of 33 characters"),
        (f"{PROMPTS[3]}-0.mp4", "a cyan disc_ quickly-0.mp4", "differs in punctuation or spaces"),
        (f"{PROMPTS[3]}-0.mp4", f"{PROMPTS[3]}-1.mp4", "is missing; did you mean 'a cyan disc, quickly-1.mp4'?"),
        (f"{PROMPTS[3]}-0.mp4", "notes.txt", "'notes.txt' is no video of this suite"),
    ],
)
def test_what_nearly_fits_is_told_and_never_taken(old: str, new: str, sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename(folder / old, folder / new)
    with pytest.raises(UserError, match="do not fit suite 'own'"):
        importing.import_videos(folder, "colleague", "own.jsonl")
    assert sentence in capsys.readouterr().err
    assert not (folder.parent / "runs").exists()


def test_two_files_for_one_prompt_are_both_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (folder / "A blue square-0.mp4").read_bytes()
    (folder / "A blue square-0.mp4").unlink()
    for name in ("a blue square-0.mp4", "A BLUE SQUARE-0.mp4"):
        (folder / name).write_bytes(content)
    with pytest.raises(UserError):
        importing.matched(folder, load_suite("own.jsonl"))
    told = capsys.readouterr().err
    assert "several files nearly fit" in told and "'a blue square-0.mp4'" in told and "'A BLUE SQUARE-0.mp4'" in told


def test_what_is_no_video_stops_it(folder: Path) -> None:
    (folder / "A blue square-0.mp4").write_bytes(b"not a video")
    with pytest.raises(UserError, match="not a video that can be decoded") as caught:
        importing.import_videos(folder, "colleague", "own.jsonl")
    assert caught.value.code == 1
    assert records.read_run(folder.parent / "runs/bench/colleague/own").status == "failed"
