"""Closed and open entries, as in MLPerf: what may stand in one ranking, and the reason why the rest stands apart.

Closed is a number that anybody can make again: complete, by code of one clean commit, on a suite as it ships, with weights
whose hash is declared. Everything else is shown as well, apart and with its reason, and takes no part in bests and ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from rfbench import suites
from rfbench.config import External
from rfbench.errors import UserError
from rfbench.records import IMPORTED, RANDOM, Run
from rfbench.report.evidence import Bench, Timed
from rfbench.scorers.base import DRAWN


def why_open(cell: Any, benches: Mapping[tuple[str, str], Bench], timings: Mapping[tuple[str, str], tuple[Timed, ...]]) -> str:
    """Why a cell of a board is not closed; nothing if it is, or if it has no number."""
    if cell.value is None:
        return ""
    names = {source["run"] for source in cell.sources}
    own = [bench for (_, suite), bench in benches.items() if suite == cell.column and bench.run.name in names]
    timed = [item for item in timings.get((cell.row, cell.column), ()) if item.run.name in names]
    reasons = [reason for bench in own for reason in (_code(bench.run), _weights(bench), _suite(bench.suite, bench.suite_sha256))]
    reasons += [reason for item in timed for reason in (_code(item.run), "random weights" if item.weights_sha256 == RANDOM else "", _how(item))]
    reasons += ["scored by drawn weights" if cell.metric.split(".")[0] in DRAWN else ""]
    return "; ".join(dict.fromkeys(filter(None, reasons)))


def _code(run: Run) -> str:
    """What keeps the code of a run from being found again; it may have been continued by other code."""
    places = [run.recorded, *run.recorded.get("continued_on", ())]
    codes = [place.get("code") or {} for place in places]
    if any(code.get("commit") is None for code in codes):
        return "code of no known commit"
    return "code with uncommitted changes" if any(code.get("dirty") is not False for code in codes) else ""


def _how(timed: Timed) -> str:
    """In what a timed contender is approximate, or that it was not timed as the others were."""
    if timed.beside:
        return f"timed as it made its own clips: {timed.beside}"
    return _told(timed.run.recorded.get("contenders", {}).get(timed.contender, {}).get("approximate", ()))


def _told(approximate: Sequence[str]) -> str:
    return f"approximate: {', '.join(approximate)}" if approximate else ""


def _weights(bench: Bench) -> str:
    if bench.weights_sha256 == RANDOM:
        return "random weights"
    if bench.weights_sha256 == IMPORTED:
        return "videos made elsewhere"
    told = bench.baseline
    if isinstance(told, External):
        pinned = all(part.sha256 is not None for part in (told.weights, *told.parts.values()))
    elif told.approximate:
        return _told(told.approximate)
    else:
        pinned = told.weights.sha256 is not None or "fingerprint" in told.trained_by
    return "" if pinned else "weights whose hash is not declared"


@functools.cache
def _suite(name: str, sha256: str) -> str:
    if name not in suites.SUITES:
        return f"suite {name} does not ship with rfbench"
    try:
        shipped = suites.suite_sha256(suites.load_suite(name))
    except UserError:  # its rewritten prompts are not here
        return f"suite {name} could not be read here"
    return "" if sha256 == shipped else f"part or another version of suite {name}"
