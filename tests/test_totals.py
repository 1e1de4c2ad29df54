"""Intervals of VBench's totals against a bootstrap written out: each dimension's prompts drawn again, then the published formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rfbench import config, records, statistics
from rfbench.config import Study
from rfbench.records import Score, clips_sha256
from rfbench.report import claims, leaderboard, sources, totals
from rfbench.report.evidence import Bench, Scores
from rfbench.vbench import totals as vbench
from rfbench.vbench.dimensions import T2V
from rfbench.vbench.rows import TEXT_FREE
from tests import fake_runs, test_report

SEMANTIC = [name for name in T2V.dimensions if name not in TEXT_FREE]
GROUPS = [list(TEXT_FREE[:3]), list(TEXT_FREE[3:]), *([name] for name in SEMANTIC)]  # prompts of a group are asked for all its dimensions
EACH, SAMPLES = 20, 3
ASKED = [names for names in GROUPS for _ in range(EACH)]  # by prompt
HARD = np.random.default_rng(0).normal(size=(len(ASKED), len(T2V.dimensions)))


def clips() -> list[Any]:
    return [records.Clip(f"{p:04d}-{k}", p, k, "", "", 0, 17, 16, 8, 8, "", "") for p in range(len(ASKED)) for k in range(SAMPLES)]


def values_of(seed: int, lift: float = 0.0) -> dict[str, dict[str, float]]:
    """Dimension -> clip -> per cent; prompts are hard for everybody, and colour is not told of every clip."""
    rng, found = np.random.default_rng([1, seed]), {}
    for number, name in enumerate(T2V.dimensions):
        own = [clip for clip in clips() if name in ASKED[clip.prompt_id]]
        own = [clip for clip in own if name != "color" or (clip.prompt_id + clip.sample) % 4]
        found[name] = {clip.id: float(30 + lift + 6 * HARD[clip.prompt_id, number] + 3 * rng.normal()) for clip in own}
    return found


def run(values: dict[str, dict[str, float]]) -> tuple[Any, Scores]:
    whole = vbench.total({name: float(np.mean(list(column.values()))) for name, column in values.items()})
    nobody: Any = None
    bench = Bench(Path(), nobody, nobody, tuple(clips()), "s", "", "")
    return bench, Scores(
        "vbench", "1", {}, {f"vbench.{k}": column for k, column in values.items()}, {}, whole={f"vbench.{k}": v for k, v in whole.items()}
    )


def drawn(several: list[dict[str, dict[str, float]]], part: str, times: int = 1500) -> np.ndarray[Any, Any]:
    """Totals of resamples, [times, contender]: the same prompts for everybody, drawn within the prompts of the same dimensions."""
    rng, grids = np.random.default_rng(5), []
    for values in several:
        sums, counts = np.zeros((2, len(T2V.dimensions), len(ASKED)))
        for number, name in enumerate(T2V.dimensions):
            for clip, value in values[name].items():
                sums[number, int(clip[:4])] += value
                counts[number, int(clip[:4])] += 1
        grids.append((sums, counts))
    out = np.zeros((times, len(several)))
    for turn in range(times):
        weights = np.concatenate([rng.multinomial(EACH, [1 / EACH] * EACH) for _ in GROUPS])
        for who, (sums, counts) in enumerate(grids):
            means = (sums @ weights) / (counts @ weights)
            out[turn, who] = vbench.total(dict(zip(T2V.dimensions, means.tolist(), strict=True)))[part]
    return out


@pytest.mark.parametrize("part", ["total", "quality", "semantic"])
def test_slopes_are_those_of_the_formula(part: str) -> None:
    rng = np.random.default_rng(3)
    one, other = ({name: float(value) for name, value in zip(T2V.dimensions, rng.uniform(0, 100, 16), strict=True)} for _ in range(2))
    moved = sum(slope * (one[name] - other[name]) for name, slope in vbench.slopes()[part].items())
    assert vbench.total(one)[part] - vbench.total(other)[part] == pytest.approx(moved)
    assert set(vbench.slopes()[part]) == {name for name in T2V.dimensions if part in ("total", T2V.dimensions[name].group)}


@pytest.mark.parametrize("part", ["total", "quality", "semantic"])
def test_the_interval_of_a_total_is_that_of_a_bootstrap_within_dimensions(part: str) -> None:
    values = values_of(1)
    bench, scores = run(values)
    sample = totals.sample([(0, bench, scores)], f"vbench.{part}")
    assert sample is not None
    found = statistics.mean(sample)
    resampled = drawn([values], part)[:, 0]
    assert found.value == pytest.approx(scores.whole[f"vbench.{part}"])
    assert found.error == pytest.approx(resampled.std(), rel=0.06)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.25 * resampled.std())


def test_a_difference_of_totals_is_paired_by_prompt() -> None:
    several = [values_of(1, lift=1.0), values_of(2)]
    one, other = (totals.sample([(0, *run(values))], "vbench.total") for values in several)
    assert one is not None and other is not None
    found, resampled = statistics.difference(one, other), drawn(several, "total")
    assert found.error == pytest.approx((resampled[:, 0] - resampled[:, 1]).std(), rel=0.06)
    assert found.error < 0.6 * np.hypot(statistics.mean(one).error, statistics.mean(other).error)


def test_seeds_count_and_what_lacks_a_dimension_has_no_interval() -> None:
    parts = [(seed, *run(values_of(seed, lift=seed))) for seed in (1, 2)]
    pooled = totals.sample(parts, "vbench.total")
    assert pooled is not None and statistics.mean(pooled).seeds == 2
    assert statistics.mean(pooled).value == pytest.approx(np.mean([scores.whole["vbench.total"] for *_, scores in parts]))
    parts[1][2].values.pop("vbench.scene")
    assert totals.sample(parts, "vbench.total") is None
    assert totals.sample(parts[:1], "other.total") is None


def test_a_claim_about_totals_is_judged(tmp_path: Path) -> None:
    for name, lift in (("teacher", 0.0), ("student", 2.0)):
        directory = fake_runs.write_bench(tmp_path / "runs", f"study/{name}", "short", test_report.PROMPTS, filmed=100)
        own = records.read_clips(directory)
        rng = np.random.default_rng(len(name))
        rows = [Score(clip.id, dim, 50 + lift + 3 * clip.prompt_id + float(rng.normal()) / 10) for clip in own for dim in T2V.dimensions]
        records.write_rows(directory / "scores" / "vbench.jsonl", rows)
        whole = vbench.total({dim: float(np.mean([row.value for row in rows if row.metric == dim])) for dim in T2V.dimensions})
        metrics = {dim: {"higher_is_better": True, "unit": "%", "text": "."} for dim in (*T2V.dimensions, *whole)}
        note = {"scorer": "vbench", "version": "1", "metrics": metrics, "clips": len(own), "clips_sha256": clips_sha256(own), "whole": whole}
        note["rows_sha256"] = records.sha256_of(directory / "scores" / "vbench.jsonl")
        records.write_json(directory / "scores" / "vbench.json", note)
    claim = {"id": "more", "text": "it is better", "metric": "vbench.total", "suite": "short", "better": "student", "than": "teacher"}
    contenders = [{"name": name, "baseline": "toy/teacher"} for name in ("teacher", "student")]
    study = {"title": "Totals", "suites": ["short"], "scorers": ["vbench"], "contenders": contenders, "claims": [claim]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    loaded = config.load(Study, str(tmp_path / "study.yaml"))
    board = leaderboard.read_study(loaded, "study.yaml", *sources.below(tmp_path / "runs"))
    (finding,) = claims.judge(board, loaded)
    slopes = sum(vbench.slopes()["total"].values())
    assert finding.verdict == "reproduced" and finding.value == pytest.approx(2.0 * slopes, abs=0.1)
    cell = board.cells["student", "short", "vbench.total"]
    assert cell.best and cell.ranks == (1, 1) and cell.low is not None and cell.low < (cell.value or 0)
