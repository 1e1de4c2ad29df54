"""Two runs against each other: numbers that scipy gives for the same clips, and what a person sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from rfbench import cli
from rfbench.errors import UserError
from rfbench.report import leaderboard, pairs
from rfbench.settings import HOME

STORE = HOME / "reports" / "records" / "toy"
ONE, OTHER = STORE / "teacher" / "toy-short.json", STORE / "ode-init" / "toy-short.json"


def by_prompt(path: Path, scorer: str, metric: str) -> list[float]:
    record = json.loads(path.read_text())
    values: dict[str, list[float]] = {}
    for clip, value in zip(record["clips"]["id"], record["scores"][scorer]["values"][metric], strict=True):
        values.setdefault(clip[:4], []).append(value)
    return [sum(found) / len(found) for found in values.values()]


def test_differences_are_those_of_the_paired_t_test_over_prompts() -> None:
    board = leaderboard.read_runs([ONE, OTHER])
    found = {pair.metric: pair for pair in pairs.pairs(board, "toy/teacher", "toy/ode-init")}
    raw = {}
    for metric in ("motion.motion_smoothness", "drift.drift", "drift.imaging_quality"):
        one, other = (by_prompt(path, *metric.split(".")) for path in (ONE, OTHER))
        pair, theirs = found[metric], stats.ttest_rel(one, other)
        assert pair.difference.value == pytest.approx(sum(one) / len(one) - sum(other) / len(other))
        assert pair.difference.p() == pytest.approx(theirs.pvalue, rel=1e-2)
        lower = metric == "drift.drift"
        assert pair.wins == sum((a < b) if lower else (a > b) for a, b in zip(one, other, strict=True))
        assert pair.wins + pair.ties + pair.losses == 24
        assert pair.better is True
        raw[metric] = pair
    turned = {pair.metric: pair for pair in pairs.pairs(board, "toy/ode-init", "toy/teacher")}
    assert turned["drift.drift"].better is False and turned["drift.drift"].losses == raw["drift.drift"].wins
    assert all((pair.p or 0) >= (pair.difference.p() or 0) for pair in found.values())


def test_the_command_prints_a_table_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", str(ONE), str(OTHER), "--out", str(tmp_path / "two.html"), "--json"])
    assert not ended.value.code
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["motion smoothness"]["better"] == "toy/teacher" and rows["colour agreement"]["unit"] == "points"
    assert "toy/teacher against toy/ode-init" in (tmp_path / "two.html").read_text()
    with pytest.raises(UserError, match="both are toy/teacher/toy-short"):
        pairs.compare(ONE, ONE)
    with pytest.raises(UserError, match="name two baselines on one suite"):
        pairs.compare(OTHER, STORE / "ode-init" / "toy-long.json")
