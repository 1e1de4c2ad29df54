"""Scores against the scorer's own words, never a run that is not whole, never rows that are not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rfbench import evaluate, fleet, records
from rfbench.errors import UserError
from rfbench.records import Clip, Score
from rfbench.report import evidence
from rfbench.scorers import base
from rfbench.scorers.base import Answer, ClipError, Metric
from tests import fake_runs, filming

PROMPTS = ["a red disc moves right", "a blue square"]
CLIPS = ["0000-0", "0000-1", "0001-0", "0001-1"]


class Spoken:
    """A scorer that says what a test puts into its mouth, and how often it was asked."""

    name, metrics = "spoken", {"speed": Metric(True, "px", "A number."), "parts": Metric(False, "", "A number per segment.")}

    def __init__(self) -> None:
        self.version, self.together, self.weights = "1", False, {"spoken.pth": "ab" * 32}
        self.asked: list[str] = []
        self.answers: list[Answer] | None = None
        self.fails: dict[str, Exception] = {}

    def score(self, clips: list[Clip], out: Path) -> Iterator[Answer]:
        if self.answers is not None:
            yield from self.answers
            return
        for clip in clips:
            self.asked.append(clip.id)
            if isinstance(self.fails.get(clip.id), ClipError):
                yield Answer(clip.id, refused=str(self.fails[clip.id]))
                continue
            if clip.id in self.fails:
                raise self.fails[clip.id]
            parts = (Score(clip.id, "parts", float(part), segment=part) for part in range(3))
            yield Answer(clip.id, (Score(clip.id, "speed", clip.prompt_id + 0.5), *parts))


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
    assert records.read_rows(run / "scores" / "motion.jsonl", Score) == filming.answered(SCORER, clips, run)
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
    evaluate.evaluate(run, ["spoken", "spoken"])
    assert spoken.asked == CLIPS
    assert {path: path.read_bytes() for path in (run / "scores").iterdir()} == before
    assert note_of(run)["weights"] == spoken.weights
    evaluate.evaluate(run, ["spoken"], fresh=True)
    assert spoken.asked == 2 * CLIPS
    spoken.version = "2"
    evaluate.evaluate(run, ["spoken"])
    assert spoken.asked == 3 * CLIPS
    assert note_of(run)["version"] == "2"


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("damage", "again"), [("rows", []), ("torn", []), ("note", []), ("ledger", CLIPS[-1:]), ("clips", CLIPS[-1:])])
def test_what_does_not_belong_to_the_clips_is_made_again(run, spoken, damage, again, together):
    spoken.together = together
    evaluate.evaluate(run, ["spoken"])
    rows, note, ledger = (run / "scores" / f"spoken{ending}" for ending in (".jsonl", ".json", ".ledger.jsonl"))
    wanted = rows.read_bytes()
    assert ledger.exists() != together
    match damage:
        case "rows":
            rows.write_bytes(wanted.replace(b"0.5", b"0.7"))
        case "torn":
            rows.write_bytes(wanted[:-5])
        case "note":  # killed between the rows and the note
            note.unlink()
        case "ledger":  # killed while the last answer was written
            note.unlink()
            ledger.write_bytes(b"" if together else ledger.read_bytes()[:-9])
        case "clips":
            clips = records.read_rows(run / "clips.jsonl", Clip)
            records.write_rows(run / "clips.jsonl", [*clips[:-1], Clip(**{**vars(clips[-1]), "sha256": "0" * 64})])
    evaluate.evaluate(run, ["spoken"])
    assert spoken.asked == CLIPS + (CLIPS if together else again)
    assert rows.read_bytes() == wanted


class Summing(Spoken):
    """One that adds its clips up."""

    sparse: frozenset[str] = frozenset()

    def summary(self, clips: list[Clip], out: Path, *, partial: bool) -> dict[str, Any]:
        return {"clips": len(clips)}


@pytest.mark.parametrize(("kind", "spreads"), [(Spoken, True), (Summing, False)])
def test_workers_judge_for_whoever_keeps_no_books_of_its_own(run, monkeypatch, kind, spreads):
    scorer, spread = kind(), list[list[str]]()

    def workers(opener, batches, count):
        judge = opener()
        for batch in batches:
            spread.append([clip.id for clip in batch])
            yield judge(batch)

    monkeypatch.setattr(fleet, "spread", workers)
    monkeypatch.setattr(evaluate, "pick", lambda *_, **__: scorer)
    evaluate.evaluate(run, ["spoken"], engine="ray", workers=2)
    assert spread == ([CLIPS] if spreads else []) and scorer.asked == CLIPS and note_of(run)["clips"] == len(CLIPS)


def test_a_crash_loses_nothing_and_a_rerun_goes_on(run, spoken):
    evaluate.evaluate(run, ["spoken"])
    wanted = (run / "scores" / "spoken.jsonl").read_bytes()
    spoken.fails = {"0001-0": ZeroDivisionError("a bug")}
    with pytest.raises(ZeroDivisionError):
        evaluate.evaluate(run, ["spoken"], fresh=True)
    assert not (run / "scores" / "spoken.json").exists()
    spoken.asked, spoken.fails = [], {}
    evaluate.evaluate(run, ["spoken"])
    assert spoken.asked == ["0001-0", "0001-1"]
    assert (run / "scores" / "spoken.jsonl").read_bytes() == wanted


def test_a_clip_that_cannot_be_scored_is_refused_and_the_others_are_kept(run, spoken):
    spoken.fails = {"0001-0": ClipError("clip 0001-0 is black")}
    with pytest.raises(UserError, match=r"scorer 'spoken' could not score clip 0001-0 \(clip 0001-0 is black\); the others are kept") as caught:
        evaluate.evaluate(run, ["spoken", "motion"])
    assert caught.value.code == 1
    assert note_of(run)["refused"] == {"0001-0": "clip 0001-0 is black"}
    assert {row.clip for row in records.read_rows(run / "scores" / "spoken.jsonl", Score)} == set(CLIPS) - {"0001-0"}
    bench = evidence.read_bench(run)
    assert evidence.read_scores(bench, "motion").values["motion.speed"].keys() == set(CLIPS)  # the next scorer had its turn
    with pytest.raises(UserError, match=r"incomplete, 1 of 4 clips could not be scored, first 0001-0 \(clip 0001-0 is black\)"):
        evidence.read_scores(bench, "spoken")
    spoken.asked, spoken.fails = [], {}
    evaluate.evaluate(run, ["spoken"])
    assert spoken.asked == ["0001-0"]
    assert evidence.read_scores(bench, "spoken").values["spoken.speed"].keys() == set(CLIPS)


def test_a_scorer_that_fails_does_not_keep_the_next_from_its_turn(run, spoken):
    spoken.fails = {"0000-1": UserError("the server is gone", code=1)}
    with pytest.raises(UserError, match=r"^the server is gone$"):
        evaluate.evaluate(run, ["spoken", "motion"])
    assert {path.name for path in (run / "scores").glob("*.json")} == {"motion.json"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_a_refusal(run, spoken, value):
    spoken.answers = [Answer(clip, (Score(clip, "speed", value if clip == "0001-1" else 1.0),)) for clip in CLIPS]
    with pytest.raises(UserError, match=f"clip 0001-1: 'speed' came out as {value}"):
        evaluate.evaluate(run, ["spoken"])
    assert len(records.read_rows(run / "scores" / "spoken.jsonl", Score)) == 3


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


def speeds(*clips: str) -> list[Answer]:
    return [Answer(clip, (Score(clip, "speed", 1.0),)) for clip in clips]


def parts(counts: list[int]) -> list[Answer]:
    rows = {clip: [Score(clip, "parts", 1.0, segment=part) for part in range(count)] for clip, count in zip(CLIPS, counts, strict=True)}
    return [Answer(clip, (Score(clip, "speed", 1.0), *rows[clip])) for clip in CLIPS]


@pytest.mark.parametrize(
    ("answers", "sentence", "kept"),
    [
        (speeds(*CLIPS[:2]), "said nothing about clip 0001-0", 2),
        ([], "said nothing about clip 0000-0", 0),
        ([*speeds(*CLIPS[:3]), Answer("0001-1")], "said nothing about clip 0001-1", 3),
        ([*speeds(*CLIPS[:3], "0000-0")], "spoke of clip 0000-0, which it was not asked for or had answered for", 3),
        (speeds("0007-0", *CLIPS), "spoke of clip 0007-0, which it was not asked for", 0),
        ([Answer("0000-0", 2 * (Score("0000-0", "speed", 2.0),))], "gave 'speed' of clip 0000-0 twice", 0),
        ([Answer("0000-0", (Score("0000-0", "beauty", 2.0),))], "gave 'beauty' of clip 0000-0 for clip 0000-0, which it was not", 0),
        ([Answer("0000-0", (Score("0000-1", "speed", 2.0),))], "gave 'speed' of clip 0000-1 for clip 0000-0, which it was not", 0),
        (parts([3, 3, 2, 3]), "gave other segments of 'parts' for clip 0001-0 than for the first", 0),
        (parts([2, 2, 2, 0]), "has no 'parts' for clip 0001-1", 0),
    ],
)
def test_answers_that_are_not_whole_are_refused(run, spoken, answers, sentence, kept):
    evaluate.evaluate(run, ["spoken"])
    spoken.answers, spoken.version = answers, "2"
    with pytest.raises(UserError) as caught:
        evaluate.evaluate(run, ["spoken"])
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("scorer 'spoken' ")
    assert caught.value.code == 1
    assert not (run / "scores" / "spoken.json").exists()
    ledger = records.read_rows(run / "scores" / "spoken.ledger.jsonl", evaluate.Kept)
    assert sum(line.version == "2" for line in ledger) == kept


def test_a_metric_may_say_nothing_about_a_prompt(run, spoken):
    spoken.answers = parts([2, 2, 0, 0])
    evaluate.evaluate(run, ["spoken"])
    assert evidence.read_scores(evidence.read_bench(run), "spoken").values["spoken.parts"].keys() == set(CLIPS[:2])


def test_a_broken_video_is_named(run):
    path = run / "videos" / "0001-0.mp4"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"clip 0001-0: .* truncated") as caught:
        evaluate.evaluate(run, ["motion"])
    assert caught.value.code == 1
    assert list(note_of(run, "motion")["refused"]) == ["0001-0"]  # type: ignore[call-overload]


def test_requests_that_are_wrong_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"there is no scorer 'motoin'; did you mean 'motion'\?"):
        evaluate.evaluate(run, ["motion", "motoin"])
    assert not (run / "scores").exists()
    with pytest.raises(UserError, match="is not a run"):
        evaluate.evaluate(tmp_path / "nowhere", ["motion"])
    with pytest.raises(UserError, match="is a train run; only the clips"):
        evaluate.evaluate(fake_runs.write_training(tmp_path, "student"), ["motion"])
