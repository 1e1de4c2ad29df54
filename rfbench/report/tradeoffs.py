"""Plots that set contenders against each other: all metrics of a suite at once, quality against speed, latencies, prompts won."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from rfbench import statistics
from rfbench.report.cells import NUMBER, Cell
from rfbench.report.leaderboard import Board
from rfbench.report.plots import FAINT, INK, SERIES, Plot, line, panel, svg
from rfbench.report.tables import arrow, label, unit_of

QUALITY = ("total", "imaging_quality")  # what stands for quality against speed: the first of these that a suite has
MOTION = "dynamic_degree"
FPS = "profile.e2e_fps"


def compared_plots(board: Board) -> Iterator[Plot]:
    """Per suite the profile of all metrics, quality against speed on every machine, and the prompts won in motion."""
    for suite in board.suites:
        if (plot := _profile(board, suite)) is not None:
            yield plot
        for machine in board.hardware:
            if (plot := _front_plot(board, suite, machine)) is not None:
                yield plot
        if (plot := _wins_plot(board, suite)) is not None:
            yield plot


def _named(board: Board, suite: str, name: str) -> str | None:
    return next((metric for metric in board.columns[suite] if metric.partition(".")[2] == name), None)


def _cells(board: Board, column: str, metric: str) -> dict[int, Cell]:
    """Row number -> cell, of the rows that have a number."""
    found = {i: board.cells.get((row.name, column, metric)) for i, row in enumerate(board.rows)}
    return {i: cell for i, cell in found.items() if cell is not None and cell.state == NUMBER and cell.value is not None}


def _profile(board: Board, suite: str) -> Plot | None:
    """Parallel coordinates: an axis per metric from the worst contender to the best."""
    axes_of = {metric: _cells(board, suite, metric) for metric in board.columns[suite]}
    ranges = {metric: sorted(cell.value or 0.0 for cell in cells.values()) for metric, cells in axes_of.items() if cells}
    kept = [metric for metric, values in ranges.items() if values[-1] > values[0]]
    if len(kept) < 3:
        return None
    figure, axes = panel(height=1.2 + 0.22 * len(kept))
    for i in range(len(board.rows)):
        points = []
        for place, metric in enumerate(kept):
            if i in axes_of[metric]:
                share = ((axes_of[metric][i].value or 0.0) - ranges[metric][0]) / (ranges[metric][-1] - ranges[metric][0])
                points.append((share if board.metrics[metric].higher_is_better else 1 - share, place))
        if points:
            line(axes, i, [x for x, _ in points], [y for _, y in points], width=1.4)
    axes.set_yticks(range(len(kept)), [f"{label(metric)} {arrow(board.metrics[metric])}" for metric in kept])
    axes.set_ylim(len(kept) - 0.5, -0.5)
    axes.set_xticks([0, 1], ["worst here", "best here"])
    title = f"All metrics, {suite}"
    text = "Each line from the worst contender on the left to the best on the right, without intervals: small differences look large."
    return Plot(title, text, svg(figure, title, board), tuple(range(len(board.rows))))


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The Pareto front: which points no other passes in one coordinate without falling behind in the other; by the first coordinate."""

    def beaten(x: float, y: float) -> bool:
        return any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)

    return sorted((i for i, point in enumerate(points) if not beaten(*point)), key=lambda i: points[i])


def _front_plot(board: Board, suite: str, machine: str) -> Plot | None:
    metric = next((found for name in QUALITY if (found := _named(board, suite, name)) is not None), None)
    if metric is None:
        return None
    quality, speed = _cells(board, suite, metric), _cells(board, machine, FPS)
    numbers = [i for i in quality if i in speed]
    if len(numbers) < 2:
        return None
    figure, axes = panel()
    sign = 1 if board.metrics[metric].higher_is_better else -1
    points = [(speed[i].value or 0.0, quality[i].value or 0.0) for i in numbers]
    ahead = front([(x, sign * y) for x, y in points])
    best = [points[k] for k in ahead]
    axes.plot(*zip(*best, strict=True), color=INK, lw=0.8, ls=":", zorder=1)
    for i, (x, y) in zip(numbers, points, strict=True):
        colour: Any = SERIES[i % len(SERIES)]
        for cell, along in ((speed[i], True), (quality[i], False)):
            ends = [cell.low, cell.high]
            if None not in ends:
                axes.plot(ends if along else [x, x], [y, y] if along else ends, color=colour, lw=1, alpha=0.5, gid=f"b{i}")  # type: ignore[arg-type]
        axes.plot([x], [y], "o", ms=6, color=colour, mfc=colour if i < len(SERIES) else "none", gid=f"s{i}", zorder=3)
    axes.set_xlabel(f"end-to-end FPS on {machine}")
    axes.set_ylabel(f"{label(metric)} {unit_of(board.metrics[metric])[1]}")
    title = f"{label(metric).capitalize()} against speed, {suite} on {machine}"
    text = f"On the Pareto front (dotted; nobody passes them in both): {', '.join(board.rows[numbers[k]].name for k in ahead)}."
    text += " Lines through points: 95\u00a0% interval and range over rounds."
    return Plot(title, text, svg(figure, title, board), tuple(numbers))


def wins(one: Any, other: Any) -> float:
    """Share of prompts on which the first sample is higher; a tie is half a win.

    Raises:
        ValueError: the two are not over the same clips.
    """
    gaps = one.total.mean(0) - statistics.paired(one, other).total.mean(0)
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())


def _wins_plot(board: Board, suite: str) -> Plot | None:
    metric = _named(board, suite, MOTION)
    cells = {} if metric is None else {i: cell for i, cell in _cells(board, suite, metric).items() if cell.sample is not None}
    if metric is None or not 2 <= len(cells) <= 20:  # more have no room for a number
        return None
    figure, axes = panel(height=1.3 + 0.2 * len(cells))
    for (down, i), (along, j) in itertools.permutations(enumerate(cells), 2):
        try:
            share = wins(cells[i].sample, cells[j].sample)
        except ValueError:  # not the same clips
            continue
        share = share if board.metrics[metric].higher_is_better else 1 - share
        axes.text(along, down, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=INK, fontweight="bold" if share > 0.5 else "normal")
    names = [board.rows[i].name for i in cells]
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.spines["bottom"].set_color(FAINT)
    title = f"Prompts won in {label(metric)}, {suite}"
    text = "Per cent of prompts on which the row beats the column; a tie is half a win. Same prompts and samples."
    return Plot(title, text, svg(figure, title, board), tuple(cells))


def latency_plot(board: Board, machine: str) -> Plot | None:
    """How long a viewer waits for the next chunk: the share of chunks that came within a time."""
    found = {}
    for i, row in enumerate(board.rows):
        streams = [stream for timed in board.timings.get((row.name, machine), ()) for stream in timed.streams]
        gaps = sorted(1000 * (later.readable - before.readable) for stream in streams for before, later in itertools.pairwise(stream))
        if len(gaps) > 2:
            found[i] = gaps
    if not found:
        return None
    figure, axes = panel()
    for i, gaps in found.items():
        line(axes, i, gaps, [100 * (k + 1) / len(gaps) for k in range(len(gaps))], width=1.4)
    axes.set_xlabel("milliseconds since the chunk before")
    axes.set_ylabel("% of chunks")
    axes.set_ylim(0, 102)
    title = f"How long the next chunk takes, {machine}"
    text = "The share of chunks that could be read within a time, all rounds together: a steep line is a steady stream."
    return Plot(title, text, svg(figure, title, board), tuple(found))
