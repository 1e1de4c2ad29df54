"""What a reader asks first, answered from the board: who leads in motion, how sure that is, what FPS includes, which claims failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rfbench.report.account import several
from rfbench.report.cells import Cell
from rfbench.report.claims import Finding
from rfbench.report.leaderboard import Board
from rfbench.report.tables import column_decimals, label, printed, unit_of
from rfbench.statistics import CONTRADICTED, INCONCLUSIVE, NOT_RUN, REPRODUCED

MOTION, SMOOTHNESS = "dynamic_degree", "motion_smoothness"  # of whatever scorer: how much motion, and how smooth it is


def answers(board: Board, findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Question and answer, in the order in which people ask."""
    found = [(f"Which is best at motion on {suite}, and how sure is that?", text) for suite in board.suites if (text := _motion(board, suite))]
    for machine in board.hardware:
        told = [f"{label(metric)}: {board.metrics[metric].text}" for metric in board.columns[machine] if metric.endswith("_fps")]
        if told:
            found.append((f"What do the frames per second on {machine} include?", " ".join(told)))
    return [*found, ("Which claims failed?", _failed(findings))] if findings else found


def _motion(board: Board, suite: str) -> str:
    """Who leads in motion, who cannot be told from it, and how smooth the leader's motion is."""
    metric = next((metric for metric in board.columns[suite] if metric.partition(".")[2] == MOTION), None)
    cells = [] if metric is None else [board.cells[row.name, suite, metric] for row in board.rows]
    leader = next((cell for cell in cells if cell.best), None)
    if leader is None:
        return ""
    tied = [cell.row for cell in cells if cell.tied]
    text = f"{leader.row}: {_number(board, leader)} {label(leader.metric)}."
    if tied:
        text += f" Not sure: {several(tied)} cannot be told from it."
    else:
        text += " By the paired 95 % intervals, one by one, it is ahead of all others that were ranked with it."
    if leader.ranks is not None:
        text += f" Over all pairs together, its rank is {ranked(leader)} of {sum(cell.ranks is not None for cell in cells)}."
    others = list(_smoothness(board, leader))
    return text + (f" That is how much moves, not how well: {others[0]}." if others else "")


def _smoothness(board: Board, leader: Cell) -> Iterator[str]:
    for metric in board.columns[leader.column]:
        cells = {row.name: board.cells[row.name, leader.column, metric] for row in board.rows}
        own, best = cells[leader.row], next((cell for cell in cells.values() if cell.best), None)
        if metric.partition(".")[2] == SMOOTHNESS and own.value is not None and best is not None:
            text = f"its {label(metric)} is {_number(board, own)}"
            yield f"{text}, the best there" if own is best else f"{text}, that of {best.row} {_number(board, best)}"


def _number(board: Board, cell: Cell) -> str:
    return " ".join(
        part for part in (*printed(board, cell, column_decimals(board, cell.column, cell.metric)), unit_of(board.metrics[cell.metric])[1]) if part
    )


def ranked(cell: Cell) -> str:
    """The ranks that a cell may have: `2` or `1 to 3`."""
    if cell.ranks is None:
        return ""
    low, high = cell.ranks
    return f"{low}" if low == high else f"{low} to {high}"


def _failed(findings: Sequence[Finding]) -> str:
    """The contradicted ones by their text, the others counted: undecided is not failed."""
    failed = [f"“{finding.claim.text}”" for finding in findings if finding.verdict == CONTRADICTED]
    text = f"{len(failed)} of {len(findings)} {'is' if len(failed) == 1 else 'are'} contradicted" + (f": {several(failed)}" if failed else "")
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in (REPRODUCED, INCONCLUSIVE, NOT_RUN)}
    rest = [f"{count} {'cannot be decided by this data' if verdict == INCONCLUSIVE else verdict}" for verdict, count in counts.items() if count]
    return text.rstrip(".") + (f"; {several(rest)}." if rest else ".")
