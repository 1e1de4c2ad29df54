"""The report against numbers put in by hand: cells, verdicts, refusals, and files that are safe, whole and repeatable."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from rfbench import config, published, records, report, strict
from rfbench.config import Study
from rfbench.errors import UserError
from rfbench.report import claims, evidence, film, leaderboard, plots, sources, tables
from rfbench.report.cells import INCOMPLETE, NOT_RUN, NUMBER
from rfbench.report.leaderboard import Board
from rfbench.scorers.base import read_video
from rfbench.timing import Chunk
from tests import fake_runs

HOSTILE = '<script>alert("x")</script> | </td> &amp; \u2028 $x_1$ \N{GRINNING FACE} ' + "long " * 2000
PROMPTS = [
    "a red disc",
    "a blue square moves left",
    "a green triangle moves up quickly",
    "a cyan disc moves down",
    "a red square moves right",
    "a yellow disc",
]
EFFECT = 0.3  # px/frame that the student is faster by
STUDY: dict[str, Any] = {
    "title": "A <study> of 5 % & more",
    "suites": ["short"],
    "scorers": ["motion", "caption", "drift"],
    "profile": {"chunks": 6, "repeats": 9},
    "contenders": [
        {"name": "teacher", "baseline": "toy/teacher"},
        {"name": "student", "recipe": "toy/dmd", "seeds": [0, 1]},
        {"name": "variant", "of": "student", "set": {"sampler.cache.alpha": 0.5}},
        {"name": "absent", "recipe": "toy/redmd"},
    ],
    "claims": [
        {"id": "faster", "text": "it is faster", "metric": "motion.speed", "suite": "short", "better": "student", "than": "teacher"},
        {"id": "slower", "text": "it is slower", "metric": "motion.speed", "suite": "short", "better": "teacher", "than": "student"},
        {"id": "much", "text": "much faster", "metric": "motion.speed", "suite": "short", "better": "student", "than": "teacher", "margin": 0.6},
        {"id": "same", "text": "it drifts less", "metric": "drift.drift", "suite": "short", "better": "variant", "than": "student"},
        {"id": "missing", "text": "nobody knows", "metric": "motion.speed", "suite": "short", "better": "absent", "than": "student"},
        {
            **{"id": "steadier", "text": "it drifts less", "metric": "drift.drift", "suite": "short", "better": "teacher", "than": "student"},
            "says": "sink-drift",
        },
        {
            **{"id": "fps", "text": "it streams faster", "metric": "profile.e2e_fps", "better": "student", "than": "teacher"},
            "says": "window-speed",
        },
        {"id": "fps-close", "text": "the variant is faster", "metric": "profile.e2e_fps", "better": "variant", "than": "student"},
    ],
}
VERDICTS = {
    "faster": "reproduced",
    "slower": "contradicted",
    "much": "contradicted",
    "same": "inconclusive",
    "missing": "not run",
    "steadier": "reproduced",
    "fps": "reproduced",
    "fps-close": "inconclusive",
}


def write_runs(root: Path, prompts: list[str]) -> None:
    runs = root / "runs"
    effects = {"motion.speed": EFFECT, "drift.drift": 2.0}
    trained = {"trained_by": {"run": "study/student-s0", "seed": 0}, "saw": ["motion.speed"]}
    for name, effect, seed in (
        ("teacher", {}, 0),
        ("student-s0", effects, 0),
        ("student-s1", effects, 1),
        ("variant-s0", effects, 0),
        ("variant-s1", effects, 1),
    ):
        plain = fake_runs.baseline(name, **({} if name == "teacher" else trained))
        directory = fake_runs.write_bench(runs, f"study/{name}", "short", prompts, plain=plain, filmed=100, pace=1 + len(effect))
        fake_runs.write_scores(directory, effect, training_seed=seed)
    fps = {"study/teacher": 2.0, "study/student-s0": 40.0, "study/variant-s0": 40.2}
    fake_runs.write_profile(runs, "study", fps, chunks=6, timed_as={f"study/{name}-s1": f"study/{name}-s0" for name in ("student", "variant")})
    fake_runs.write_training(runs, "study/student-s0", reward=True)
    (root / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (root / "rfbench.toml").write_text('[paths]\nruns = "runs"\nreports = "reports"\n')


@pytest.fixture
def pristine(recorded: Path) -> Path:
    """Runs of a study with one contender missing and one hostile prompt."""
    return recorded


@pytest.fixture
def root(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may break."""
    copy = tmp_path / "copy"
    shutil.copytree(pristine, copy, ignore=shutil.ignore_patterns("reports"))
    monkeypatch.chdir(copy)
    monkeypatch.delenv("RFBENCH_TOML", raising=False)
    return copy


@pytest.fixture(scope="session")
def written(recorded: Path) -> Path:
    """The report of the unbroken study."""
    return recorded / "reports" / "study"


def board_of(root: Path) -> tuple[Board, dict[str, claims.Finding]]:
    study = config.load(Study, str(root / "study.yaml"))
    board = leaderboard.read_study(study, "study.yaml", *sources.below(root / "runs"))
    return board, {finding.claim.id: finding for finding in claims.judge(board, study)}


def scores_of(root: Path, run: str, metric: str) -> dict[str, float]:
    """Clip id -> value, straight from the file."""
    scorer, _, name = metric.partition(".")
    lines = (root / "runs" / "bench" / "study" / run / "short" / "scores" / f"{scorer}.jsonl").read_text().splitlines()
    return {row["clip"]: row["value"] for row in map(json.loads, lines) if row["metric"] == name and row["segment"] is None}


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_numbers_are_those_of_the_score_files(written: Path, pristine: Path) -> None:
    rows = {
        (row["contender"], row["metric"]): row for row in rows_of((written / "leaderboard.csv").read_text()) if row["suite_or_hardware"] == "short"
    }
    assert len(rows) == 4 * 7
    for contender, runs in {"teacher": ["teacher"], "student": ["student-s0", "student-s1"]}.items():
        for metric in ("motion.speed", "caption.direction_agreement", "drift.drift"):
            values = [scores_of(pristine, run, metric) for run in runs]
            row = rows[contender, metric]
            assert float(row["value"]) == pytest.approx(np.mean([value for one in values for value in one.values()]), rel=1e-5)
            assert int(row["clips"]) == sum(len(one) for one in values)
            assert int(row["prompts"]) == len({clip[:4] for clip in values[0]})
            assert int(row["seeds"]) == len(runs)
            assert row["run"] == ";".join(f"study/{run}/short" for run in runs)
            assert row["commit"].split(";")[0] == fake_runs.RECORDED["code"]["commit"]
            assert re.fullmatch("([0-9a-f]{64};?)+", row["weights_sha256"]) and re.fullmatch("([0-9a-f]{64};?)+", row["suite_sha256"])
    assert rows["absent", "motion.speed"]["state"] == NOT_RUN
    assert rows["absent", "motion.speed"]["value"] == ""


def test_intervals_are_those_of_a_bootstrap_written_out(pristine: Path) -> None:
    """Prompts drawn one at a time; the ends then stretched by t over z and by the square root of n / (n - 1)."""
    board, _ = board_of(pristine)
    cell = board.cells["teacher", "short", "motion.speed"]
    by_prompt: dict[str, list[float]] = {}
    for clip, value in scores_of(pristine, "teacher", "motion.speed").items():
        by_prompt.setdefault(clip[:4], []).append(value)
    means, rng = [float(np.mean(values)) for values in by_prompt.values()], np.random.default_rng(99)
    draws = [np.mean([means[int(rng.integers(len(means)))] for _ in means]) for _ in range(4000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    stretch = 2.447 / 1.96 * np.sqrt(7 / 6)  # t of 6 degrees of freedom
    centre, width = np.mean(means), high - low
    assert cell.low == pytest.approx(centre + stretch * (low - centre), abs=0.08 * width)
    assert cell.high == pytest.approx(centre + stretch * (high - centre), abs=0.08 * width)


def test_claims_get_the_verdict_of_what_was_put_in(pristine: Path, written: Path) -> None:
    _, findings = board_of(pristine)
    assert {name: finding.verdict for name, finding in findings.items()} == VERDICTS
    assert {row["id"]: row["verdict"] for row in rows_of((written / "claims.csv").read_text())} == VERDICTS
    paired = np.mean(
        [
            np.mean([scores_of(pristine, run, "motion.speed")[clip] - teacher for run in ("student-s0", "student-s1")])
            for clip, teacher in scores_of(pristine, "teacher", "motion.speed").items()
        ]
    )
    assert findings["faster"].value == pytest.approx(paired)
    assert findings["slower"].value == pytest.approx(-paired)
    assert (findings["faster"].low, findings["faster"].high) == pytest.approx((-(findings["slower"].high or 0), -(findings["slower"].low or 0)))
    assert findings["steadier"].value == pytest.approx(2.0, abs=0.3)  # less drift is an improvement
    assert findings["steadier"].published == pytest.approx(5.08 - 2.65)
    assert findings["faster"].seeds == 2
    assert "margin of 0.6" in findings["much"].reason
    assert "study/absent-s0/short has not been generated" in findings["missing"].reason


def test_one_training_seed_is_said_aloud(root: Path) -> None:
    study = STUDY | {"contenders": [STUDY["contenders"][0], {"name": "student", "recipe": "toy/dmd"}], "claims": STUDY["claims"][:1]}
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    _, findings = board_of(root)
    assert findings["faster"].seeds == 1
    assert "one training seed" in findings["faster"].reason


def test_a_speed_is_judged_by_the_ratio_of_rounds_in_which_both_took_a_turn(root: Path) -> None:
    """The machine is up to twice as fast in one round as in another, so that the ranges of all contenders overlap."""
    board, findings = board_of(root)
    student, variant, teacher = (board.cells[name, "cpu", "profile.e2e_fps"] for name in ("student", "variant", "teacher"))
    assert student.low < variant.high and variant.low < student.high  # type: ignore[operator]
    found = findings["fps"]
    assert found.value == pytest.approx(100 * (40 / 2 - 1), rel=0.01)
    ratios = [sorted(100 * (student.rounds[key] / teacher.rounds[key] - 1) for key in teacher.rounds if key[1] == process) for process in range(3)]
    ends = [min(own[1] for own in ratios), max(own[7] for own in ratios)]  # of nine in each process, all but the outermost
    assert [found.low, found.high] == pytest.approx(ends)
    assert found.published == pytest.approx(100 * (23.1 / 17.0 - 1))
    assert found.verdict == "reproduced" and found.reason == "the 95 % interval over 27 paired rounds of 3 processes lies above zero"
    assert tables.improvement(board, found).endswith(" %") and tables.published(found) == "+35.88 %"
    assert not student.tied or not variant.tied
    assert student.tied or variant.tied
    assert not teacher.tied
    # a difference that is less than a tenth of what the machine does is found where the two have little noise of their own
    shutil.rmtree(root / "runs" / "profile")
    fps = {"study/teacher": 2.0, "study/student-s0": 40.0, "study/variant-s0": 42.0}
    fake_runs.write_profile(root / "runs", "study", fps, noise=0.002)
    assert board_of(root)[1]["fps-close"].verdict == "reproduced"
    assert board_of(root)[1]["fps-close"].value == pytest.approx(5, abs=0.5)


@pytest.mark.parametrize(("processes", "verdict"), [(1, "inconclusive"), (2, "inconclusive"), (3, "reproduced")])
def test_a_speed_is_not_judged_by_one_start_however_clear_it_looks(root: Path, processes: int, verdict: str) -> None:
    shutil.rmtree(root / "runs" / "profile")
    fake_runs.write_profile(root / "runs", "study", {"study/teacher": 2.0, "study/student-s0": 40.0}, processes=processes)
    found = board_of(root)[1]["fps"]
    assert found.verdict == verdict and found.low is not None and found.low > 1500
    assert ("another start may say otherwise: a verdict needs 3 processes" in found.reason) == (processes < 3)


def test_timings_that_are_no_pairs_are_not_compared(root: Path) -> None:
    directory = root / "runs" / "profile" / "study" / "cpu"
    run = records.read_json(directory / "run.json")
    run["recorded"]["timed_as"] = {"study/variant-s0": "study/student-s0"}
    records.write_json(directory / "run.json", run)
    close = board_of(root)[1]["fps-close"]
    assert (close.verdict, close.value, close.low) == ("inconclusive", 0.0, None)
    assert close.reason == "the two differ in their weights alone and were timed as one"
    shutil.rmtree(directory)
    fake_runs.write_profile(root / "runs", "study", {"study/teacher": 2.0, "study/student-s0": 40.0}, repeats=5)
    _, findings = board_of(root)
    assert (findings["fps"].verdict, findings["fps"].low) == ("inconclusive", None)
    assert findings["fps"].reason.endswith("is not defined: 5 rounds in a process, the least is 6")
    assert findings["fps-close"].verdict == "not run" and "variant has not been profiled on cpu" in findings["fps-close"].reason
    (directory / "rounds.jsonl").write_text("")
    assert board_of(root)[1]["fps"].reason == "profile/cpu: rounds.jsonl is not what was written; profile it again with --fresh"


def test_what_is_better_when_lower_is_compared_the_other_way_round(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"id": "first", "text": "its first frame comes sooner", "metric": "profile.ttff_s", "better": "student", "than": "teacher"}
    pair = published.Pair("self-forcing/table-1", "latency_s", better="self-forcing-framewise", than="self-forcing")
    monkeypatch.setattr(published, "statements", lambda: {"soon": published.Statement("its first frame comes sooner", "Table 1", pair)})
    (root / "study.yaml").write_text(yaml.safe_dump(STUDY | {"claims": [first | {"says": "soon"}]}))
    found = board_of(root)[1]["first"]
    assert found.value == pytest.approx(1900, rel=0.05) and found.verdict == "reproduced"
    assert found.published == pytest.approx(100 * (0.69 / 0.45 - 1))


def test_ties_and_bests(pristine: Path) -> None:
    board, _ = board_of(pristine)
    student, variant, teacher = (board.cells[name, "short", "motion.speed"] for name in ("student", "variant", "teacher"))
    assert student.best != variant.best
    assert student.tied or variant.tied
    assert not teacher.tied and not teacher.best
    assert board.cells["teacher", "short", "drift.drift"].best  # lower is better
    assert student.saw and not teacher.saw and not board.cells["student", "short", "drift.drift"].saw


def set_run(directory: Path, **fields: Any) -> None:
    records.write_json(directory / "run.json", records.read_json(directory / "run.json") | fields)


def set_lines(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().removesuffix("\n").split("\n"))) + "\n")


def set_rows(run: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Change a scorer's rows as a scorer would that does not do its work."""
    set_lines(run / "scores" / "motion.jsonl", change)
    set_note(run, rows_sha256=records.sha256_of(run / "scores" / "motion.jsonl"))


def set_note(run: Path, **fields: Any) -> None:
    path = run / "scores" / "motion.json"
    records.write_json(path, records.read_json(path) | fields)


def set_inputs(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    set_run(run, inputs=change(records.read_json(run / "run.json")["inputs"]))


def other_video(run: Path) -> None:
    """A clip that was generated again after it was scored."""
    (run / "videos" / "0002-1.mp4").write_bytes(b"other")
    clips = [dataclasses.replace(clip, sha256=records.sha256_of(run / clip.file)) for clip in records.read_clips(run)]
    records.write_rows(run / "clips.jsonl", clips)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not done": (lambda run: set_run(run, status="running"), "is not finished, it is running"),
    "failed": (lambda run: set_run(run, status="failed", error="disk full"), "failed: disk full; run the command"),
    "no clips": (lambda run: (run / "clips.jsonl").write_text(""), "has 0 of 14 clips"),
    "clip lost": (lambda run: set_lines(run / "clips.jsonl", lambda lines: lines[1:]), "has 13 of 14 clips"),
    "video altered": (lambda run: (run / "videos" / "0002-1.mp4").write_bytes(b"other"), "clip 0002-1"),
    "video gone": (lambda run: (run / "videos" / "0002-1.mp4").unlink(), "clip 0002-1"),
    "scored before": (other_video, "the scored videos are not the ones that are there now"),
    "rows altered": (lambda run: set_lines(run / "scores" / "motion.jsonl", lambda lines: lines[::-1]), "motion.jsonl is not what the scorer wrote"),
    "rows gone": (lambda run: (run / "scores" / "motion.jsonl").unlink(), "motion.jsonl is not what the scorer wrote"),
    "NaN": (lambda run: set_rows(run, lambda lines: [re.sub(r'"value":[^}]*', '"value":NaN', lines[0]), *lines[1:]]), "is nan"),
    "row lost": (lambda run: set_rows(run, lambda lines: lines[1:]), "has no value for some clips of prompt 0"),
    "row twice": (lambda run: set_rows(run, lambda lines: [*lines, lines[0]]), "is there twice"),
    "row of another clip": (lambda run: set_rows(run, lambda lines: [*lines, lines[0].replace("0000-0", "0099-0")]), "0099-0"),
    "segment lost": (
        lambda run: set_rows(run, lambda lines: [line for line in lines if not ('"segment":1,' in line and "0003-0" in line)]),
        "segments",
    ),
    "clip without a number": (
        lambda run: set_rows(run, lambda lines: [line for line in lines if "0003-" not in line]),
        "no number at all for clip 0003-0",
    ),
    "fewer scored": (lambda run: set_note(run, clips=13), "scored 13 clips, but the run has 14"),
    "not scored": (lambda run: (run / "scores" / "motion.json").unlink(), "has not been scored by 'motion'"),
    "other scorer": (lambda run: set_note(run, version="2"), "was scored by version 2"),
    "other suite": (
        lambda run: set_inputs(run, lambda inputs: inputs | {"suite": inputs["suite"] | {"sha256": "0" * 64}}),
        "another version of suite",
    ),
    "untraceable": (
        lambda run: set_inputs(run, lambda inputs: {key: value for key, value in inputs.items() if key != "weights_sha256"}),
        "does not declare 'weights_sha256'",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_not_whole_gives_no_number(name: str, root: Path) -> None:
    """Of a study: a cell with the reason and no number, and claims on it are not run. Of named runs: a refusal."""
    damage, sentence = BREAKS[name]
    damage(root / "runs" / "bench" / "study" / "student-s1" / "short")
    board, findings = board_of(root)
    cell = board.cells["student", "short", "motion.speed"]
    assert cell.state == INCOMPLETE and cell.value is None and cell.low is None
    assert sentence in cell.reason and str(root) not in cell.reason
    assert findings["faster"].verdict == "not run" and findings["faster"].value is None
    assert board.cells["teacher", "short", "motion.speed"].state == NUMBER
    if name != "not scored":  # without a study nobody says what should have been scored
        runs = [root / "runs" / "bench" / "study" / run / "short" for run in ("teacher", "student-s0", "student-s1")]
        with pytest.raises(UserError, match=re.escape(sentence)):
            leaderboard.read_runs(runs)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"better": "studnet"}, "did you mean 'student'"),
        ({"metric": "motoin.speed"}, "did you mean 'motion'"),
        ({"metric": "motion.sped"}, "did you mean 'motion.speed'"),
        ({"suite": "long"}, "no suite 'long'"),
        ({"metric": "profile.fps", "suite": None}, "no timing"),
        ({"metric": "profile.e2e_fps"}, "has no suite"),
    ],
)
def test_a_claim_about_nobody_is_refused(change: dict[str, Any], sentence: str, root: Path) -> None:
    (root / "study.yaml").write_text(yaml.safe_dump(STUDY | {"claims": [STUDY["claims"][0] | change]}))
    with pytest.raises(UserError, match=re.escape(sentence)):
        board_of(root)


def test_a_study_without_any_run_says_what_to_do(root: Path) -> None:
    shutil.rmtree(root / "runs")
    shutil.rmtree(root / "reports", ignore_errors=True)
    with pytest.raises(UserError, match=re.escape("rfbench reproduce study.yaml")):
        report.report([], study="study.yaml", out=root / "new")
    with pytest.raises(UserError, match="there are no runs"):
        report.report([], study=None, out=root / "new")
    assert not (root / "new").exists()


def test_rows_of_a_study_follow_its_recipes_seeds() -> None:
    contenders = [
        {"name": "a", "baseline": "toy/teacher"},
        {"name": "b", "recipe": "toy/dmd", "seeds": [3, 5]},
        {"name": "c", "of": "b", "set": {"sampler.shift": 3.0}},
        {"name": "d", "of": "c"},
        {"name": "e", "of": "a"},
    ]
    study = strict.build(Study, STUDY | {"contenders": contenders, "claims": []}, where="study")
    rows = {row.name: row for row in leaderboard.study_rows(study, "s")}
    assert {name: row.runs for name, row in rows.items()} == {
        **{"a": ("s/a",), "b": ("s/b-s3", "s/b-s5"), "c": ("s/c-s3", "s/c-s5")},
        **{"d": ("s/d-s3", "s/d-s5"), "e": ("s/e",)},
    }
    assert rows["d"].seeds == (3, 5) and rows["e"].seeds == ()
    assert rows["c"].note == "b with sampler.shift = 3.0"
    for broken in ([{"name": "a", "of": "z"}], [{"name": "a", "of": "b"}, {"name": "b", "of": "a"}], [contenders[0], contenders[0]]):
        with pytest.raises(UserError):
            leaderboard.study_rows(strict.build(Study, STUDY | {"contenders": broken, "claims": []}, where="study"), "s")


class Page(html.parser.HTMLParser):
    """Checks nesting while it collects elements and text."""

    VOID = frozenset({"meta", "link", "input", "img", "br", "hr", "path", "use", "rect", "line", "circle"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    parsed = Page()
    parsed.feed((written / "index.html").read_text(encoding="utf-8"))
    return parsed


def test_page_is_nested_and_can_be_used_without_sight_or_mouse(page: Page) -> None:
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert ("html", {"lang": "en"}) in page.elements
    for tag, attributes in page.elements:
        if tag == "img":
            assert attributes.get("alt")
        if tag == "svg":
            assert attributes.get("role") == "img" and attributes.get("aria-label")
        for key in ("aria-labelledby", "for"):
            assert attributes.get(key, ids[0]) in ids
        if tag == "th":
            assert attributes.get("scope") in ("row", "col", "rowgroup")
        if tag == "a":
            assert str(attributes["href"])[1:] in ids
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))


def test_page_loads_nothing_from_elsewhere(written: Path, page: Page) -> None:
    text = (written / "index.html").read_text(encoding="utf-8")
    for _, attributes in page.elements:
        for key in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            if attributes.get(key):
                assert re.match(r"(data:|#)", str(attributes[key])), attributes[key]
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert len(text) < 4_000_000


def test_hostile_prompts_stay_text(written: Path, page: Page) -> None:
    text = (written / "index.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and "\u2028" not in text.partition('id="data">')[2]
    assert [attributes.get("type") for tag, attributes in page.elements if tag == "script"] == ["application/json", None]
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    prompts = [scene["prompt"] for scene in data["scenes"]]
    assert any(prompt.startswith('<script>alert("x")</script> |') for prompt in prompts)
    assert max(map(len, prompts)) <= 160
    assert "A <study> of 5 % & more" in "".join(page.text)
    markdown = (written / "README.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and r"A \<study\> of 5 % \& more" in markdown


def test_markdown_tables_are_rectangular_and_hold_every_contender(written: Path) -> None:
    tables_found = re.findall(r"(?:^\|.*\n)+", (written / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(tables_found) == 3
    for table in tables_found:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert all(f"| {row['name']} |" in tables_found[1] for row in STUDY["contenders"])
    assert "not run" in tables_found[1]


def test_latex_is_balanced_and_escaped(written: Path) -> None:
    text = (written / "leaderboard.tex").read_text(encoding="utf-8")
    bare = re.sub(r"\\[\\{}%&$#_]", "", text)
    depth = 0
    for letter in bare:
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0
    assert depth == 0
    assert r"A \textless{}study\textgreater{} of 5 \% \& more" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == text.count(r"\toprule") == 2
    assert all(ord(letter) < 128 for letter in text)


def test_runs_without_a_study_are_a_row_each(root: Path) -> None:
    runs = [root / "runs" / "bench" / "study" / name / "short" for name in ("teacher", "student-s0")]
    page = report.report([*runs, root / "runs" / "profile" / "study" / "cpu"], study=None, out=root / "out")
    rows = rows_of((page.parent / "leaderboard.csv").read_text())
    assert {row["contender"] for row in rows} == {f"study/{name}" for name in ("teacher", "student-s0", "student-s1", "variant-s0", "variant-s1")}
    assert not (page.parent / "claims.csv").exists()
    states = {row["contender"]: row["state"] for row in rows if row["metric"] == "profile.e2e_fps"}
    assert set(states.values()) == {NUMBER} and len(states) == 5


def test_sheets_and_strips_show_the_recorded_frames(pristine: Path) -> None:
    bench = evidence.read_bench(pristine / "runs" / "bench" / "study" / "teacher" / "short")
    made = film.film("teacher", "teacher", bench.directory, bench.clips[0])
    pixels = read_video(bench.directory, bench.clips[0])
    sheet = np.asarray(Image.open(io.BytesIO(made.sheet)).convert("RGB")).astype(float)
    strip = np.asarray(Image.open(io.BytesIO(made.strip)).convert("RGB")).astype(float)
    assert (made.frames, made.fps, made.width, made.height) == (17, 16.0, 128, 96)
    for frame in (0, 5, 16):
        top, left = frame // made.columns * 96, frame % made.columns * 128
        shown = sheet[top : top + 96, left : left + 128].reshape(48, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(shown - pixels[frame]).mean() < 4
    last = strip[:, -128:].reshape(48, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(last - pixels[16]).mean() < 4 < np.abs(last - pixels[0]).mean() + 4
    assert strip.shape[:2] == (96, film.STILLS * 132 - 4)


def test_films_keep_to_their_budget_and_scenes_are_the_same_clip_of_everybody(pristine: Path) -> None:
    board, _ = board_of(pristine)
    scenes = film.scenes(board)
    assert len(scenes) == 6
    assert all([one.row for one in scene.films] == ["teacher", "student", "variant"] for scene in scenes)
    assert scenes[0].clip == "0000-0" and scenes[-1].clip == "0006-0"
    size = sum(len(one.sheet) + len(one.strip) for one in scenes[0].films)
    assert len(film.scenes(board, budget=size + 10)) == 1


def test_fps_by_length_of_known_chunks(pristine: Path) -> None:
    timed = evidence.read_timings(pristine / "runs" / "profile" / "study" / "cpu")["study/teacher"]
    streams = tuple(tuple(Chunk(i, 9 if i == 0 else 12, 0, 0, (i + 1) * (0.5 + 0.5 * r), 0) for i in range(4)) for r in range(3))
    curve = plots.fps_by_length([dataclasses.replace(timed, streams=streams)])
    assert curve == ([21, 33, 45], [12.0, 12.0, 12.0])  # 24, 12 and 8 FPS in the three rounds: the median
    assert plots.fps_by_length([dataclasses.replace(timed, streams=((), ()))]) is None


@pytest.mark.parametrize(
    ("numbers", "places"),
    [([(82.13, 79.0, 85.3)], 1), ([(0.452, 0.412, 0.492)], 3), ([(1204.0, 1100.0, 1300.0)], 0), ([(None, None, None)], 1), ([(5.0, None, None)], 2)],
)
def test_decimals_show_two_digits_of_the_interval(numbers: list[Any], places: int) -> None:
    assert tables.decimals(numbers) == places


def test_numbers_are_printed_with_a_true_minus_and_no_negative_zero() -> None:
    assert tables.shown(-0.04, 1) == "0.0"
    assert tables.shown(-0.06, 1, sign=True) == "−0.1"
    assert tables.shown(0.06, 1, sign=True) == "+0.1"
    assert tables.shown(None, 1) == "–"


def test_random_weights_and_an_approximate_decoder_are_said_wherever_the_row_is(root: Path) -> None:
    for path in (root / "runs" / "bench" / "study").glob("*/*/run.json"):
        run = records.read_run(path.parent)
        if "teacher" in run.name:
            inputs = run.inputs | {"weights_sha256": "random"}
            run = dataclasses.replace(run, inputs=inputs, fingerprint=records.fingerprint(inputs))
        else:
            run = dataclasses.replace(run, recorded=run.recorded | {"baseline": run.recorded["baseline"] | {"decoder": "tiny"}})
        records.write_run(path.parent, run)
    page = report.report([], study=str(root / "study.yaml"), out=root / "out")
    for text in (page.read_text(), (root / "out" / "README.md").read_text()):
        assert "teacher: its weights are random, so its scores mean nothing" in text
        assert "student: its pixels come from the tiny decoder" in text
        assert "teacher: its pixels" not in text and "student: its weights" not in text
