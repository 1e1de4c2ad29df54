"""The picture that stands for a report in a README: stills of one prompt by every contender, then the claims."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rfbench.report.claims import Finding
from rfbench.report.film import Scene
from rfbench.report.leaderboard import Board
from rfbench.report.tables import counted, finding_numbers, improvement
from rfbench.statistics import CONTRADICTED, REPRODUCED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VERDICT_COLOURS = {REPRODUCED: "#0072b2", CONTRADICTED: "#c04a00"}
QUIET, FAINT, INK = "#6a6a6a", "#d8d8d8", "#222222"
MOST = 14  # contenders
CLAIMS = 30  # of which so many are shown
ROW = 0.39  # inches, of a contender


def overview(board: Board, findings: Sequence[Finding], shown: Sequence[Scene]) -> bytes:
    """The picture as PNG; the same bytes for the same board and libraries."""
    from matplotlib.figure import Figure

    first = [scene for scene in shown if scene.suite == shown[0].suite]
    scenes = list({scene.clip: scene for scene in (first[len(first) // 3], first[-1])}.values()) if first else []
    names = [film.row for film in scenes[0].films][:MOST] if scenes else []
    heights = [0.42 + ROW * len(names), 0.5 + 0.4 * min(len(findings), CLAIMS) + 0.3 * (len(findings) > CLAIMS)]
    figure = Figure(figsize=(9.6, sum(heights)), dpi=110, facecolor="white")
    top = figure.add_axes((0, heights[1] / sum(heights), 1, heights[0] / sum(heights)))
    below = figure.add_axes((0, 0, 1, heights[1] / sum(heights)))
    _stills(top, scenes, names)
    if findings:
        _claims(below, board, findings)
    for axes, height in zip((top, below), heights, strict=True):
        axes.set_xlim(0, 9.6)
        axes.set_ylim(height, 0)
        axes.axis("off")
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _stills(axes: Axes, scenes: Sequence[Scene], names: Sequence[str]) -> None:
    """The strips of one or two prompts beside each other, a row per contender."""
    import numpy as np
    from PIL import Image

    for column, scene in enumerate(scenes):
        left = 1.75 + 3.95 * column
        axes.text(left, 0.2, _plain(f"“{scene.prompt}”", 48), fontsize=9.5, color=INK, va="center", weight="bold", parse_math=False)
        for film in scene.films:
            if film.row in names:
                top = 0.38 + ROW * names.index(film.row)
                strip = np.asarray(Image.open(io.BytesIO(film.strip)))
                width = min(3.8, (ROW - 0.04) * strip.shape[1] / strip.shape[0])
                axes.imshow(strip, extent=(left, left + width, top + ROW - 0.04, top), aspect="auto", interpolation="antialiased")
    for place, name in enumerate(names):
        axes.text(0.15, 0.38 + ROW * (place + 0.45), _plain(name, 20), fontsize=9, color=INK, va="center", parse_math=False)


def _claims(axes: Axes, board: Board, findings: Sequence[Finding]) -> None:
    """A row per claim: verdict, words, and the interval beside zero and the claimed margin, each on a scale of its own."""
    axes.text(0.15, 0.2, f"Claims: {counted(findings)}", fontsize=10, color=INK, va="center", weight="bold")
    if len(findings) > CLAIMS:
        told = f"and {len(findings) - CLAIMS} more, which are in the table of claims"
        axes.text(1.35, 0.5 + 0.4 * CLAIMS, told, fontsize=8.5, color=QUIET, va="center")
    for place, finding in enumerate(findings[:CLAIMS]):
        y = 0.55 + 0.4 * place
        colour = VERDICT_COLOURS.get(finding.verdict, QUIET)
        axes.text(0.15, y, finding.verdict, fontsize=9, color=colour, va="center", weight="bold")
        axes.text(1.35, y, "\n".join(textwrap.wrap(_plain(finding.claim.text, 110), 58)[:2]), fontsize=8.5, color=INK, va="center", parse_math=False)
        axes.plot([6.2, 6.2], [y - 0.14, y + 0.14], color=FAINT, lw=1.5)
        if finding.value is None:
            continue
        margin = finding.claim.margin / finding_numbers(board, finding)[0]
        reach = max(abs(value) for value in (finding.value, finding.low, finding.high, margin) if value is not None) or 1.0

        def across(value: float, reach: float = reach) -> float:
            return 6.2 + 0.7 * value / reach

        if margin:
            axes.plot([across(margin)] * 2, [y - 0.14, y + 0.14], color=INK, lw=1, ls=(0, (2, 1.5)))
        if finding.low is not None and finding.high is not None:
            axes.plot([across(finding.low), across(finding.high)], [y, y], color=colour, lw=2, solid_capstyle="round")
        axes.plot([across(finding.value)], [y], "o", color=colour, ms=5)
        axes.text(7.05, y, improvement(board, finding), fontsize=8, color=INK, va="center", parse_math=False)


def _plain(text: str, limit: int) -> str:
    """Text that the picture's font can show, shortened."""
    from matplotlib import font_manager

    face = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    letters = "".join(letter if face.get_char_index(ord(letter)) else "□" for letter in " ".join(text.split())[: limit + 1])
    return letters if len(letters) <= limit else letters[: limit - 1] + "…"
