"""Records and their checker: a clone without runs makes the same tables, and no byte of what is committed changes unseen."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfbench import records, report
from rfbench.errors import UserError
from rfbench.report import checking, evidence, film, leaderboard, record, tables
from rfbench.settings import HOME
from tests.test_report import scores_of

REPORTS = HOME / "reports"


def without_films(patch: pytest.MonkeyPatch) -> None:
    """They take most of a report's time and are tested elsewhere."""
    patch.setattr(film, "scenes", lambda board: ())


def work_in(root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(root)
    patch.delenv("RFBENCH_TOML", raising=False)


@pytest.fixture
def clone(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a repository would hold: the study and reports/, no runs."""
    root = tmp_path / "clone"
    shutil.copytree(recorded, root, ignore=shutil.ignore_patterns("runs", "index.html"))
    work_in(root, monkeypatch)
    return root


def found_in(root: Path) -> list[str]:
    return checking.check(root / "reports", root / "runs")


def test_committed_reports_follow_from_their_records() -> None:
    assert checking.check(REPORTS, Path("no runs")) == []


def test_a_clone_without_runs_checks_and_makes_the_same_tables(recorded: Path, clone: Path) -> None:
    assert report.report([], study=None, out=clone / "reports", check=True) == clone / "reports"
    there = {path: path.read_bytes() for path in (clone / "reports").rglob("*") if path.is_file()}
    for path in (clone / "reports" / "study").glob("leaderboard.*"):
        path.unlink()
    report.report([], study="study.yaml", out=clone / "reports" / "study", record=True)
    changed = [path.name for path, content in there.items() if path.read_bytes() != content]
    assert changed == ["evidence.json"]  # the page is one without players, and its hash is another
    assert found_in(clone) == []


def test_a_record_says_what_its_run_says(recorded: Path) -> None:
    store, directory = recorded / "reports" / "records", recorded / "runs" / "bench" / "study" / "student-s1" / "short"
    ours, theirs = evidence.read_bench(store / "study" / "student-s1" / "short.json"), evidence.read_bench(directory)
    assert ours.clips == theirs.clips and ours.run.inputs == theirs.run.inputs and ours.baseline == theirs.baseline
    for scorer in ("motion", "caption", "drift"):
        assert evidence.read_scores(ours, scorer) == evidence.read_scores(theirs, scorer)
    assert evidence.read_scores(ours, "motion").values["motion.speed"] == scores_of(recorded, "student-s1", "motion.speed")
    timed, kept = evidence.read_timings(recorded / "runs/profile/study/cpu"), evidence.read_timings(store / "profile/study/cpu.json")
    assert {name: item.columns for name, item in timed.items()} == {name: item.columns for name, item in kept.items()}
    log, again = evidence.read_training(recorded / "runs/train/study/student-s0"), evidence.read_training(store / "train/study/student-s0.json")
    assert (log.steps, log.columns) == (again.steps, again.columns)


def test_records_and_reports_hold_no_path_and_no_name_of_a_machine(recorded: Path) -> None:
    files = [path for path in (recorded / "reports").rglob("*") if path.suffix in (".html", ".md", ".csv", ".tex", ".json")]
    words = [str(recorded), *([host] if len(host := socket.gethostname()) > 3 else [])]
    assert files and not [path for path in files for word in words if word in path.read_text(encoding="utf-8")]
    text = {"a": ["x", "see /home/me/x"], "b": {"c": "hf_abcdefghijklmnopqrst"}, "d": "a/b, https://x.org/y/z"}
    assert list(record.private(text)) == ["a[1]", "b.c"]
    cut = record.without_paths({"file": "/home/me/x.safetensors", "list": ["/tmp/y", "a/b", 3]})
    assert cut == {"file": "x.safetensors", "list": ["y", "a/b", 3]}


@pytest.mark.parametrize("kind", ["record", "profile", "log", "manifest", "table", "claims", "latex", "readme", "picture"])
def test_one_flipped_bit_anywhere_is_found(kind: str, clone: Path) -> None:
    places = {"record": "records/study/student-s1/short.json", "profile": "records/profile/study/cpu.json"}
    places |= {"log": "records/train/study/student-s0.json", "manifest": "study/evidence.json", "table": "study/leaderboard.csv"}
    places |= {"claims": "study/claims.csv", "latex": "study/leaderboard.tex", "readme": "study/README.md", "picture": "study/overview.png"}
    path, rng = clone / "reports" / places[kind], np.random.default_rng(len(kind))
    whole = path.read_bytes()
    for at in [0, len(whole) - 1, *rng.integers(0, len(whole), 2).tolist()]:
        altered = bytearray(whole)
        altered[at] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(altered)
        found = found_in(clone)
        assert found and any(path.name in sentence or str(path.parent.name) in sentence for sentence in found), (at, altered[at])
        assert all(re.search("bring it back|write|restore|record|do it again|again", sentence) for sentence in found)


def altered(path: Path, change: object) -> None:
    """Change a record and spell it as if nothing had happened, with a sha256 that fits."""
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(record.text(content))


def test_a_forged_score_is_found_by_the_manifest_and_with_a_forged_manifest_by_the_tables(clone: Path) -> None:
    path, manifest = clone / "reports/records/study/student-s1/short.json", clone / "reports/study/evidence.json"
    altered(path, lambda content: content["scores"]["motion"]["values"]["speed"].__setitem__(0, 9.0))
    assert [sentence.partition(" ")[2][:24] for sentence in found_in(clone)] == ["is not the one that " + str(clone)[:4]]
    sha256 = json.loads(path.read_text())["sha256"]
    altered(manifest, lambda content: content["records"].__setitem__("study/student-s1/short.json", sha256))
    names = {Path(sentence.partition(" ")[0]).name for sentence in found_in(clone)}
    assert names == {"README.md", "leaderboard.csv", "leaderboard.tex", "claims.csv"}


FORGED = {
    "a clip less": (lambda c: c["clips"]["id"].pop(), "do not have a value each"),
    "a value less": (lambda c: c["scores"]["motion"]["values"]["speed"].pop(), "scored 13 clips, but the run has 14"),
    "a gap": (lambda c: c["scores"]["motion"]["values"]["speed"].__setitem__(3, None), "no value for some clips of prompt 1"),
    "a word": (lambda c: c["scores"]["motion"]["values"]["speed"].__setitem__(3, "fast"), "is fast, not a number"),
    "another input": (lambda c: c["run"]["inputs"].__setitem__("seed", 1), "not those of its fingerprint"),
    "another name": (lambda c: c["run"].__setitem__("name", "study/teacher/long"), "is the record of study/teacher/long.json; move it there"),
    "unfinished": (lambda c: c["run"].__setitem__("status", "running"), "is not finished"),
    "a path": (lambda c: c["run"]["recorded"].__setitem__("attention", "/home/me/kernel.so"), "holds a path"),
    "a key more": (lambda c: c.__setitem__("note", "x"), "is not a record"),
    "another schema": (lambda c: c.__setitem__("schema", 99), "has schema 99, this version reads 1"),
    "no run": (lambda c: c.pop("run"), "is not a record"),
    "no suite": (lambda c: c["clips"].pop("sha256"), "do not have a value each"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_record_that_is_not_whole_is_told_with_what_to_do(name: str, clone: Path) -> None:
    change, sentence = FORGED[name]
    altered(clone / "reports/records/study/student-s1/short.json", change)
    assert sentence in "\n".join(found_in(clone))


def test_what_was_removed_is_found_by_the_manifest_and_by_git(clone: Path) -> None:
    path = clone / "reports/records/study/student-s1/short.json"
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    assert found_in(clone) == []
    path.unlink()
    assert any("which" in sentence and "rests on" in sentence for sentence in found_in(clone))
    (clone / "reports/study/evidence.json").unlink()  # and all trace of it
    gone = [sentence.partition(" was removed")[0] for sentence in found_in(clone) if " was removed" in sentence]
    assert sorted(gone) == sorted([str(path), str(clone / "reports/study/evidence.json")])


@pytest.mark.parametrize("what", ["clip", "score", "rounds"])
def test_where_the_runs_are_their_bytes_are_read_as_well(what: str, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "all"
    shutil.copytree(recorded, root)
    work_in(root, monkeypatch)
    assert found_in(root) == []
    bench = root / "runs/bench/study/student-s1/short"
    path = {"clip": bench / "videos/0003-1.mp4", "score": bench / "scores/drift.jsonl", "rounds": root / "runs/profile/study/cpu/rounds.jsonl"}[what]
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    assert len(found_in(root)) == 1 and "its run is damaged" in found_in(root)[0]
    with pytest.raises(UserError, match="1 finding") as caught:
        report.report([], study=None, out=root / "reports", check=True)
    assert caught.value.code == 1


def test_a_report_of_runs_without_a_study_is_checked_too(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "plain"
    shutil.copytree(recorded, root, ignore=shutil.ignore_patterns("reports"))
    work_in(root, monkeypatch)
    without_films(monkeypatch)
    report.report([], study=None, out=root / "reports", record=True)
    shutil.rmtree(root / "runs")
    assert found_in(root) == []
    (root / "reports" / "leaderboard.csv").write_text("other")
    assert len(found_in(root)) == 1


def test_a_report_without_records_has_to_say_so_itself(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = clone / "reports" / "other"
    shutil.copytree(clone / "reports" / "study", other)
    (other / checking.MANIFEST).unlink()
    (sentence,) = found_in(clone)
    assert f"{other} has tables and no evidence.json, so nothing of it can be checked" in sentence and "--study other --record" in sentence
    readme = other / "README.md"
    readme.write_text(readme.read_text() + f"\n**{checking.UNRECORDED}**\n")
    assert found_in(clone) == []
    report.report([], study=None, out=clone / "reports", check=True)
    assert f"not checked: {other}, as its README.md says" in capsys.readouterr().err


def test_what_could_not_be_read_stays_told_by_the_same_words(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study with a damaged run: its record is missing, and the tables from records say why as those from runs do."""
    root = tmp_path / "gap"
    shutil.copytree(recorded, root, ignore=shutil.ignore_patterns("reports"))
    work_in(root, monkeypatch)
    without_films(monkeypatch)
    (root / "runs/bench/study/student-s1/short/videos/0002-1.mp4").write_bytes(b"other")
    report.report([], study="study.yaml", out=root / "reports" / "study", record=True)
    shutil.rmtree(root / "runs")
    assert not (root / "reports/records/study/student-s1").exists()
    assert "truncated or was altered" in (root / "reports/study/leaderboard.csv").read_text()
    assert found_in(root) == []


OPEN = {
    "": lambda run: None,
    "code with uncommitted changes": lambda run: run["recorded"]["code"].__setitem__("dirty", True),
    "code of no known commit": lambda run: run["recorded"].__setitem__("continued_on", [{"code": {"commit": None, "dirty": None}}]),
    "weights whose hash is not declared": lambda run: run["recorded"]["baseline"].update(weights={"file": "x.pt"}, trained_by={}),
    "approximate: 8-bit attention": lambda run: run["recorded"]["baseline"].__setitem__("attention", "float8"),
    "approximate: tiny decoder": lambda run: run["recorded"]["baseline"].__setitem__("decoder", "tiny"),
    "random weights": lambda run: run["inputs"].__setitem__("weights_sha256", "random"),
    "videos made elsewhere": lambda run: run["inputs"].__setitem__("weights_sha256", "imported"),
    "part or another version of suite toy-short": lambda run: run["inputs"]["suite"].__setitem__("sha256", "0" * 64),
}


@pytest.mark.parametrize("reason", OPEN)
def test_only_what_anybody_can_make_again_is_closed(reason: str, tmp_path: Path) -> None:
    """Two entries of the committed report; the teacher, which is best at smoothness, is changed in one respect."""
    store = tmp_path / "records"
    names = ["teacher", "self-forcing-s0"]
    for name in names:
        shutil.copytree(REPORTS / "records" / "toy" / name, store / "toy" / name)
    paths = [store / "toy" / name / "toy-short.json" for name in names]
    changed = paths[:1] if reason.partition(" ")[0] != "part" else paths  # two that differ would not stand in one table

    def change(content: dict[str, Any]) -> None:
        OPEN[reason](content["run"])
        content["run"]["fingerprint"] = records.fingerprint(content["run"]["inputs"])

    for path in changed:
        altered(path, change)
    board = leaderboard.read_runs(paths)
    teacher, student = (board.cells[f"toy/{name}", "toy-short", "motion.motion_smoothness"] for name in names)
    assert teacher.open == reason
    assert teacher.best == (reason == "" or len(changed) == 2)
    assert student.ranks == (None if reason and len(changed) == 1 else (2, 2))
    text = tables.to_markdown(board, (), "", ())
    assert ("Open entries" in text, "No entry is closed" in text) == (bool(reason) and len(changed) == 1, len(changed) == 2)
    assert f"| {reason} |" in text or not reason
    assert tables.to_latex(board).count("\\midrule") == 1 + (teacher.open != student.open)


def test_records_are_read_as_runs_are_when_they_are_named(recorded: Path) -> None:
    store = recorded / "reports" / "records" / "study"
    board = leaderboard.read_runs([store / "teacher" / "short.json", store / "student-s0" / "short.json"])
    assert [row.name for row in board.rows] == ["study/teacher", "study/student-s0"]
    assert records.SCHEMA == 1
