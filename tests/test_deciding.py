"""What decides a claim, against the score files and the definitions: prompt by prompt, seed by seed, start by start."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from rfbench import statistics, timing
from rfbench.report import deciding
from rfbench.report.claims import Finding
from rfbench.report.leaderboard import Board
from tests.test_report import board_of, scores_of


@pytest.fixture(scope="module")
def judged(recorded: Path) -> tuple[Board, dict[str, Finding]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(recorded)
        patch.delenv("RFBENCH_TOML", raising=False)
        return board_of(recorded)


def test_differences_are_those_of_the_score_files(judged: tuple[Board, dict[str, Finding]], recorded: Path) -> None:
    board, findings = judged
    values = {run: scores_of(recorded, run, "drift.drift") for run in ("teacher", "student-s0", "student-s1")}
    prompts = sorted({clip.partition("-")[0] for clip in values["teacher"]})

    def of(run: str, prompt: str) -> float:
        return float(np.mean([value for clip, value in values[run].items() if clip.startswith(prompt)]))

    wanted = [(of("student-s0", prompt) + of("student-s1", prompt)) / 2 - of("teacher", prompt) for prompt in prompts]  # less drift is better
    found = deciding.differences(board, findings["steadier"])
    assert found == pytest.approx(wanted) and found.mean() == pytest.approx(findings["steadier"].value)
    told = dict(deciding.details(board, findings["steadier"]))
    won = sum(value > 0 for value in wanted)
    assert f"better on {won} of {len(prompts)} prompts, worse on {len(prompts) - won}" in told["ours"]


def test_each_seed_alone_is_its_own_paired_difference(judged: tuple[Board, dict[str, Finding]], recorded: Path) -> None:
    board, findings = judged
    whole, *seeds = deciding.parts(board, findings["faster"])
    assert (whole.name, whole.value, whole.low) == ("all", findings["faster"].value, findings["faster"].low)
    assert [part.name for part in seeds] == ["seed 0", "seed 1"]
    teacher = scores_of(recorded, "teacher", "motion.speed")
    for number, part in enumerate(seeds):
        student = scores_of(recorded, f"student-s{number}", "motion.speed")
        gaps = statistics.sample([student[clip] - teacher[clip] for clip in teacher], [clip[:4] for clip in teacher])
        wanted = statistics.mean(gaps)
        assert (part.value, part.low, part.high) == pytest.approx((wanted.value, wanted.low, wanted.high))
    assert np.mean([part.value for part in seeds]) == pytest.approx(whole.value)


def test_each_start_of_a_timing_is_told_and_ratios_are_per_cent(judged: tuple[Board, dict[str, Finding]]) -> None:
    board, findings = judged
    finding = findings["fps"]
    assert finding.better is not None and finding.than is not None
    found = deciding.differences(board, finding)
    assert len(found) == 27 and np.median(found) == pytest.approx(finding.value, rel=0.05)
    pairs = [(finding.better.rounds[key], finding.than.rounds[key]) for key in sorted(finding.better.rounds)]
    assert found == pytest.approx([100 * (one / other - 1) for one, other in pairs])
    _, *starts = deciding.parts(board, finding)
    assert [part.name for part in starts] == ["start 1", "start 2", "start 3"]
    assert starts[0].value == pytest.approx(float(np.median(found[:9])))
    first = {key: value for key, value in finding.better.rounds.items() if key[1] == 0}
    assert starts[0].low == pytest.approx(100 * ((timing.compared(first, finding.than.rounds, True).low or 0) - 1))


def test_what_would_change_a_verdict_follows_from_its_interval(judged: tuple[Board, dict[str, Finding]]) -> None:
    board, findings = judged
    far = findings["faster"]
    assert far.low is not None
    assert f"reaches zero: its lower end is {far.low:.3f} px/frame away" in deciding.changing(board, far)
    assert "its upper end is" in deciding.changing(board, findings["much"]) and "reaches +0.60" in deciding.changing(board, findings["much"])
    assert deciding.changing(board, findings["missing"]) == "numbers of both contenders"
    open_ = dataclasses.replace(findings["same"], value=0.5, detectable=2.0, seeds=1, low=-1.0, high=2.0)
    text = deciding.changing(board, open_)
    assert "2.0 points away from it four times in five" in text and f"about {math.ceil((2.0 / 0.5) ** 2)} times as much data" in text
    assert text.endswith("a second training seed, since another training run may say otherwise")
    assert "without an interval" in deciding.changing(board, dataclasses.replace(open_, low=None, high=None))


def test_every_measured_claim_has_both_plots_and_every_claim_says_who_tests_it(judged: tuple[Board, dict[str, Finding]]) -> None:
    board, findings = judged
    for name, finding in findings.items():
        plots, told = deciding.plots_of(board, finding), dict(deciding.details(board, finding))
        assert [plot.title for plot in plots] == ([] if name == "missing" else [plots[0].title, "The interval that decides"])
        assert "study study.yaml" in told["tested by"] and told["would change it"] and finding.verdict in told["verdict"]
    assert "5.08 of reward-forcing/no-sink" in dict(deciding.details(board, findings["steadier"]))["published"]
    assert "not a claim of the paper" in dict(deciding.details(board, findings["faster"]))["said in"]
