"""Scores against the scorer's own words, never a run that is not whole, never rows that are not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from rfbench import evaluate, records
from rfbench.errors import UserError
from rfbench.records import Clip, Score
from rfbench.report import evidence
from rfbench.scorers import base
from rfbench.scorers.base import Metric
from tests import fake_runs

PROMPTS = ["a red disc moves right", "a blue square"]
CLIPS = ["0000-0", "0000-1", "0001-0", "0001-1"]


class Spoken:
    """A scorer that says what a test puts into its mouth, and how often it was asked."""

    name, metrics = "spoken", {"speed": Metric(True, "px", "A number."), "parts": Metric(False, "", "A number per segment.")}

    def __init__(self) -> None:
        self.version, self.asked = "1", 0
        self.rows: list[Score] | None = None

    def score(self, clips: list[Clip], out: Path) -> Iterator[Score]:
        self.asked += 1
        if self.rows is not None:
            yield from self.rows
            return
        for clip in clips:
            yield Score(clip.id, "speed", clip.prompt_id + 0.5)
            yield from (Score(clip.id, "parts", float(part), segment=part) for part in range(3))


SPOKEN = Spoken()


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> Spoken:
    monkeypatch.setitem(base.SCORERS, "spoken", "tests.test_evaluate:SPOKEN")
    SPOKEN.__init__()  # type: ignore[misc]
    return SPOKEN


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fake_runs.write_bench(tmp_path, "student", "short", PROMPTS)


def note_of(run: Path, scorer: str = "spoken") -> dict[str, object]:
    return json.loads((run / "scores" / f"{scorer}.json").read_text(encoding="utf-8"))


def test_rows_are_the_scorers_own_and_the_report_reads_them(run):
    from rfbench.scorers.motion import SCORER

    assert evaluate.evaluate(run, ["motion"]) == run / "scores"
    clips = records.read_rows(run / "clips.jsonl", Clip)
    assert records.read_rows(run / "scores" / "motion.jsonl", Score) == list(SCORER.score(clips, run))
    note = note_of(run, "motion")
    assert (note["scorer"], note["version"], note["clips"], note["partial"]) == ("motion", SCORER.version, 4, False)
    assert note["fingerprint"] == records.read_run(run).fingerprint
    scores = evidence.read_scores(evidence.read_bench(run), "motion")
    assert scores.values["motion.speed"].keys() == set(CLIPS)
    assert scores.metrics["motion.speed"] == SCORER.metrics["speed"]


def test_every_scorer_that_needs_no_weights_runs_when_none_is_named(run):
    evaluate.evaluate(run)
    assert {path.stem for path in (run / "scores").glob("*.json")} == set(base.LIGHT)


def test_what_is_scored_already_is_not_scored_again(run, spoken):
    evaluate.evaluate(run, ["spoken"])
    before = {path: path.read_bytes() for path in (run / "scores").iterdir()}
    evaluate.evaluate(run, ["spoken"])
    assert spoken.asked == 1
    assert {path: path.read_bytes() for path in (run / "scores").iterdir()} == before
    evaluate.evaluate(run, ["spoken"], fresh=True)
    assert spoken.asked == 2
    spoken.version = "2"
    evaluate.evaluate(run, ["spoken"])
    assert spoken.asked == 3
    assert note_of(run)["version"] == "2"


@pytest.mark.parametrize("damage", ["rows", "note", "clips", "torn"])
def test_scores_that_do_not_belong_to_the_clips_are_made_again(run, spoken, damage):
    evaluate.evaluate(run, ["spoken"])
    wanted = (run / "scores" / "spoken.jsonl").read_bytes()
    match damage:
        case "rows":
            (run / "scores" / "spoken.jsonl").write_bytes(wanted.replace(b"0.5", b"0.7"))
        case "torn":
            (run / "scores" / "spoken.jsonl").write_bytes(wanted[:-5])
        case "note":  # killed between the rows and the note
            (run / "scores" / "spoken.json").unlink()
        case "clips":
            rows = records.read_rows(run / "clips.jsonl", Clip)
            records.write_rows(run / "clips.jsonl", [*rows[:-1], Clip(**{**vars(rows[-1]), "sha256": "0" * 64})])
    evaluate.evaluate(run, ["spoken"])
    assert spoken.asked == 2
    assert (run / "scores" / "spoken.jsonl").read_bytes() == wanted


def test_an_unfinished_run_is_scored_only_as_such(tmp_path, spoken):
    run = fake_runs.write_bench(tmp_path, "student", "short", PROMPTS, status=records.RUNNING)
    rows = records.read_rows(run / "clips.jsonl", Clip)
    records.write_rows(run / "clips.jsonl", rows[:3])
    with pytest.raises(UserError, match=r"is not finished: 3 clips are there; .* --partial"):
        evaluate.evaluate(run, ["spoken"])
    assert not (run / "scores").exists()
    evaluate.evaluate(run, ["spoken"], partial=True)
    assert (note_of(run)["partial"], note_of(run)["clips"]) == (True, 3)
    # The same clips of a run that says that it is done are not the same answer: the mark goes.
    records.write_rows(run / "clips.jsonl", rows)
    records.write_run(run, records.Run(**{**vars(records.read_run(run)), "status": records.DONE}))
    evaluate.evaluate(run, ["spoken"], partial=True)
    assert (note_of(run)["partial"], note_of(run)["clips"]) == (False, 4)


def whole() -> list[Score]:
    return [Score(clip, "speed", 1.0) for clip in CLIPS]


def parts(clips: list[str], counts: list[int]) -> list[Score]:
    return [Score(clip, "parts", 1.0, segment=part) for clip, count in zip(clips, counts, strict=True) for part in range(count)]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([*whole()[:3], Score("0001-1", "speed", math.nan)], "found nan for 'speed' of clip 0001-1"),
        ([*whole()[:3], Score("0001-1", "speed", math.inf)], "found inf for 'speed' of clip 0001-1"),
        (whole()[:3], "has no 'speed' for clip 0001-1, but for another clip of the same prompt"),
        (whole()[:2], "said nothing about clip 0001-0"),
        ([], "said nothing about clip 0000-0"),
        ([*whole(), Score("0000-0", "speed", 2.0)], "gave 'speed' of clip 0000-0 twice"),
        ([*whole(), Score("0000-0", "beauty", 2.0)], "gave 'beauty' of clip 0000-0, which it was not asked for or did not declare"),
        ([*whole(), Score("0007-0", "speed", 2.0)], "gave 'speed' of clip 0007-0, which it was not asked for or did not declare"),
        ([*whole(), *parts(CLIPS, [3, 3, 2, 3])], "gave other segments of 'parts' for clip 0001-0 than for the first"),
        ([*whole(), *parts(CLIPS[:3], [2, 2, 2])], "has no 'parts' for clip 0001-1"),
    ],
)
def test_an_answer_that_is_not_whole_is_refused_and_nothing_is_kept(run, spoken, rows, sentence):
    evaluate.evaluate(run, ["spoken"])
    spoken.rows, spoken.version = rows, "2"
    with pytest.raises(UserError) as caught:
        evaluate.evaluate(run, ["spoken"])
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("scorer 'spoken' ")
    assert caught.value.code == 1
    assert not (run / "scores" / "spoken.json").exists()


def test_a_metric_may_say_nothing_about_a_prompt(run, spoken):
    spoken.rows = [*whole(), *parts(CLIPS[:2], [2, 2])]
    evaluate.evaluate(run, ["spoken"])
    assert evidence.read_scores(evidence.read_bench(run), "spoken").values["spoken.parts"].keys() == set(CLIPS[:2])


def test_a_broken_video_is_named(run):
    path = run / "videos" / "0001-0.mp4"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"clip 0001-0: .* truncated") as caught:
        evaluate.evaluate(run, ["motion"])
    assert caught.value.code == 1
    assert not list((run / "scores").glob("*"))


def test_requests_that_are_wrong_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"there is no scorer 'motoin'; did you mean 'motion'\?"):
        evaluate.evaluate(run, ["motion", "motoin"])
    assert not (run / "scores").exists()
    with pytest.raises(UserError, match="is not a run"):
        evaluate.evaluate(tmp_path / "nowhere", ["motion"])
    with pytest.raises(UserError, match="is a train run; only the clips"):
        evaluate.evaluate(fake_runs.write_training(tmp_path, "student"), ["motion"])
