"""What decides a claim: who said it, the same difference prompt by prompt and seed by seed, and what would change the verdict.

Improvements are positive where the claim says so, as in a Finding: a difference in the metric's shown unit, of timings per cent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rfbench import published, statistics, timing
from rfbench.report import totals
from rfbench.report.claims import Finding, timed
from rfbench.report.leaderboard import Board
from rfbench.report.plots import FAINT, INK, SERIES, Plot, panel, svg
from rfbench.report.tables import chance, difference_unit, finding_numbers, improvement, label, printed_beside, ranged, shown, would_find
from rfbench.statistics import CONTRADICTED, INCONCLUSIVE, REPRODUCED, Array, Interval, Sample

MARKERS = 200  # prompts that have a dot each; more are a line


@dataclass(frozen=True)
class Part:
    """A line of a claim's forest plot: all of the data, or that of one training seed or process."""

    name: str
    value: float
    low: float | None
    high: float | None


def details(board: Board, finding: Finding) -> list[tuple[str, str]]:
    """Name and text of what a reader of one claim asks."""
    claim, statement = finding.claim, published.statement_of(finding.claim)
    metric = board.metrics.get(claim.metric)
    rows = {row.name: row for row in board.rows}
    found = [("said in", f"Reward Forcing, {statement.said}" if statement else "not a claim of the paper; this study asks it")]
    if finding.printed is not None:
        found.append(("published", printed_beside(*finding.printed)))
    found.append(("tested by", f"study {board.study}: {label(claim.metric)}" + (f" on {claim.suite}" if claim.suite else " in turn")))
    found.append(("measured as", metric.text if metric else "nothing yet"))
    found += [(name, text) for name in (claim.better, claim.than) if (text := rows[name].note or rows[name].title)]
    if finding.value is not None:
        scale, _ = finding_numbers(board, finding)
        margin = "any improvement" if not claim.margin else f"an improvement of more than {shown(claim.margin, 1)} {difference_unit(board, finding)}"
        found.append(("claimed", f"{margin} of {claim.better} over {claim.than}"))
        found.append(("ours", improvement(board, finding) + _counted(board, finding, scale)))
        if finding.p is not None:
            corrected = f", corrected for all claims of the study (Holm) {chance(finding.p_corrected)}"
            found.append(("p-value", f"{chance(finding.p)}{corrected}, of an improvement of exactly the margin"))
    return [*found, ("verdict", f"{finding.verdict}: {finding.reason}"), ("would change it", changing(board, finding))]


def _counted(board: Board, finding: Finding, scale: float) -> str:
    """`; better on 13 of 24 prompts, worse on 9`."""
    found = differences(board, finding)
    if not len(found):
        return ""
    what = "rounds" if timed(finding.claim) else "prompts"
    return f"; better on {int((found > 0).sum())} of {len(found)} {what}, worse on {int((found < 0).sum())}"


def differences(board: Board, finding: Finding) -> Array:
    """The improvement on each prompt (mean of its clips and of the training seeds), or in each round; empty where there is none."""
    if finding.value is None or finding.better is None or finding.than is None:
        return np.zeros(0)
    sign = _sign(board, finding)
    if timed(finding.claim):
        better, than = finding.better.rounds, finding.than.rounds
        ratios = [better[key] / than[key] for key in sorted(better.keys() & than.keys())]
        return 100 * (np.array(ratios) ** sign - 1)
    if finding.better.sample is None or finding.than.sample is None:
        return np.zeros(0)
    one, other = _samples(finding)
    scale, _ = finding_numbers(board, finding)
    return np.asarray(sign * scale * (one.total.mean(0) - other.total.mean(0)) / one.count)


def _sign(board: Board, finding: Finding) -> float:
    return 1.0 if board.metrics[finding.claim.metric].higher_is_better else -1.0


def _samples(finding: Finding) -> tuple[Sample, Sample]:
    assert finding.better is not None and finding.than is not None
    assert finding.better.sample is not None and finding.than.sample is not None
    return finding.better.sample, statistics.paired(finding.better.sample, finding.than.sample)


def parts(board: Board, finding: Finding) -> list[Part]:
    """The improvement by all of the data and, where there are several, by each training seed or process alone."""
    if finding.value is None:
        return []
    scale, _ = finding_numbers(board, finding)
    whole = Part("all", finding.value * scale, *(None if end is None else end * scale for end in (finding.low, finding.high)))
    return [whole, *(_by_process(board, finding) if timed(finding.claim) else _by_seed(board, finding, scale))]


def _by_seed(board: Board, finding: Finding, scale: float) -> Iterator[Part]:
    """Seeds that both have are compared with each other; otherwise each of one side with the mean of the other."""
    one, other = _samples(finding)
    sides = [side for side in (one, other) if len(side.seeds) > 1]
    for seed in sides[0].seeds if sides else ():
        found = _signed(statistics.difference(_alone(one, seed), _alone(other, seed)), _sign(board, finding) * scale)
        yield Part(f"seed {seed}", *found)


def _alone(sample: Sample, seed: Any) -> Sample:
    """One training seed of a sample, or the mean of its seeds where it does not have that one."""
    total = sample.total[[sample.seeds.index(seed)]] if seed in sample.seeds else sample.total.mean(0, keepdims=True)
    return Sample(("one",), sample.prompts, total, sample.count)


def _signed(found: Interval, factor: float) -> tuple[float, float | None, float | None]:
    ends = [None if end is None else end * factor for end in (found.low, found.high)]
    return found.value * factor, *(ends if factor > 0 else ends[::-1])  # type: ignore[return-value]


def _by_process(board: Board, finding: Finding) -> Iterator[Part]:
    assert finding.better is not None and finding.than is not None
    processes = sorted({key[:2] for key in finding.better.rounds.keys() & finding.than.rounds.keys()})
    for process in processes if len(processes) > 1 else ():
        sides = [{key: value for key, value in cell.rounds.items() if key[:2] == process} for cell in (finding.better, finding.than)]
        ratio = timing.compared(sides[0], sides[1], higher_is_better=_sign(board, finding) > 0)
        ends = (None if end is None else 100 * (end - 1) for end in (ratio.low, ratio.high))
        yield Part(f"start {process[1] + 1}", 100 * (ratio.value - 1), *ends)


def changing(board: Board, finding: Finding) -> str:
    """What would turn the verdict."""
    claim = finding.claim
    if finding.value is None:
        return "numbers of both contenders"
    scale, places = finding_numbers(board, finding)
    unit = difference_unit(board, finding)
    margin = "zero" if not claim.margin else f"{shown(claim.margin, places, sign=True)} {unit}"
    if finding.low is None or finding.high is None:
        return f"more {'rounds' if timed(claim) else 'prompts'}: without an interval nothing is decided"
    if finding.verdict == REPRODUCED:
        gap = finding.low * scale - claim.margin
        return f"an interval that reaches {margin}: its lower end is {shown(gap, places)} {unit} away" + _other_seeds(finding)
    if finding.verdict == CONTRADICTED:
        gap = claim.margin - finding.high * scale
        return f"an interval that reaches {margin}: its upper end is {shown(gap, places)} {unit} away" + _other_seeds(finding)
    text = f"an interval that lies on one side of {margin}"
    least, apart = finding.detectable, abs(finding.value - claim.margin / scale)
    if least is None:
        return text + _other_seeds(finding)
    text += f"; as much data finds a true improvement that is {would_find(board, finding)} away from it four times in five"
    if 0 < apart < least:
        times = math.ceil((least / apart) ** 2)
        often = f"about {times} times as much data" if times <= 1000 else "more data than anybody makes"
        text += f", and to tell one as large as the measured {often} would be needed"
    return text + _other_seeds(finding)


def _other_seeds(finding: Finding) -> str:
    if timed(finding.claim) or finding.seeds != 1:
        return ""
    return "; a second training seed, since another training run may say otherwise"


def plots_of(board: Board, finding: Finding) -> list[Plot]:
    """Per-prompt (or per-round) differences, and the interval beside those of each training seed or process."""
    found = differences(board, finding)
    if finding.value is None or not len(found):
        return []
    numbers = {row.name: i for i, row in enumerate(board.rows)}
    return [_by_prompt(board, finding, found, numbers), _forest(board, finding, numbers)]


def _axis(board: Board, finding: Finding) -> str:
    return f"improvement, {difference_unit(board, finding)}"


def _by_prompt(board: Board, finding: Finding, found: Array, numbers: dict[str, int]) -> Plot:
    """Sorted differences, each in the colour of the contender that it speaks for, with the interval of their mean as a band."""
    from matplotlib.ticker import MaxNLocator

    claim, ordered, what = finding.claim, np.sort(found)[::-1], "round" if timed(finding.claim) else "prompt"
    scale, _ = finding_numbers(board, finding)
    figure, axes = panel(width=4.6)
    places = np.arange(1, len(ordered) + 1)
    if finding.low is not None and finding.high is not None:
        axes.axhspan(finding.low * scale, finding.high * scale, color=INK, alpha=0.1, lw=0)
    axes.axhline((finding.value or 0.0) * scale, color=INK, lw=1)
    _references(axes.axhline, claim.margin)
    for side, name in ((ordered > 0, claim.better), (ordered < 0, claim.than), (ordered == 0, "")):
        colour = SERIES[numbers[name] % len(SERIES)] if name else INK
        if len(ordered) <= MARKERS:
            axes.vlines(places[side], 0, ordered[side], color=colour, lw=1.2)
            axes.plot(places[side], ordered[side], "o", ms=4, color=colour, mec=colour)
        else:
            axes.fill_between(places, 0, np.where(side, ordered, 0.0), color=colour, lw=0, step="mid")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel(f"{what}s, from the best for {claim.better} to the worst")
    axes.set_ylabel(_axis(board, finding))
    title = f"{what.capitalize()} by {what}"
    text = f"Each is {claim.better} less {claim.than} on the same {what}" + ("." if timed(claim) else ", mean of its clips and seeds.")
    text += " What it adds to the total, drawn so that the mean is that of the totals." if totals.known(claim.metric) else ""
    text += f" Above zero in the colour of {claim.better}. Line and band: {'median' if timed(claim) else 'mean'} and 95\u00a0% interval."
    return Plot(title, text, svg(figure, f"{title}: {claim.text}", None, claim.id), (numbers[claim.better], numbers[claim.than]))


def _forest(board: Board, finding: Finding, numbers: dict[str, int]) -> Plot:
    claim, lines = finding.claim, parts(board, finding)
    figure, axes = panel(width=4.6, height=0.85 + 0.3 * len(lines))
    for place, part in enumerate(lines):
        if part.low is not None and part.high is not None:
            axes.plot([part.low, part.high], [place, place], color=INK, lw=2.4 if place == 0 else 1.2, solid_capstyle="round")
        axes.plot([part.value], [place], "o", color=INK, mec=INK, ms=6 if place == 0 else 4)
    _references(axes.axvline, claim.margin)
    axes.set_yticks(range(len(lines)), [part.name for part in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel(_axis(board, finding))
    title = "The interval that decides"
    verdicts = f"Right of the margin: {REPRODUCED}; left of it: {CONTRADICTED}; across it: {INCONCLUSIVE}."
    alone = "" if len(lines) == 1 else " Below it each " + ("start of the program" if timed(claim) else "training seed") + " alone."
    return Plot(title, verdicts + alone, svg(figure, f"{title}: {_spoken(lines)}", None, claim.id), (numbers[claim.better], numbers[claim.than]))


def _spoken(lines: Sequence[Part]) -> str:
    return "; ".join(f"{part.name} {shown(part.value, 2, sign=True)} {ranged(part.low, part.high, 2, sign=True)}".rstrip() for part in lines)


def _references(line: Any, margin: float) -> None:
    """Zero, and the margin where there is one."""
    line(0, color=FAINT, lw=1.2, zorder=0)
    if margin:
        line(margin, color=INK, lw=1, ls=(0, (4, 3)), zorder=0)
