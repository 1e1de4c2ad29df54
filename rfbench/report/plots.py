"""Plots of a board as SVG that takes its colours from the page it stands in.

Every series has the colour of its row, everywhere: the first eight rows the palette, later ones the same colours dashed.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from rfbench import statistics
from rfbench.report.cells import NUMBER, Row
from rfbench.report.evidence import Timed, Training
from rfbench.report.leaderboard import Board
from rfbench.report.tables import label, unit_of
from rfbench.scorers.base import segments

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart for colour-blind readers (after Okabe and Ito), on white and, in the second list, on near-black.
LIGHT = ("#0072b2", "#d55e00", "#00855f", "#a0529c", "#b07d00", "#3a9ad9", "#4a4a4a", "#7a7400")
DARK = ("#5ab4f0", "#ff8a4c", "#3fcf9f", "#e08fd6", "#f0c04a", "#a8d8ff", "#c8c8c8", "#d6cf4a")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)))
STATISTICS = {  # of a training log, in the order shown
    "reward": "reward of the student's clips",
    "weight_ess": "effective share of the batch after weighting",
    "weight": "weight exp(reward / beta)",
    "loss": "generator loss",
    "critic_loss": "critic loss",
    "matching_gradient": "size of the matching gradient",
    "grad_norm_generator": "generator gradient norm, before clipping",
    "grad_norm_critic": "critic gradient norm, before clipping",
}


# Place holders in a figure that become the page's colours.
SERIES = tuple(f"#fe00{i:02x}" for i in range(len(LIGHT)))
INK, FAINT = "#fd0000", "#fd0001"


@dataclass(frozen=True)
class Plot:
    """A figure for the page; `rows` are the numbers of the rows that have a series in it."""

    title: str
    text: str  # one sentence below it
    svg: str
    rows: tuple[int, ...]


def page_plots(board: Board) -> dict[str, list[Plot]]:
    """All plots by section: `time` (segments of clips), `speed` (timings) and `training` (logs)."""
    numbers = {row.name: i for i, row in enumerate(board.rows)}
    found: dict[str, list[Plot]] = {"time": [], "speed": [], "training": []}
    for suite in reversed(board.suites):  # the longest, which has most to say, usually comes last
        for metric in board.columns[suite]:
            series = [(row, *one) for row in board.rows if (one := _over_time(board, row, suite, metric)) is not None]
            if series and len(series[0][1]) > 2:
                found["time"].append(_time_plot(board, suite, metric, series, numbers))
    for machine in board.hardware:
        found["speed"] += _speed_plots(board, machine, numbers)
    logs = _logs(board)
    for name, text in STATISTICS.items():
        lines = [(numbers[row.name], log, log.columns[name]) for row, log in logs if name in log.columns]
        if lines and any(sum(value is not None for value in column) > 1 for _, _, column in lines):
            found["training"].append(_training_plot(name, text, lines))
    return found


def _over_time(board: Board, row: Row, suite: str, metric: str) -> tuple[list[float], list[statistics.Interval]] | None:
    """Centres of a row's segments in seconds, and the interval of the metric in each."""
    if board.cells[row.name, suite, metric].state != NUMBER:
        return None
    gathered: list[tuple[tuple[float, ...], int, int]] = []
    clip = None
    for number, run in enumerate(row.runs):
        for item in board.scores[run, suite]:
            if metric not in item.segments:
                continue
            for clip in board.benches[run, suite].clips:
                if clip.id in item.segments[metric]:
                    gathered.append((item.segments[metric][clip.id], clip.prompt_id, number))
    if not gathered or clip is None or len({len(values) for values, _, _ in gathered}) != 1:
        return None
    pieces = segments(clip.frames, clip.fps)
    if len(pieces) != len(gathered[0][0]):
        return None
    prompts, seeds = [prompt for _, prompt, _ in gathered], [seed for _, _, seed in gathered]
    centres = [(piece.start + piece.stop) / 2 / clip.fps for piece in pieces]
    return centres, [statistics.mean(statistics.sample([values[k] for values, _, _ in gathered], prompts, seeds)) for k in range(len(pieces))]


def _time_plot(board: Board, suite: str, metric: str, series: Sequence[Any], numbers: dict[str, int]) -> Plot:
    figure, axes = panel()
    for row, centres, intervals in series:
        number = numbers[row.name]
        line(axes, number, centres, [one.value for one in intervals])
        if all(one.low is not None for one in intervals):
            _band(axes, number, centres, [one.low for one in intervals], [one.high for one in intervals])
    axes.set_xlabel("seconds into the clip")
    axes.set_ylabel(unit_of(board.metrics[metric])[1])
    axes.set_xlim(left=0)
    title = f"{label(metric).capitalize()} over time, {suite}"
    better = "higher" if board.metrics[metric].higher_is_better else "lower"
    text = f"Means over clips in pieces of two seconds, with 95\u00a0% intervals; {better} is better."
    return Plot(title, text, svg(figure, title, board), tuple(numbers[row.name] for row, *_ in series))


def _speed_plots(board: Board, machine: str, numbers: dict[str, int]) -> Iterator[Plot]:
    timed = [(row, board.timings[row.name, machine]) for row in board.rows if (row.name, machine) in board.timings]
    curves = [(row, *curve) for row, timings in timed if (curve := fps_by_length(timings)) is not None]
    rows = tuple(numbers[row.name] for row, *_ in curves)
    if curves:
        figure, axes = panel()
        for row, frames, fps in curves:
            line(axes, numbers[row.name], frames, fps)
        axes.set_xlabel("pixel frames made so far")
        axes.set_ylabel("FPS")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        title = f"FPS against length of the video, {machine}"
        yield Plot(title, "End-to-end frames per second of each chunk, median over rounds: flat is constant cost.", svg(figure, title, board), rows)
    pair = ("profile.dit_fps", "profile.e2e_fps")
    both = [row for row, _ in timed if all(board.cells.get((row.name, machine, metric)) for metric in pair)]
    both = [row for row in both if all(board.cells[row.name, machine, metric].state == NUMBER for metric in pair)]
    if both:
        figure, axes = panel(height=0.6 + 0.21 * len(both))
        for place, row in enumerate(both):
            colour = SERIES[numbers[row.name] % len(SERIES)]
            ends = [board.cells[row.name, machine, metric] for metric in pair]
            axes.plot([cell.value or 0.0 for cell in ends], [place, place], color=FAINT, lw=1.2, zorder=1)
            for cell, filled in zip(ends, (False, True), strict=True):
                axes.plot([cell.low or 0.0, cell.high or 0.0], [place, place], color=colour, lw=1.6, zorder=2)
                face = colour if filled else "none"
                axes.plot([cell.value or 0.0], [place], "o", ms=6, mec=colour, mfc=face, mew=1.4, zorder=3)
        axes.set_yticks(range(len(both)), [row.name for row in both])
        axes.set_ylim(len(both) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("FPS")
        title = f"What the decoder costs, {machine}"
        text = "Rings: denoiser alone (DiT FPS). Dots: end to end. Lines through them: range over rounds."
        yield Plot(title, text, svg(figure, title, board), tuple(numbers[row.name] for row in both))


def fps_by_length(timings: Sequence[Timed]) -> tuple[list[int], list[float]] | None:
    """Frames made when a chunk is readable, and its frames over the time since the chunk before was: medians over repetitions."""
    by_index: dict[int, list[tuple[int, float]]] = {}
    for chunks in (stream for timed in timings for stream in timed.streams):
        made = chunks[0].frames if chunks else 0
        for before, chunk in itertools.pairwise(chunks):
            made += chunk.frames
            by_index.setdefault(chunk.index, []).append((made, chunk.frames / (chunk.readable - before.readable)))
    if len(by_index) < 3:
        return None
    return [found[0][0] for _, found in sorted(by_index.items())], [median(fps for _, fps in found) for _, found in sorted(by_index.items())]


def _logs(board: Board) -> list[tuple[Row, Training]]:
    """The training logs of the board's rows."""
    return [(row, log) for row in board.rows for log in board.trainings if log.run.name in row.runs]


def _training_plot(name: str, text: str, lines: Sequence[tuple[int, Training, Sequence[float | None]]]) -> Plot:
    figure, axes = panel()
    for number, log, column in lines:
        points = [(step, value) for step, value in zip(log.steps, column, strict=True) if value is not None]
        line(axes, number, [step for step, _ in points], [value for _, value in points], width=1.2)
    axes.set_xlabel("training step")
    axes.set_xlim(left=0)
    rows = tuple(sorted({number for number, *_ in lines}))
    return Plot(text[0].upper() + text[1:], f"{name} in the training log; a line per training seed.", svg(figure, text, None), rows)


def panel(width: float = 3.8, height: float = 2.5) -> tuple[Figure, Axes]:
    """A figure with the page's manners: one panel, no frame, faint horizontal lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.locator_params(nbins=5)
    _manners(axes)
    return figure, axes


def _manners(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(INK)
        text.set_fontsize(9)


def line(axes: Axes, number: int, x: Sequence[float], y: Sequence[float], width: float = 1.8) -> None:
    style: Any = DASHES[number // len(SERIES) % len(DASHES)]
    axes.plot(x, y, color=SERIES[number % len(SERIES)], ls=style, lw=width, gid=f"s{number}", solid_capstyle="round")


def _band(axes: Axes, number: int, x: Sequence[float], low: Sequence[float], high: Sequence[float]) -> None:
    axes.fill_between(x, low, high, color=SERIES[number % len(SERIES)], alpha=0.1, lw=0, gid=f"b{number}")


def svg(figure: Figure, title: str, board: Board | None, salt: str = "") -> str:
    """A figure as inline SVG: page colours, page fonts, classes instead of ids, a title for those who cannot see it.

    What its parts refer to by id is unique on a page if title and `salt` are.
    """
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title + salt}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'id="(s|b)(\d+)"', lambda found: f'class="{"series" if found[1] == "s" else "band"} r{found[2]}"', text)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    for number, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--c{number})")
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--line)")
    names = {str(number): row.name for number, row in enumerate(board.rows)} if board else {}
    text = re.sub(r'(<g class="series r(\d+)">)', lambda found: found[1] + (f"<title>{_escaped(names[found[2]])}</title>" if names else ""), text)
    head = f'<svg class="plot" role="img" aria-label="{_escaped(title)}" viewBox='
    return re.sub(r"<svg [^>]*?viewBox=(\"[^\"]*\")[^>]*>", lambda found: f"{head}{found[1]}>", text, count=1, flags=re.DOTALL).strip()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
