"""The board as text: Markdown for people, CSV with every number and where it came from, LaTeX for papers."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rfbench.published import Reported
from rfbench.report import claims
from rfbench.report.cells import INCOMPLETE, LEFT_OUT, NUMBER, Cell
from rfbench.report.claims import Finding
from rfbench.report.leaderboard import Board
from rfbench.scorers.base import Metric
from rfbench.statistics import LEVEL, VERDICTS

PICTURE = "overview.png"
CLIPS = "clips.webp"


def unit_of(metric: Metric) -> tuple[float, str]:
    """What a value is multiplied with to be shown, and the unit it then has."""
    return (1e-6, "MB") if metric.unit == "bytes" else (1.0, metric.unit)


def difference_unit(board: Board, finding: Finding) -> str:
    """The unit of an improvement: per cent of a timing, else that of the metric, and points where that is per cent."""
    metric = board.metrics[finding.claim.metric]
    return "%" if claims.timed(finding.claim) else "points" if metric.unit == "%" else unit_of(metric)[1]


def decimals(numbers: Sequence[tuple[float | None, float | None, float | None]]) -> int:
    """Decimals at which the typical interval of some (value, low, high) shows two digits: 0 to 4."""
    widths = [(high - low) / 2 for _, low, high in numbers if low is not None and high is not None and high > low]
    sizes = widths or [abs(value) / 10 for value, _, _ in numbers if value]
    return min(4, max(0, 1 - math.floor(math.log10(median(sizes))))) if sizes else 1


def column_decimals(board: Board, column: str, metric: str) -> int:
    """Decimals of a column of the board, in the unit that is shown."""
    scale = unit_of(board.metrics[metric])[0]
    cells = [board.cells[row.name, column, metric] for row in board.rows]
    return decimals([tuple(None if value is None else value * scale for value in (cell.value, cell.low, cell.high)) for cell in cells])  # type: ignore[misc]


def shown(value: float | None, places: int, *, sign: bool = False) -> str:
    """A number as it is printed: a true minus, no negative zero; with `sign` a plus as well."""
    if value is None:
        return "–"
    text = f"{abs(value):.{places}f}"
    zero = float(text) == 0
    return ("" if zero else "−" if value < 0 else "+" if sign else "") + text


def ranged(low: float | None, high: float | None, places: int, *, sign: bool = False) -> str:
    """An interval as it is printed."""
    return "" if low is None or high is None else f"[{shown(low, places, sign=sign)}, {shown(high, places, sign=sign)}]"


def label(metric: str) -> str:
    """`motion.dynamic_degree` as `dynamic degree`."""
    names = {"dit_fps": "DiT FPS", "e2e_fps": "end-to-end FPS", "clip_fps": "clip FPS", "ttff_s": "first frame", "rtf": "real-time factor"}
    names |= {"dit_fps_no_context": "DiT FPS without context pass", "deadline_1": "frames in time"}
    name = metric.partition(".")[2]
    return names.get(name, name.removesuffix("_bytes").replace("_", " "))


def arrow(metric: Metric) -> str:
    return "↑" if metric.higher_is_better else "↓"


def counted(findings: Sequence[Finding]) -> str:
    """`3 reproduced, 1 contradicted, 2 inconclusive`."""
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in VERDICTS}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def finding_numbers(board: Board, finding: Finding) -> tuple[float, int]:
    """Scale and decimals at which a finding is printed."""
    metric = board.metrics.get(finding.claim.metric)
    scale = unit_of(metric)[0] if metric and not claims.timed(finding.claim) else 1.0
    numbers = [tuple(None if value is None else value * scale for value in (finding.value, finding.low, finding.high))]
    return scale, decimals(numbers)  # type: ignore[arg-type]


def improvement(board: Board, finding: Finding) -> str:
    """`+12.5 [3.1, 21.9] %` or nothing."""
    if finding.value is None:
        return ""
    scale, places = finding_numbers(board, finding)
    low, high = (None if end is None else end * scale for end in (finding.low, finding.high))
    unit = difference_unit(board, finding)
    return " ".join(part for part in (shown(finding.value * scale, places, sign=True), ranged(low, high, places, sign=True), unit) if part)


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as CSV; None is empty, booleans are lower case, floats have six digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(rows[0] if rows else [])
    for row in rows:
        writer.writerow([_plain(value) for value in row.values()])
    return out.getvalue()


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else f"{value:.6g}" if isinstance(value, float) else str(value)


def to_csv(board: Board) -> str:
    """Every cell in long form: its number, interval, counts, state and sources (several joined by `;`)."""
    traced = ("run", "fingerprint", "weights_sha256", "suite_sha256", "scorer", "scorer_version", "commit", "dirty")
    rows = []
    for (name, column, metric), cell in board.cells.items():
        if cell.state == LEFT_OUT:
            continue
        row: dict[str, Any] = {"contender": name, "suite_or_hardware": column, "metric": metric}
        row |= {"higher_is_better": board.metrics[metric].higher_is_better, "unit": board.metrics[metric].unit, "state": cell.state}
        row |= {"value": cell.value, "low": cell.low, "high": cell.high, "interval": _kind(cell)}
        row |= {key: getattr(cell, key) if cell.state == NUMBER else None for key in ("clips", "prompts", "seeds", "repeats")}
        row |= {"rank_low": cell.ranks[0] if cell.ranks else None, "rank_high": cell.ranks[1] if cell.ranks else None}
        row |= {"division": "" if cell.state != NUMBER else f"open: {cell.open}" if cell.open else "closed"}
        row |= {"best": cell.best, "tied_with_best": cell.tied, "optimised_in_training": cell.saw}
        row |= {key: ";".join(_plain(source.get(key)) for source in cell.sources) for key in traced}
        rows.append(row | {"reason": cell.reason})
    return csv_of(rows)


def _kind(cell: Cell) -> str | None:
    """What `low` and `high` are."""
    if cell.low is None:
        return None
    return f"bootstrap {LEVEL:g}" if cell.sample is not None else "range"


def claims_csv(findings: Sequence[Finding]) -> str:
    """Every claim with its verdict, the measured improvement and the printed one."""
    rows = []
    for finding in findings:
        claim, pair = finding.claim, finding.printed
        row: dict[str, Any] = {key: getattr(claim, key) for key in ("id", "text", "metric", "suite", "better", "than", "margin")}
        row |= {"verdict": finding.verdict, "improvement": finding.value, "low": finding.low, "high": finding.high}
        row |= {"p": finding.p, "p_holm": finding.p_corrected}
        row |= {"detectable": finding.detectable, "training_seeds": finding.seeds, "published_improvement": finding.published}
        row |= {f"published_{side}": pair[i].text if pair else None for i, side in enumerate(("better", "than"))}
        row["published_source"] = f"{pair[0].where}, {pair[0].table}" if pair else None
        rows.append(row | {"reason": finding.reason})
    return csv_of(rows)


def published(finding: Finding) -> str:
    """The improvement as printed elsewhere."""
    if finding.published is None:
        return ""
    return f"{finding.published:+.4g}{' %' if claims.timed(finding.claim) else ''}".replace("-", "−")


def printed_beside(better: Reported, than: Reported) -> str:
    """The two printed numbers of a claim, with who printed them and under which protocol."""
    protocols = dict.fromkeys(one.protocol or "protocol not stated" for one in (better, than))
    return (
        f"{better.text} of {better.system} against {than.text} of {than.system}, {label(better.metric)} "
        f"({better.by}, {better.table.rpartition('/')[2]} of {better.where}; {'; '.join(protocols)})"
    )


def in_markdown(text: str) -> str:
    """Text that cannot end a table cell or become markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", " ".join(text.split()))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def to_markdown(board: Board, findings: Sequence[Finding], summary: str, commands: Sequence[str], more: str = "") -> str:
    """The report in short, for a repository's front page, with `more` behind the tables. `index.html` has the rest."""
    parts = [f"# {in_markdown(board.title)}\n", in_markdown(summary) + "\n"]
    parts.append("Everything, with players, plots and the source of each number: [index.html](index.html). Numbers for machines: ")
    parts[-1] += "[leaderboard.csv](leaderboard.csv)" + (", [claims.csv](claims.csv)" if findings else "") + ".\n"
    parts.append(f"![Stills and claims]({PICTURE})\n\n![Clips side by side]({CLIPS})\n")
    if findings:
        parts.append(f"## Claims: {counted(findings)}\n")
        rows = [
            [
                f"**{finding.verdict}**",
                in_markdown(finding.claim.text),
                improvement(board, finding) or "–",
                chance(finding.p_corrected) or "–",
                would_find(board, finding) or "–",
                published(finding) or "–",
                in_markdown(finding.reason),
            ]
            for finding in findings
        ]
        head = ["verdict", "claim", "improvement (95 %)", "p, corrected", "would find", "published", "because"]
        parts.append(markdown_table(head, rows))
        parts.append(
            "p: two-sided, of an improvement of exactly the margin, by Holm's correction for all these claims together. "
            "Would find: the true difference that as much data tells from none four times in five.\n"
        )
    for column in (*board.suites, *board.hardware):
        timed = column in board.hardware
        parts.append(f"## {'Speed on ' if timed else ''}{in_markdown(column)}\n")
        head = ["contender"] + [f"{label(metric)} {arrow(board.metrics[metric])}" for metric in board.columns[column]]
        ranked, apart = divided(board, column)
        absent = left_out(board, column)
        if not board.columns[column]:
            parts.append("No contender has a number here.\n")
        elif ranked:
            parts.append(markdown_table(head, [[in_markdown(name), *_markdown_cells(board, name, column)] for name in ranked]))
        if apart:
            parts.append("Open entries, which take no part in the ranking above:\n" if ranked else "No entry is closed:\n")
            rows = [[in_markdown(name), *_markdown_cells(board, name, column), in_markdown(why)] for name, why in apart.items()]
            parts.append(markdown_table([*head, "open because"], rows))
        bracket = (
            "range over rounds, or over processes where there are several"
            if timed
            else "95 % interval, prompts (and training seeds, where there are several) resampled"
        )
        caveats = "".join(f" {in_markdown(row.name)}: {caveat}." for row in board.rows for caveat in row.caveats)
        caveats += f" Not part of this table by the study's design: {in_markdown(', '.join(absent))}." if absent else ""
        reasons = dict.fromkeys(reason for (_, place, _), (state, reason) in board.problems.items() if (place, state) == (column, INCOMPLETE))
        caveats += "".join(f" Incomplete: {in_markdown(reason)}." for reason in reasons)
        parts.append(f"Brackets: {bracket}. Bold: best. = : not told from the best. † : optimised in training.{caveats}\n")
    if more:
        parts.append(more)
    parts.append("## Again\n\n```\n" + "\n".join(commands) + "\n```\n")
    return "\n".join(parts)


def left_out(board: Board, column: str) -> list[str]:
    """The rows that are not asked for in a column at all."""
    states = {row.name: {board.cells[row.name, column, metric].state for metric in board.columns[column]} for row in board.rows}
    return [name for name, found in states.items() if found == {LEFT_OUT}]


def divided(board: Board, column: str) -> tuple[list[str], dict[str, str]]:
    """The rows of a column that are closed or have no number there, and the open ones with the reason; if none is closed, all are the latter.

    Those that are left out are in neither.
    """
    absent = left_out(board, column)
    rows = [row.name for row in board.rows if row.name not in absent]
    cells_of = {name: [board.cells[name, column, metric] for metric in board.columns[column]] for name in rows}
    why = {name: [cell for cell in cells if cell.state == NUMBER] for name, cells in cells_of.items()}
    apart = {name: next((cell.open for cell in cells if cell.open), "") for name, cells in why.items()}
    apart = {name: reason for name, reason in apart.items() if reason}
    if not any(cells and name not in apart for name, cells in why.items()) and apart:
        return [], {name: apart.get(name, "") for name in rows}
    return [name for name in rows if name not in apart], apart


def chance(p: float | None) -> str:
    """A p-value as it is printed."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def would_find(board: Board, finding: Finding) -> str:
    """The smallest true difference that a claim's data finds four times in five, or nothing."""
    if finding.detectable is None:
        return ""
    scale, places = finding_numbers(board, finding)
    return f"{shown(finding.detectable * scale, places)} {difference_unit(board, finding)}"


def _markdown_cells(board: Board, row: str, column: str) -> list[str]:
    texts = []
    for metric in board.columns[column]:
        cell, places = board.cells[row, column, metric], column_decimals(board, column, metric)
        if cell.state != NUMBER:
            texts.append("" if cell.state == LEFT_OUT else cell.state)
            continue
        value, interval = printed(board, cell, places)
        texts.append(f"{f'**{value}**' if cell.best else value}{'†' if cell.saw else ''}{' =' if cell.tied else ''} {interval}".rstrip())
    return texts


def printed(board: Board, cell: Cell, places: int) -> tuple[str, str]:
    """A cell's value and interval in the unit that is shown."""
    scale = unit_of(board.metrics[cell.metric])[0]
    value, low, high = (None if number is None else number * scale for number in (cell.value, cell.low, cell.high))
    return shown(value, places), ranged(low, high, places)


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--"}
LATEX |= {"†": r"$\dagger$", "‡": r"$\ddagger$"}
LATEX |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
LATEX |= {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "<": r"\textless{}", ">": r"\textgreater{}"}


def in_latex(text: str) -> str:
    """Text with LaTeX's own letters escaped."""
    return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))


def to_latex(board: Board) -> str:
    """A booktabs table per suite and machine."""
    parts = ["% needs \\usepackage{booktabs}\n"]
    for column in (*board.suites, *board.hardware):
        metrics = board.columns[column]
        timed = column in board.hardware
        head = " & ".join(in_latex(f"{label(metric)} {arrow(board.metrics[metric])}") for metric in metrics)
        ranked, apart = divided(board, column)
        what = "median and range over rounds" if timed else "mean over clips and 95\\,\\% bootstrap interval clustered by prompt"
        absent = left_out(board, column)
        below = (" Below the line: open entries, not ranked." if ranked else " All entries are open.") if apart else ""
        lines = [
            "\\begin{table}[t]\n\\centering\n\\small",
            f"\\caption{{{in_latex(board.title)}, {in_latex(column)}: {what}. Bold: best. $\\dagger$: optimised in training.{below}"
            + (f" Left out by design: {in_latex(', '.join(absent))}.}}" if absent else "}"),
            f"\\begin{{tabular}}{{l{'r' * len(metrics)}}}\n\\toprule",
            f"contender & {head} \\\\\n\\midrule",
            *(f"{in_latex(name)} & {_latex_cells(board, name, column)} \\\\" for name in ranked),
            *(["\\midrule"] if ranked and apart else []),
            *(f"{in_latex(name)} & {_latex_cells(board, name, column)} \\\\" for name in apart),
            "\\bottomrule\n\\end{tabular}\n\\end{table}\n",
        ]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def _latex_cells(board: Board, row: str, column: str) -> str:
    texts = []
    for metric in board.columns[column]:
        cell = board.cells[row, column, metric]
        if cell.state != NUMBER:
            texts.append("" if cell.state == LEFT_OUT else "--")
            continue
        value, interval = (in_latex(text) for text in printed(board, cell, column_decimals(board, column, metric)))
        bold = f"\\textbf{{{value}}}" if cell.best else value
        mark = "$^\\dagger$" if cell.saw else ""
        texts.append(f"{bold}{mark} {{\\scriptsize {interval}}}" if interval else bold + mark)
    return " & ".join(texts)
