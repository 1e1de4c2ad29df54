"""The board as one HTML file: template, style and script put together with the data, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import rfbench
from rfbench import published as papers
from rfbench.report import account, deciding, plots, reported, tradeoffs
from rfbench.report.answers import answers, ranked
from rfbench.report.cells import LEFT_OUT, NUMBER, Cell, Row
from rfbench.report.claims import Finding
from rfbench.report.film import Film, Scene
from rfbench.report.leaderboard import Board
from rfbench.report.tables import (
    arrow,
    column_decimals,
    divided,
    finding_numbers,
    improvement,
    label,
    left_out,
    printed,
    published,
    ranged,
    shown,
    unit_of,
)
from rfbench.statistics import CONTRADICTED, INCONCLUSIVE, NOT_RUN, REPRODUCED, VERDICTS

TEMPLATES = Path(__file__).resolve().parent / "templates"
ICONS = {REPRODUCED: "✓", CONTRADICTED: "✕", INCONCLUSIVE: "≈", NOT_RUN: "○"}
LONGEST = 160  # letters of a prompt on the page
SECTIONS = {  # plots: id -> name, introduction
    "against": ("Against each other", "All metrics at once, what quality costs in speed, and who wins prompt by prompt."),
    "time": (
        "Over the length of a clip",
        "How motion and picture quality hold. Point at a line to single it out; the buttons choose the contenders of all plots.",
    ),
    "speed": ("Speed", "Frames per second as a viewer of a stream would get them, after warm-up."),
    "training": ("Training", "What the training runs logged on the way. One line per training seed, in the colour of its contender."),
}


def to_html(
    board: Board,
    findings: Sequence[Finding],
    scenes: Sequence[Scene],
    summary: str,
    commands: Sequence[str],
    *,
    folder: Path | None = None,
    embed: bool = False,
) -> str:
    """The page. Everything that a run may contain (prompts above all) is escaped.

    Players show small pictures of the clips and link their videos if the page will lie in `folder`; with `embed` the videos
    themselves are in the page, whatever their size.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"slug": lambda text: text.replace(" ", "-"), "icon": ICONS.__getitem__, "short": lambda text: (text or "–")[:10]}
    template = environment.from_string((TEMPLATES / "report.html.j2").read_text(encoding="utf-8"))
    numbers = {row.name: i for i, row in enumerate(board.rows)}
    sources: dict[str, int] = {}
    tables = [_table(board, column, sources) for column in (*board.suites, *board.hardware)]
    drawn = {"against": list(tradeoffs.compared_plots(board))} | plots.page_plots(board)
    drawn["speed"] += [plot for machine in board.hardware if (plot := tradeoffs.latency_plot(board, machine)) is not None]
    plot_sections = [(id_, *SECTIONS[id_], found) for id_, found in drawn.items() if found]
    rows = [
        {
            "number": i,
            "name": row.name,
            "title": row.title,
            "note": row.note,
            "saw": ", ".join(row.saw),
            "seeds": len(row.seeds),
        }
        for i, row in enumerate(board.rows)
    ]
    return template.render(
        board=board,
        version=rfbench.__version__,
        summary=summary,
        answers=answers(board, findings),
        facts=account.facts(board),
        tally=[(verdict, sum(finding.verdict == verdict for finding in findings)) for verdict in VERDICTS],
        sections=_sections(findings, scenes, plot_sections),
        findings=[_finding(board, finding) for finding in findings],
        tables=tables,
        untested=_untested(findings),
        reported=reported.shown_rows(board),
        scenes=[_stills(scene, numbers) for scene in scenes],
        plot_sections=plot_sections,
        rows=rows,
        commands=commands,
        runs=_runs(board),
        words=[_word(board, metric) for metric in dict.fromkeys(metric for found in board.columns.values() for metric in found)],
        limits=account.limits(board, findings),
        css=_style(),
        js=(TEMPLATES / "report.js").read_text(encoding="utf-8"),
        data=_embedded(
            {
                "rows": len(board.rows),
                "sources": [json.loads(text) for text in sources],
                "scenes": [_playable(scene, numbers, folder, embed) for scene in scenes],
            }
        ),
    )


def _style() -> str:
    """The style sheet with the palette of the plots in it."""
    text = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    for name, palette in (("SERIES_LIGHT", plots.LIGHT), ("SERIES_DARK", plots.DARK)):
        text = text.replace(name, " ".join(f"--c{i}: {colour};" for i, colour in enumerate(palette)))
    return text.replace("SERIES_CLASSES", "\n".join(f".c{i} {{ color: var(--c{i}) }}" for i in range(len(plots.LIGHT))))


def _embedded(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _sections(findings: Sequence[Finding], scenes: Sequence[Scene], plot_sections: Sequence[Any]) -> list[tuple[str, str]]:
    found = [("claims", "Claims")] if findings else []
    found.append(("leaderboard", "Leaderboard"))
    found += [("watch", "Side by side"), ("stills", "Contact sheets")] if scenes else []
    found += [(id_, name) for id_, name, *_ in plot_sections]
    return [*found, ("again", "Do it again"), ("words", "Definitions"), ("limits", "Limits")]


def _finding(board: Board, finding: Finding) -> dict[str, Any]:
    claim, metric = finding.claim, board.metrics.get(finding.claim.metric)
    measured = finding.value is not None and finding.better is not None and finding.than is not None
    what = f"{label(claim.metric)} {arrow(metric) if metric else ''}{f', {claim.suite}' if claim.suite else ''}"
    told = None
    if finding.printed is not None:
        difference = published(finding)
        told = f"{difference}{': ' if difference else ''}{finding.printed[0].text} against {finding.printed[1].text} ({finding.printed[0].table})"
    return {
        "id": claim.id,
        "verdict": finding.verdict,
        "text": claim.text,
        "names": (claim.better, claim.than),
        "better": _side(board, finding.better) if measured else None,
        "than": _side(board, finding.than) if measured else None,
        "what": what,
        "reason": (finding.reason if finding.verdict == NOT_RUN else finding.reason[0].upper() + finding.reason[1:]) + "." + _carried(finding),
        "improvement": improvement(board, finding),
        "drawing": _drawing(board, finding) if measured else None,
        "published": told,
        "details": deciding.details(board, finding),
        "plots": deciding.plots_of(board, finding),
    }


def _untested(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Text and place of the paper's claims that a study about some of them does not test."""
    tested = {finding.claim.says or finding.claim.id for finding in findings}
    statements = papers.statements()
    return [(one.text, one.said) for name, one in statements.items() if name not in tested] if tested & statements.keys() else []


def _side(board: Board, cell: Cell | None) -> dict[str, str]:
    assert cell is not None
    return {"name": cell.row, "value": printed(board, cell, column_decimals(board, cell.column, cell.metric))[0]}


def _carried(finding: Finding) -> str:
    return f" {finding.seeds} training seeds." if finding.seeds > 1 and finding.value is not None else ""


def _drawing(board: Board, finding: Finding) -> dict[str, float | None]:
    """Places on a line of 220 units with zero in the middle."""
    scale = finding_numbers(board, finding)[0]
    ends = {"value": finding.value, "low": finding.low, "high": finding.high, "margin": finding.claim.margin or None}
    values = {name: None if end is None else end * (1 if name == "margin" else scale) for name, end in ends.items()}
    reach = max((abs(value) for value in values.values() if value is not None), default=0.0) or 1.0
    return {"zero": 110.0} | {name: None if value is None else round(110 + 100 * value / reach, 2) for name, value in values.items()}


def _table(board: Board, column: str, sources: dict[str, int]) -> dict[str, Any]:
    timed = column in board.hardware
    places = {metric: column_decimals(board, column, metric) for metric in board.columns[column]}
    reach = {metric: _reach(board, column, metric) for metric in board.columns[column]}
    rows = {
        row.name: {
            "number": i,
            "name": row.name,
            "seeds": len(row.seeds),
            "cells": [
                _cell(board, row, board.cells[row.name, column, metric], places[metric], reach[metric], sources) for metric in board.columns[column]
            ],
        }
        for i, row in enumerate(board.rows)
    }
    closed, apart = divided(board, column)
    groups = [("", [rows[name] for name in closed])]
    for reason in dict.fromkeys(apart.values()):  # a reason is said once, above the rows that it holds for
        groups.append((reason, [rows[name] for name, why in apart.items() if why == reason]))
    heads = [
        {
            "label": label(metric),
            "arrow": arrow(board.metrics[metric]),
            "better": f"{'higher' if board.metrics[metric].higher_is_better else 'lower'} is better",
            "unit": unit_of(board.metrics[metric])[1],
            "text": board.metrics[metric].text,
        }
        for metric in board.columns[column]
    ]
    return {
        "title": f"Speed on {column}" if timed else column,
        "subtitle": _subtitle(board, column, timed),
        "heads": heads,
        "groups": groups,
        "absent": left_out(board, column),
    }


def _subtitle(board: Board, column: str, timed: bool) -> str:
    if timed:
        return "median and range over rounds, or over processes where there are several"
    clips = next((bench.clips for (_, suite), bench in board.benches.items() if suite == column), ())
    return f"{len(clips)} clips of {clips[0].frames / clips[0].fps:.0f} s per run, {len({clip.prompt_id for clip in clips})} prompts" if clips else ""


def _reach(board: Board, column: str, metric: str) -> tuple[float, float] | None:
    """From where to where the bars of a column go."""
    cells = [board.cells[row.name, column, metric] for row in board.rows]
    ends = [end for cell in cells for end in (cell.low, cell.high, cell.value) if end is not None]
    return (min(ends), max(ends)) if ends and min(ends) < max(ends) else None


def _cell(board: Board, row: Row, cell: Cell, places: int, reach: tuple[float, float] | None, sources: dict[str, int]) -> dict[str, Any]:
    of = f"{cell.row}, {cell.metric}, {cell.column}"
    if cell.state != NUMBER or cell.value is None:
        state = "–" if cell.state == LEFT_OUT else cell.state
        return {"text": None, "state": state, "reason": cell.reason, "of": of}
    text, interval = printed(board, cell, places)
    bar = None
    if reach is not None and cell.low is not None and cell.high is not None:
        wide = reach[1] - reach[0]
        bar = [round(100 * part / wide, 1) for part in (cell.low - reach[0], cell.high - cell.low, cell.value - reach[0])]
    seeds = dict(zip(row.runs, row.seeds, strict=False))
    numbers = []
    for source in cell.sources:
        run = source["run"].rpartition("/")[0]
        key = json.dumps(source | ({"training_seed": seeds[run]} if run in seeds else {}), sort_keys=True)
        numbers.append(str(sources.setdefault(key, len(sources))))
    unit = unit_of(board.metrics[cell.metric])[1]
    kind = "range" if cell.repeats else "95 % interval"
    full = f"{shown(cell.value, 6)} {board.metrics[cell.metric].unit}, {kind} {ranged(cell.low, cell.high, 6) or 'not defined'}"
    if cell.repeats:
        counts = f"{cell.repeats} repetitions"
    else:
        counts = f"{cell.clips} clips of {cell.prompts} prompts" + (f", {cell.seeds} training seed{'s' * (cell.seeds > 1)}" if row.seeds else "")
    flags = {"best": cell.best, "tied": cell.tied, "saw": cell.saw}
    return {
        "text": text,
        "interval": interval,
        "bar": bar,
        "raw": f"{cell.value:.9g}",
        "of": of,
        "unit": unit,
        "counts": counts,
        "sources": " ".join(numbers),
        "reason": cell.reason,
        "ranks": ranked(cell),
        "open": cell.open,
        "full": full,
        **flags,
    }


def _uri(content: bytes, kind: str = "image/webp") -> str:
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def _link(video: Path, folder: Path | None) -> str | None:
    """The way from a page's folder to a video, where both lie in the project: another's disk is nobody's business."""
    if folder is None or not all(path.absolute().is_relative_to(Path.cwd()) for path in (video, folder)):
        return None
    return quote(Path(os.path.relpath(video.absolute(), folder.absolute())).as_posix())


def _short(prompt: str) -> str:
    text = " ".join(prompt.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _stills(scene: Scene, numbers: dict[str, int]) -> dict[str, Any]:
    def one(film: Film) -> dict[str, Any]:
        stills = len(scene.times)
        size = {"strip_width": stills * (film.width + 4) - 4, "strip_height": film.height}
        return {"name": film.row, "number": numbers[film.row], "strip": _uri(film.strip), "alt": f"{stills} stills of {film.row}", **size}

    times = [f"{time:.1f} s" for time in scene.times]
    return {"suite": scene.suite, "clip": scene.clip, "short": _short(scene.prompt), "times": times, "films": [one(film) for film in scene.films]}


def _playable(scene: Scene, numbers: dict[str, int], folder: Path | None, embed: bool) -> dict[str, Any]:
    films = [
        {
            "name": film.row,
            "number": numbers[film.row],
            "sheet": None if embed else _uri(film.sheet),
            "video": _uri(film.video.read_bytes(), "video/mp4") if embed else None,
            "link": None if embed else _link(film.video, folder),
            "columns": film.columns,
            "frames": film.frames,
            "fps": film.fps,
            "width": film.width,
            "height": film.height,
        }
        for film in scene.films
    ]
    fps = scene.fps if embed else scene.films[0].fps
    return {"prompt": _short(scene.prompt), "seconds": scene.seconds, "fps": fps, "films": films}


def _runs(board: Board) -> list[dict[str, Any]]:
    """Every run once, for those who read without JavaScript."""
    found: dict[str, dict[str, Any]] = {}
    for cell in board.cells.values():
        for source in cell.sources:
            found.setdefault(source["run"], {"weights_sha256": None, "suite_sha256": None} | source)
    return list(found.values())


def _word(board: Board, metric: str) -> dict[str, str]:
    told = board.metrics[metric]
    better = "higher is better" if told.higher_is_better else "lower is better"
    return {"name": metric, "unit": unit_of(told)[1], "better": better, "text": told.text}
