"""What somebody printed beside what was measured here: the difference where both followed one protocol, else that they did not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from rfbench.published import Reported
from rfbench.report.cells import NUMBER, Row
from rfbench.report.leaderboard import Board
from rfbench.report.tables import csv_of, in_latex, in_markdown, label, markdown_table, shown, unit_of

FPS = ("profile.e2e_fps", "profile.clip_fps")  # with everything counted; the first is of a stream, which some contenders do not have
MARK = "‡"  # measured by a competitor


@dataclass(frozen=True)
class Beside:
    """A printed number and the cell of the board that is about the same; both in the unit that is printed."""

    row: str
    printed: Reported
    metric: str | None  # of the board; None: it has nothing of that kind
    column: str | None  # suite or hardware
    measured: float | None
    why: str  # why there is no difference; nothing: there is one

    @property
    def difference(self) -> float | None:
        """Measured less printed."""
        return None if self.measured is None or self.why else self.measured - self.printed.value

    @property
    def places(self) -> int:
        """Decimals of the printed number."""
        return len(self.printed.text.partition(".")[2])


def beside(board: Board) -> list[Beside]:
    """Every number printed about a row of the board, once for each column that has something of that kind."""
    return [one for row in board.rows for printed in row.reported for one in _of(board, row, printed)]


def _of(board: Board, row: Row, printed: Reported) -> Iterator[Beside]:
    metrics = FPS if printed.metric == "fps" else (printed.metric,)
    places = [(column, metric) for column in (*board.suites, *board.hardware) for metric in metrics if metric in board.columns[column]]
    if printed.metric == "fps":
        places = [place for place in places if board.cells[row.name, *place].state == NUMBER][:1] or places[:1]
    if not places:
        yield Beside(row.name, printed, None, None, None, "not in this table")
    for column, metric in places:
        cell = board.cells[row.name, column, metric]
        scale = unit_of(board.metrics[metric])[0]
        measured = cell.value * scale if cell.state == NUMBER and cell.value is not None else None
        if measured is None:
            why = cell.state
        elif printed.suite == column:
            why = ""
        else:
            why = f"other protocol: {printed.protocol or 'prompts and length are not stated'}"
        yield Beside(row.name, printed, metric, column, measured, why)


def source(one: Beside) -> str:
    """Who printed a number, and whether that is a competitor."""
    mark = f" {MARK}" if one.printed.whose == "competitor" else ""
    return f"{one.printed.by}, {one.printed.table.rpartition('/')[2]} of {one.printed.where}{mark}"


def told(one: Beside) -> str:
    """The difference, or why there is none."""
    return one.why if one.difference is None else shown(one.difference, one.places, sign=True)


def shown_rows(board: Board) -> list[dict[str, str]]:
    """Every printed number as the page shows it."""
    return [
        {
            "row": one.row,
            "metric": one.printed.metric,
            "column": one.column or "",
            "printed": one.printed.text,
            "source": source(one),
            "protocol": one.printed.protocol,
            "measured": shown(one.measured, one.places),
            "told": told(one),
        }
        for one in beside(board)
    ]


def to_markdown(board: Board) -> str:
    """The section of a report; nothing where nothing was printed about what the board has."""
    found = [one for one in beside(board) if one.metric is not None]
    if not found:
        return ""
    rows = [
        [
            in_markdown(one.row),
            in_markdown(f"{label(one.metric or '')}, {one.column}"),
            one.printed.text,
            in_markdown(source(one)),
            shown(one.measured, one.places),
            in_markdown(told(one)),
        ]
        for one in found
    ]
    table = markdown_table(["contender", "metric", "reported", "by", "measured", "difference"], rows)
    note = (
        f"Difference: measured less reported, where the prompts and their number, the length and the metric are the same. {MARK} : by a competitor.\n"
    )
    return f"## Reported and measured\n\n{table}\n{note}"


def to_latex(board: Board) -> str:
    """The same as a booktabs table, with a line between contenders; nothing where nothing was printed about what the board has."""
    found = [one for one in beside(board) if one.metric is not None]
    if not found:
        return ""
    lines = [
        "\n\\begin{table}[t]\n\\centering\n\\scriptsize",
        f"\\caption{{{in_latex(board.title)}: reported and measured. Difference: measured less reported, within one protocol. "
        "$\\ddagger$: measured by a competitor.}",
        "\\begin{tabular}{llrp{0.3\\linewidth}rp{0.2\\linewidth}}\n\\toprule",
        "contender & metric & reported & by & measured & difference \\\\",
    ]
    for name, several in itertools.groupby(found, key=lambda one: one.row):
        lines.append("\\midrule")
        for one in several:
            what = in_latex(f"{label(one.metric or '')}, {one.column}")
            numbers = (one.printed.text, in_latex(source(one)), in_latex(shown(one.measured, one.places)), in_latex(told(one)))
            lines.append(" & ".join((in_latex(name), what, *numbers)) + " \\\\")
    return "\n".join(lines) + "\n\\bottomrule\n\\end{tabular}\n\\end{table}\n"


def to_csv(board: Board) -> str:
    """All printed numbers about the rows of a board, with what was measured."""
    return csv_of(
        [
            {
                "contender": one.row,
                "system": one.printed.system,
                "metric": one.printed.metric,
                "suite_or_hardware": one.column,
                "reported": one.printed.text,
                "by": one.printed.by,
                "where": one.printed.where,
                "table": one.printed.table,
                "whose": one.printed.whose,
                "protocol": one.printed.protocol,
                "measured_metric": one.metric,
                "measured": one.measured,
                "difference": one.difference,
                "why_none": one.why,
            }
            for one in beside(board)
        ]
    )
