"""What the measurements make of a study's claims: a verdict each, and the sentence that goes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from rfbench import published, statistics, timing
from rfbench.config import Claim, Study
from rfbench.errors import UserError, did_you_mean
from rfbench.published import Reported
from rfbench.report.cells import BOARD, NUMBER, Cell, Row
from rfbench.report.leaderboard import Board, suite_name
from rfbench.statistics import INCONCLUSIVE, NOT_RUN, REPRODUCED
from rfbench.timing import TIMINGS


@dataclass(frozen=True)
class Finding:
    """What the cells make of a claim. `value`, `low` and `high` are the improvement: positive where the claim says so.

    It is a difference in the metric's unit; of timings it is how many per cent better one is than the other.
    """

    claim: Claim
    verdict: str
    reason: str
    better: Cell | None = None
    than: Cell | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    published: float | None = None  # the same improvement as printed
    printed: tuple[Reported, Reported] | None = None  # the two numbers that it is the difference of
    detectable: float | None = None  # smallest true difference that this much data finds four times in five
    seeds: int = 0  # training seeds that carry it; 0 where nothing was trained
    p: float | None = None  # two-sided, of a true improvement of exactly the margin
    p_corrected: float | None = None  # the same by Holm, for all claims of the study that have one


def judge(board: Board, study: Study) -> tuple[Finding, ...]:
    """A finding per claim.

    Raises:
        UserError: a claim is about a contender, suite or metric that the study does not have.
    """
    found = [_judge(board, study, claim) for claim in study.claims]
    judged = [finding for finding in found if finding.p is not None]
    corrected = dict(zip(map(id, judged), statistics.holm([finding.p for finding in judged if finding.p is not None]), strict=True))
    return tuple(dataclasses.replace(finding, p_corrected=corrected.get(id(finding))) for finding in found)


def _judge(board: Board, study: Study, claim: Claim) -> Finding:
    check(study, claim, board.metrics)
    statement = published.statement_of(claim)
    claim = dataclasses.replace(claim, text=claim.text or (statement.text if statement else ""))
    told, printed = None, published.pair(statement) if statement else None
    higher_is_better = board.metrics[claim.metric].higher_is_better if claim.metric in board.metrics else True
    sign = 1.0 if higher_is_better else -1.0
    if printed is not None and claim.metric in board.metrics:
        values = printed[0].value, printed[1].value
        told = _percent(*(values if sign > 0 else values[::-1])) if timed(claim) else sign * (values[0] - values[1])
    columns = board.hardware if claim.suite is None else (suite_name(claim.suite),)
    pairs = [(board.cells.get((claim.better, column, claim.metric)), board.cells.get((claim.than, column, claim.metric))) for column in columns]
    whole = [pair for pair in pairs if all(cell is not None and cell.state == NUMBER for cell in pair)]
    if not whole:
        lacking = [cell.reason for pair in pairs for cell in pair if cell is not None and cell.state != NUMBER]
        reason = (lacking or _why_not(board, claim))[0]
        better, than = pairs[0] if pairs else (None, None)
        return Finding(claim, NOT_RUN, reason, better, than, published=told, printed=printed)
    better, than = whole[0]
    assert better is not None and than is not None
    rows = {row.name: row for row in board.rows}
    carried = _carried_by(rows[claim.better], rows[claim.than])
    found = Finding(claim, INCONCLUSIVE, "", better, than, published=told, printed=printed, seeds=carried)
    if timed(claim):
        return _judge_timing(found, better, than, sign)
    if better.sample is None or than.sample is None:
        gap = sign * ((better.value or 0.0) - (than.value or 0.0))
        return dataclasses.replace(found, value=gap, reason="one number of all clips has no interval")
    try:
        measured = statistics.difference(better.sample, than.sample)
    except ValueError as error:
        return dataclasses.replace(found, verdict=NOT_RUN, reason=f"the two cannot be compared: {error}")
    low, high = measured.low, measured.high
    if low is not None and high is not None and sign < 0:
        low, high = -high, -low
    found = dataclasses.replace(found, value=sign * measured.value, low=low, high=high, detectable=statistics.detectable(measured))
    found = dataclasses.replace(found, p=measured.p(sign * claim.margin))
    verdict = statistics.verdict(low, high, claim.margin)
    return dataclasses.replace(found, verdict=verdict, reason=_reason(found, verdict, measured.why, "the 95 % interval") + _caution(found.seeds))


def _why_not(board: Board, claim: Claim) -> list[str]:
    """Why there is not even a column for a claim's metric."""
    suite, scorer = suite_name(claim.suite or ""), claim.metric.partition(".")[0]
    runs = [run for row in board.rows if row.name in (claim.better, claim.than) for run in row.runs]
    found = [reason for (run, column, by), (_, reason) in board.problems.items() if run in runs and column == suite and by in ("", scorer)]
    found += [reason for (run, *_), (_, reason) in board.problems.items() if run == BOARD and timed(claim)]
    return [*found, f"there are no numbers for '{claim.metric}'"]


def _judge_timing(found: Finding, better: Cell, than: Cell, sign: float) -> Finding:
    """The ratio of two timings, over the rounds in which both took a turn."""
    found = dataclasses.replace(found, seeds=0)
    if {(source["run"], source["timed"]) for source in better.sources} == {(source["run"], source["timed"]) for source in than.sources}:
        return dataclasses.replace(found, value=0.0, reason="the two differ in their weights alone and were timed as one")
    try:
        measured = timing.compared(better.rounds, than.rounds, higher_is_better=sign > 0)
    except ValueError as error:
        return dataclasses.replace(found, verdict=NOT_RUN, reason=f"the two cannot be compared: {error}; time them in turn, in one run")
    low, high = (None if end is None else _percent(end, 1) for end in (measured.low, measured.high))
    found = dataclasses.replace(found, value=_percent(measured.value, 1), low=low, high=high, p=measured.p(1 + found.claim.margin / 100))
    verdict = statistics.verdict(low, high, found.claim.margin)
    started = f"{measured.processes} process{'es' * (measured.processes > 1)}"
    reason = _reason(found, verdict, measured.why, f"the 95 % interval over {measured.rounds} paired rounds of {started}")
    if verdict != INCONCLUSIVE and measured.processes < timing.FEWEST_PROCESSES:
        verdict = INCONCLUSIVE
        reason += f", but another start may say otherwise: a verdict needs {timing.FEWEST_PROCESSES} processes"
    return dataclasses.replace(found, verdict=verdict, reason=reason)


def timed(claim: Claim) -> bool:
    """Whether a claim is about a timing."""
    return claim.metric.startswith("profile.")


def _percent(better: float, than: float) -> float:
    return 100 * (better / than - 1)


def _reason(found: Finding, verdict: str, why: str, interval: str) -> str:
    margin = "zero" if found.claim.margin == 0 else f"the claimed margin of {found.claim.margin:g}".replace("-", "−")
    if found.low is None:
        return f"{interval} is not defined: {why}"
    if verdict == REPRODUCED:
        return f"{interval} lies above {margin}"
    if verdict == INCONCLUSIVE:
        return f"{interval} holds {margin}"
    if found.low > 0:
        return f"better, but {interval} lies below {margin}"
    return f"{interval} lies below {margin}"


def _caution(seeds: int) -> str:
    return "; one training seed: another training run may say otherwise" if seeds == 1 else ""


def _carried_by(*rows: Row) -> int:
    """The fewest training seeds among the rows that were trained; 0 if none was."""
    return min((len(row.seeds) for row in rows if row.seeds), default=0)


def check(study: Study, claim: Claim, metrics: Iterable[str]) -> None:
    """Refuse a claim about what a study does not have; `metrics` are those that its scorers have.

    Raises:
        UserError: no such contender, scorer, suite or metric.
    """
    where = f"study '{study.title}', claim '{claim.id}'"
    published.statement_of(claim)
    names = {contender.name for contender in study.contenders}
    for contender in (claim.better, claim.than):
        if contender not in names:
            raise UserError(f"{where}: there is no contender '{contender}'{did_you_mean(contender, names)}")
    scorer, _, metric = claim.metric.partition(".")
    if scorer == "profile":
        if metric not in TIMINGS:
            raise UserError(f"{where}: '{metric}' is no timing{did_you_mean(metric, TIMINGS)}")
        if claim.suite is not None:
            raise UserError(f"{where}: a timing has no suite; remove 'suite'")
        if study.profile is None:
            raise UserError(f"{where}: the study does not time anything; give it a 'profile'")
        return
    if scorer not in study.scorers:
        raise UserError(f"{where}: the study does not run scorer '{scorer}'{did_you_mean(scorer, study.scorers)}")
    if claim.suite not in study.suites:
        raise UserError(f"{where}: the study has no suite '{claim.suite}'{did_you_mean(str(claim.suite), study.suites)}")
    known = [name for name in metrics if name.startswith(f"{scorer}.")]
    if known and claim.metric not in known:
        raise UserError(f"{where}: scorer '{scorer}' has no metric '{metric}'{did_you_mean(claim.metric, known)}")
