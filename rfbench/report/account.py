"""What a report says in sentences: what was run and on what, how to do it again, what it does not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rfbench.records import Run
from rfbench.report.cells import INCOMPLETE, NOT_RUN
from rfbench.report.claims import Finding
from rfbench.report.leaderboard import Board
from rfbench.report.tables import difference_unit, finding_numbers, label, shown
from rfbench.statistics import INCONCLUSIVE, LEVEL


def runs_of(board: Board) -> list[Run]:
    """Every run that the board was read from; one profile run may have timed all contenders."""
    timed = {timed.run.name: timed.run for found in board.timings.values() for timed in found}.values()
    return [*(bench.run for bench in board.benches.values()), *timed, *(log.run for log in board.trainings)]


def several(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"


def summary(board: Board) -> str:
    """One paragraph: how many contenders on which suites, how many clips, by which code, on what machine."""
    suites = []
    for suite in board.suites:
        clips = next((bench.clips for (_, name), bench in board.benches.items() if name == suite), None)
        if clips is not None:
            prompts = len({clip.prompt_id for clip in clips})
            each = len(clips) // prompts
            suites.append(f"{suite} ({prompts} prompts, {each} clip{'s' * (each > 1)} of {clips[0].frames / clips[0].fps:.0f} s each)")
    total = sum(len(bench.clips) for bench in board.benches.values())
    trained = [row for row in board.rows if row.seeds]
    counts = sorted({len(row.seeds) for row in trained})
    each_with = f"{' or '.join(str(count) for count in counts)} training seed{'s' * (counts != [1])} each"
    seeds = f"; {len(trained)} of them trained, with {each_with}" if trained else ""
    text = f"{len(board.rows)} contender{'s' * (len(board.rows) > 1)} on {several(suites)}{seeds}. {total:,} clips"
    timed = len({row for row, _ in board.timings})
    text += f" scored, {timed} contender{'s' * (timed != 1)} timed." if timed else " scored."
    return f"{text} Made by {several(_commits(board))} on {several(_machines(board))}."


def _recorded(board: Board) -> list[dict[str, Any]]:
    """What every sitting of every run recorded: a run may have been continued by other code or elsewhere."""
    return [place for run in runs_of(board) for place in (run.recorded, *run.recorded.get("continued_on", ()))]


def _commits(board: Board) -> list[str]:
    found = dict.fromkeys(
        f"rfbench {code.get('version', '?')}"
        + (f" at {code['commit'][:10]}" if code.get("commit") else "")
        + (" with changes" if code.get("dirty") else "")
        for code in (place.get("code") or {} for place in _recorded(board))
    )
    return list(found)


def _machines(board: Board) -> list[str]:
    found: dict[str, None] = {}
    for machine in (place.get("machine") or {} for place in _recorded(board)):
        gpu = several(machine["gpu"]) + ", " if machine.get("gpu") else ""
        found[f"{gpu}{machine.get('cpu', 'an unknown machine')}, {machine.get('cores', '?')} cores"] = None
    return list(found)


def facts(board: Board) -> list[tuple[str, str]]:
    """Name and text of what the runs recorded of code, machine, packages and seeds."""
    packages: dict[str, dict[str, None]] = {}
    pythons: dict[str, None] = {}
    for run in runs_of(board):
        for name, version in (run.recorded.get("packages") or {}).items():
            packages.setdefault(name, {})[str(version)] = None
        machine = run.recorded.get("machine") or {}
        pythons[f"Python {machine.get('python', '?')}, {machine.get('system', '?')}, {machine.get('memory_gib', '?')} GiB"] = None
    suite_seeds = dict.fromkeys(str(bench.run.inputs["suite"].get("seed", "?")) for bench in board.benches.values())
    days = sorted(run.started[:10] for run in runs_of(board) if run.started)
    hours = sum(run.seconds for run in runs_of(board)) / 3600
    found = [
        ("code", several(_commits(board))),
        ("machine", several(_machines(board))),
        ("system", several(list(pythons))),
        ("packages", ", ".join(f"{name} {' or '.join(versions)}" for name, versions in packages.items())),
        ("training seeds", "; ".join(f"{row.name} {', '.join(map(str, row.seeds))}" for row in board.rows if row.seeds) or "nothing was trained"),
        ("suite seeds", ", ".join(suite_seeds)),
        ("run", f"{days[0]} to {days[-1]}, {hours:.1f} hours of computing" if days else f"{hours:.1f} hours of computing"),
    ]
    return [(name, text) for name, text in found if text]


def commands(board: Board) -> list[str]:
    """What to type to get these numbers again."""
    if board.study is not None:
        return [f"rfbench reproduce {board.study}"]
    lines = []
    for run, suite in board.benches:
        lines += [f"rfbench generate {run} --suite {suite}", f"rfbench eval {run}/{suite}"]
    return [*lines, "rfbench report " + " ".join(f"{run}/{suite}" for run, suite in board.benches)]


def limits(board: Board, findings: Sequence[Finding]) -> list[str]:
    """What these numbers do not show, as far as the numbers themselves tell."""
    found = []
    single = [row.name for row in board.rows if len(row.seeds) == 1]
    if single:
        found.append(
            f"Another training run might come out differently: {several(single)} rest on one training seed; their intervals cover prompts only."
        )
    few = sorted({len(row.seeds) for row in board.rows if 1 < len(row.seeds) < 5})
    if few:
        found.append(
            f"{' or '.join(str(count) for count in few)} training seeds are few: their spread is known roughly, intervals are wide where they differ."
        )
    found.append("Intervals speak for prompts like those of the suite and for these metrics, not for other prompts or for what people would prefer.")
    judged = [finding for finding in findings if finding.value is not None]
    if len(judged) > 1:
        decided = [finding for finding in judged if finding.verdict != INCONCLUSIVE and finding.p_corrected is not None]
        kept = sum(finding.p_corrected <= 1 - LEVEL for finding in decided if finding.p_corrected is not None)
        found.append(
            f"{len(judged)} claims are judged one by one at 95 %: with no true difference anywhere, about {0.05 * len(judged):.1f} of them would "
            f"still get a verdict other than inconclusive. Corrected for their number (Holm), {kept} of {len(decided)} such verdicts stay."
        )
    if any(finding.published is not None for finding in findings):
        found.append(
            "Published numbers come from other models, prompts, metrics and machines: their direction can be compared with ours, not their size."
        )
    for finding in findings:
        if finding.verdict == INCONCLUSIVE and finding.detectable is not None:
            scale, places = finding_numbers(board, finding)
            size = f"{shown(finding.detectable * scale, places)} {difference_unit(board, finding)}"
            found.append(
                f"“{finding.claim.text}” is open: a true difference of {size} in {label(finding.claim.metric)} would be found four times in five."
            )
    found += [f"{row.name}: {caveat}." for row in board.rows for caveat in row.caveats]
    for row in board.rows:
        if row.saw:
            found.append(
                f"{row.name} was trained to raise {several(list(row.saw))}: what judges the same thing is marked or has to be read with that in mind."
            )
    if board.hardware:
        found.append(f"Timings are of {several(list(board.hardware))}; other hardware may order the contenders differently.")
    return found + _gaps(board) + _mixed(board)


def _gaps(board: Board) -> list[str]:
    """What was asked for and is not there."""
    missing = [f"{run}/{column}" for (run, column, _), (state, _) in board.problems.items() if state == NOT_RUN]
    found = [f"Not run: {several(missing)}."] if missing else []
    reasons = dict.fromkeys(reason for state, reason in board.problems.values() if state == INCOMPLETE)
    return [*found, *(f"Incomplete: {reason}." for reason in reasons)]


def _mixed(board: Board) -> list[str]:
    """Differences of code and machine within one table."""
    found = []
    if any((place.get("code") or {}).get("dirty") for place in _recorded(board)):
        found.append("Some runs were made by code with changes that were not committed; their commit does not say all.")
    if len(_commits(board)) > 1:
        found.append("The runs were made by more than one version of the code.")
    if len(_machines(board)) > 1:
        found.append("The runs were made on more than one machine.")
    return found
