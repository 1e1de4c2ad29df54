"""The cells of a table: what a row has in a column, where that came from, and how it stands among the others.

A cell of a suite is the mean over clips with its interval; one of VBench's totals is made of its dimensions (`totals`); one of a
timing is the median of its rounds. Where there is no number, a cell says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rfbench import records, statistics, timing
from rfbench.published import Reported
from rfbench.report import totals
from rfbench.report.evidence import Bench, Scores, Timed
from rfbench.scorers.base import Metric
from rfbench.statistics import Sample
from rfbench.timing import Key

NUMBER, NOT_RUN, INCOMPLETE, LEFT_OUT = "number", "not run", "incomplete", "not asked for"
BOARD = "profile"  # stands for all contenders where a problem is with the run that times them in turn


@dataclass(frozen=True)
class Row:
    """A contender and the names of its runs: one, or one per training seed."""

    name: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...] = ()  # training seeds; none where nothing was trained for this table
    note: str = ""  # how it differs from the row or recipe that it comes from
    suites: tuple[str, ...] | None = None
    title: str = ""
    saw: tuple[str, ...] = ()
    reported: tuple[Reported, ...] = ()
    caveats: tuple[str, ...] = ()  # why its numbers are not what its name promises


@dataclass(frozen=True)
class Cell:
    """What a row has in a column: a number with its interval (for timings: median and range), or why not."""

    row: str
    column: str  # suite, or the hardware of a timing
    metric: str
    state: str = NUMBER
    reason: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    clips: int = 0
    prompts: int = 0
    seeds: int = 0
    repeats: int = 0  # of a timing: processes, or rounds of the only one
    sources: tuple[dict[str, Any], ...] = ()  # one per run
    saw: bool = False  # optimised in training
    best: bool = False
    tied: bool = False  # its paired difference from the best is not told from zero
    ranks: tuple[int, int] | None = None  # best and worst that it may have in its column
    open: str = ""  # why it does not stand with the closed entries; nothing: complete, clean commit, shipped suite, pinned weights
    sample: Sample | None = field(default=None, repr=False, compare=False)
    rounds: dict[Key, float] = field(default_factory=dict, repr=False, compare=False)  # of a timing: its value in each round


Problems = dict[tuple[str, str, str], tuple[str, str]]  # (run, suite or hardware, scorer or "" for all) -> state, reason


def source(directory_name: str, run: records.Run, **more: Any) -> dict[str, Any]:
    """Where a number came from, without the name of the machine or any path on it."""
    code = run.recorded.get("code") or {}
    return {
        "run": directory_name,
        "fingerprint": run.fingerprint,
        "commit": code.get("commit"),
        "dirty": code.get("dirty"),
        "version": code.get("version"),
    } | more


def of_suite(
    row: Row,
    suite: str,
    metric: str,
    benches: dict[tuple[str, str], Bench],
    scores: dict[tuple[str, str], tuple[Scores, ...]],
    problems: Problems,
) -> Cell:
    """The mean over the clips of a row's runs, or a total of them; why there is none, where `problems` or the runs say so."""
    scorer = metric.partition(".")[0]
    empty = Cell(row.name, suite, metric)
    if row.suites is not None and suite not in row.suites:
        return dataclasses.replace(empty, state=LEFT_OUT, reason=f"{row.name} is not run on {suite} here")
    for run in row.runs:
        state, reason = problems.get((run, suite, ""), problems.get((run, suite, scorer), ("", "")))
        if state:
            return dataclasses.replace(empty, state=state, reason=reason)
    found: list[tuple[int, Bench, Scores]] = []
    for number, run in enumerate(row.runs):
        item = next((item for item in scores[run, suite] if metric in item.values or metric in item.whole), None)
        if item is None:
            return dataclasses.replace(empty, state=INCOMPLETE, reason=f"{run}/{suite} has no '{metric}' although other rows do; score it again")
        found.append((row.seeds[number] if row.seeds else number, benches[run, suite], item))
    told = dataclasses.replace(
        empty,
        sources=tuple(_source_of(bench, item) for _, bench, item in found),
        saw=any(trained in (metric, scorer) for trained in row.saw),
    )
    if metric in found[0][2].whole:
        return _total(told, found)
    try:
        sample = _sample(metric, found)
    except ValueError as error:
        return dataclasses.replace(empty, state=INCOMPLETE, reason=f"{row.name} on {suite}: {error}; generate and score it again")
    clips = sum(len(item.values[metric]) for *_, item in found)
    bounds = (0.0, 100.0) if found[0][2].metrics[metric].unit == "%" else (-math.inf, math.inf)
    return _measured(told, sample, clips, bounds)


def _source_of(bench: Bench, item: Scores) -> dict[str, Any]:
    weights = {"weights_sha256": bench.weights_sha256, "suite_sha256": bench.suite_sha256}
    return source(bench.run.name, bench.run, **weights, scorer=item.scorer, scorer_version=item.version)


def _sample(metric: str, found: Sequence[tuple[int, Bench, Scores]]) -> Sample:
    """The clips of all training seeds.

    Raises:
        ValueError: they are not the same number of each prompt.
    """
    values: list[float] = []
    prompts: list[int] = []
    seeds: list[int] = []
    for seed, bench, item in found:
        column = item.values[metric]
        values += column.values()
        prompts += map(bench.prompts.__getitem__, column)
        seeds += [seed] * len(column)
    return statistics.sample(values, prompts, seeds)


def _total(told: Cell, found: Sequence[tuple[int, Bench, Scores]]) -> Cell:
    """What all clips add up to where that is no mean over them."""
    clips = sum(len(bench.clips) for _, bench, _ in found)
    sample = totals.sample(found, told.metric)
    if sample is not None:
        return _measured(told, sample, clips, (-math.inf, 100.0))
    value = math.fsum(item.whole[told.metric] for *_, item in found) / len(found)
    return dataclasses.replace(told, value=value, reason="one number of all clips, without an interval", clips=clips)


def _measured(told: Cell, sample: Sample, clips: int, bounds: tuple[float, float]) -> Cell:
    """A cell with the mean of a sample and its interval, which does not reach over what can be."""
    found = statistics.mean(sample)
    return dataclasses.replace(
        told,
        value=found.value,
        low=None if found.low is None else max(found.low, bounds[0]),
        high=None if found.high is None else min(found.high, bounds[1]),
        reason=found.why,
        clips=clips,
        prompts=found.prompts,
        seeds=found.seeds,
        sample=sample,
    )


def of_timing(row: Row, machine: str, metric: str, timings: tuple[Timed, ...], problems: Problems) -> Cell:
    """Median and range over processes, or over the rounds of the only one."""
    empty = Cell(row.name, machine, metric)
    if not timings:
        state, reason = problems.get((BOARD, machine, ""), (NOT_RUN, f"{row.name} has not been profiled on {machine}"))
        return dataclasses.replace(empty, state=state, reason=reason)
    found = [timed for timed in timings if metric in timed.columns]
    if not found:
        return dataclasses.replace(empty, state=LEFT_OUT, reason=f"'{metric}' does not apply: {row.name} does not stream, or not for long enough")
    rounds = {key: value for timed in found for key, value in timed.columns[metric].items()}
    spread = timing.spread(rounds)
    sources = tuple(source(timed.run.name, timed.run, weights_sha256=timed.weights_sha256, timed=timed.contender) for timed in found)
    return dataclasses.replace(empty, value=spread.median, low=spread.low, high=spread.high, repeats=spread.repeats, sources=sources, rounds=rounds)


def rank(cells: dict[tuple[str, str, str], Cell], metrics: dict[str, Metric]) -> None:
    """Mark the best number of each column, those that cannot be told from it, and the ranks that each may have.

    Closed entries compete among themselves; where there is none, the open ones do.
    """
    for column, metric in dict.fromkeys(place[1:] for place in cells):
        numbers = {place: cell for place, cell in cells.items() if place[1:] == (column, metric) and cell.value is not None}
        numbers = {place: cell for place, cell in numbers.items() if not cell.open} or numbers
        if len(numbers) < 2:
            continue
        higher = metrics[metric].higher_is_better
        leader = max(numbers, key=lambda place: (1 if higher else -1) * (numbers[place].value or 0.0))
        ranks: dict[tuple[str, str, str], tuple[int, int]] = {}
        with contextlib.suppress(ValueError):  # not the same prompts: no ranks
            samples = {place: cell.sample for place, cell in numbers.items() if cell.sample is not None}
            ranks = dict(zip(samples, statistics.ranks(list(samples.values()), higher_is_better=higher), strict=True))
        for place, cell in numbers.items():
            tied = place != leader and _tied(numbers[leader], cell)
            cells[place] = dataclasses.replace(cell, best=place == leader, tied=tied, ranks=ranks.get(place))


def _tied(leader: Cell, cell: Cell) -> bool:
    """Whether the difference from the leader may be zero: by their paired interval, or for timings of separate runs by overlapping ranges."""
    if leader.sample is None or cell.sample is None:
        with contextlib.suppress(ValueError):
            ratio = timing.compared(leader.rounds, cell.rounds, higher_is_better=True)
            return ratio.low is None or ratio.high is None or ratio.low <= 1 <= ratio.high
        return None not in (leader.low, leader.high, cell.low, cell.high) and not (cell.high < leader.low or leader.high < cell.low)  # type: ignore[operator]
    try:
        found = statistics.difference(leader.sample, cell.sample)
    except ValueError:  # not the same prompts
        return False
    return statistics.verdict(found.low, found.high) == statistics.INCONCLUSIVE
