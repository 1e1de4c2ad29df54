"""Two rows of a board against each other, clip by clip: the same prompts and samples, so the same noise where both ran here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfbench import records, statistics
from rfbench.errors import UserError
from rfbench.report import account, evidence, film, leaderboard, page
from rfbench.report.leaderboard import Board
from rfbench.report.tables import chance, decimals, label, ranged, shown, unit_of
from rfbench.statistics import Interval


@dataclass(frozen=True)
class Pair:
    """What one metric says about two rows."""

    column: str
    metric: str
    one: float
    other: float
    difference: Interval  # one - other, in the metric's unit
    p: float | None  # of no difference, by Holm for all metrics of the comparison
    wins: int  # prompts on which the first is better
    ties: int
    losses: int
    better: bool | None  # the first, the second, or not told


def pairs(board: Board, one: str, other: str) -> list[Pair]:
    """Every metric that both rows have; what is better is told by the paired interval.

    Raises:
        UserError: they have no metric of the same clips.
    """
    found = []
    for column in board.suites:
        for metric in board.columns[column]:
            first, second = board.cells[one, column, metric], board.cells[other, column, metric]
            if first.sample is None or second.sample is None:
                continue
            try:
                second_sample = statistics.paired(first.sample, second.sample)
            except ValueError as error:
                raise UserError(f"'{one}' and '{other}' cannot be compared on {column}: {error}") from None
            difference = statistics.difference(first.sample, second.sample)
            higher = board.metrics[metric].higher_is_better
            gaps = (first.sample.total.mean(0) - second_sample.total.mean(0)) * (1 if higher else -1)
            better = {statistics.REPRODUCED: higher, statistics.CONTRADICTED: not higher}.get(statistics.verdict(difference.low, difference.high))
            counts = int((gaps > 0).sum()), int((gaps == 0).sum()), int((gaps < 0).sum())
            found.append(Pair(column, metric, first.value or 0.0, second.value or 0.0, difference, difference.p(), *counts, better))
    if not found:
        raise UserError(f"'{one}' and '{other}' have no metric in common; score both: rfbench eval RUN")
    tested = [pair for pair in found if pair.p is not None]
    corrected = dict(zip(map(id, tested), statistics.holm([pair.p for pair in tested if pair.p is not None]), strict=True))
    return [dataclasses.replace(pair, p=corrected.get(id(pair))) for pair in found]


def table(board: Board, one: str, other: str) -> list[dict[str, str]]:
    """The same for people: a row per metric."""
    rows = []
    for pair in pairs(board, one, other):
        scale, unit = unit_of(board.metrics[pair.metric])
        value, low, high = (None if end is None else end * scale for end in (pair.difference.value, pair.difference.low, pair.difference.high))
        places = decimals([(value, low, high)])
        least = statistics.detectable(pair.difference)
        rows.append(
            {
                "suite": pair.column,
                "metric": label(pair.metric),
                "unit": "points" if unit == "%" else unit,
                one: shown(pair.one * scale, places),
                other: shown(pair.other * scale, places),
                "difference": shown(value, places, sign=True),
                "95 % interval": ranged(low, high, places, sign=True) or pair.difference.why,
                "p (Holm)": chance(pair.p),
                "prompts won / tied / lost": f"{pair.wins} / {pair.ties} / {pair.losses}",
                "would find": "" if least is None else shown(least * scale, places),
                "better": _told(pair, one, other),
            }
        )
    return rows


def _told(pair: Pair, one: str, other: str) -> str:
    """Who is better; a difference that does not outlive the correction for all metrics says so."""
    if pair.better is None:
        return "not told apart"
    alone = "" if pair.p is not None and pair.p <= 1 - statistics.LEVEL else ", were this the only metric"
    return (one if pair.better else other) + alone


def compare(one: Path, other: Path, out: Path | None = None) -> list[dict[str, Any]]:
    """Two generate runs (or records of such), paired; with `out` the page of the two is written there.

    Raises:
        UserError: one is not whole, they are not of the same suite and scorers, or they are one run.
    """
    if out is not None:
        records.refuse_unwritable(out, f"--out {out}")
    names = [evidence.run_of(path).name for path in (one, other)]
    if names[0] == names[1]:
        raise UserError(f"both are {names[0]}; name two runs, for example toy/ode-init/toy-short and toy/teacher/toy-short")
    board = leaderboard.read_runs([one, other])
    rows = [name.rpartition("/")[0] for name in names]
    if len(board.rows) < 2:
        raise UserError(f"{names[0]} and {names[1]} are one baseline on two suites, which have no clip in common; name two baselines on one suite")
    board = dataclasses.replace(board, title=f"{rows[0]} against {rows[1]}")
    found = table(board, rows[0], rows[1])
    if out is not None:
        again = [f"rfbench compare {names[0]} {names[1]} --out {out.name}"]
        text = page.to_html(board, (), film.scenes(board), account.summary(board), again, folder=out.parent)
        records.write_text(out, text)
    return found
