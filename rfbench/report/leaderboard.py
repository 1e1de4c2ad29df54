"""From run directories to a table: a row per contender, a cell per suite and metric.

A row pools the training seeds of its contender. Under a study every cell that was asked for is there: with a number and
where it came from, or with the reason why there is none. Without a study a run that is not whole is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rfbench import config, published, records, statistics, timing
from rfbench.config import Contender, External, Study
from rfbench.errors import UserError, did_you_mean
from rfbench.published import Reported
from rfbench.records import RANDOM
from rfbench.report import division, evidence
from rfbench.report.evidence import Bench, Scores, Timed, Training
from rfbench.scorers.base import Metric
from rfbench.statistics import Interval, Sample
from rfbench.timing import TIMINGS, Key

NUMBER, NOT_RUN, INCOMPLETE, LEFT_OUT = "number", "not run", "incomplete", "not asked for"
BOARD = "profile"  # stands for all contenders where a problem is with the run that times them in turn


RANDOM_WEIGHTS = "its weights are random, so its scores mean nothing"
APPROXIMATE = {
    "8-bit products": "its network multiplies 8-bit floats, so its scores and times are approximate",
    "tiny decoder": "its pixels come from the tiny decoder, so its scores and the times that count decoding are approximate",
}


@dataclass(frozen=True)
class Row:
    """A contender and the names of its runs: one, or one per training seed."""

    name: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...] = ()  # training seeds; none where nothing was trained for this table
    note: str = ""  # how it differs from the row or recipe that it comes from
    suites: tuple[str, ...] | None = None
    title: str = ""
    saw: tuple[str, ...] = ()
    reported: tuple[Reported, ...] = ()
    caveats: tuple[str, ...] = ()  # why its numbers are not what its name promises


@dataclass(frozen=True)
class Cell:
    """What a row has in a column: a number with its interval (for timings: median and range), or why not."""

    row: str
    column: str  # suite, or the hardware of a timing
    metric: str
    state: str = NUMBER
    reason: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    clips: int = 0
    prompts: int = 0
    seeds: int = 0
    repeats: int = 0  # of a timing: processes, or rounds of the only one
    sources: tuple[dict[str, Any], ...] = ()  # one per run
    saw: bool = False  # optimised in training
    best: bool = False
    tied: bool = False  # its paired difference from the best is not told from zero
    ranks: tuple[int, int] | None = None  # best and worst that it may have in its column
    open: str = ""  # why it does not stand with the closed entries; nothing: complete, clean commit, shipped suite, pinned weights
    sample: Sample | None = field(default=None, repr=False, compare=False)
    rounds: dict[Key, float] = field(default_factory=dict, repr=False, compare=False)  # of a timing: its value in each round


Problems = dict[tuple[str, str, str], tuple[str, str]]  # (run, suite or hardware, scorer or "" for all) -> state, reason


@dataclass(frozen=True)
class Board:
    """Everything that a report shows."""

    title: str
    study: str | None
    rows: tuple[Row, ...]
    suites: tuple[str, ...]
    hardware: tuple[str, ...]
    metrics: dict[str, Metric]
    columns: dict[str, tuple[str, ...]]  # suite or hardware -> its metrics
    cells: dict[tuple[str, str, str], Cell]  # (row, suite or hardware, metric)
    benches: dict[tuple[str, str], Bench]  # (run, suite)
    scores: dict[tuple[str, str], tuple[Scores, ...]]
    timings: dict[tuple[str, str], tuple[Timed, ...]]  # (row, hardware)
    problems: Problems
    trainings: tuple[Training, ...] = ()
    needs: str = ""


Find = Callable[[str, str], Path | None]  # (verb, name of a run) -> its directory


def suite_name(suite: str) -> str:
    """What a suite is called that was given by name or by path."""
    whole, at, share = suite.partition("@")
    return (Path(whole).stem if whole.endswith((".jsonl", ".yaml", ".yml")) else whole) + at + share


def study_rows(study: Study, name: str) -> tuple[Row, ...]:
    """A row per contender of a study that is called `name`, with the names that `reproduce` gives to its runs.

    A contender with `recipe`, and every variant of one, has a run per training seed.

    Raises:
        UserError: a contender that is not there is named, or names are not unique.
    """
    named = {contender.name: contender for contender in study.contenders}
    if len(named) != len(study.contenders):
        raise UserError(f"study '{study.title}' has two contenders of one name; rename one")

    def root(contender: Contender, above: tuple[str, ...] = ()) -> Contender:
        if contender.of is None:
            return contender
        if contender.of not in named or contender.of in above:
            raise UserError(f"study '{study.title}': contender '{contender.name}' is 'of' '{contender.of}'{did_you_mean(contender.of, named)}")
        return root(named[contender.of], (*above, contender.name))

    def note(contender: Contender) -> str:
        parts = [f"{key} = {value}" for key, value in contender.set.items()]
        if contender.of:
            return f"{contender.of} with {', '.join(parts)}" if parts else f"same as {contender.of}"
        source = f"recipe {contender.recipe}" if contender.recipe else f"baseline {contender.baseline}"
        return f"{source} with {', '.join(parts)}" if parts else source

    rows = []
    for contender in study.contenders:
        seeds = root(contender).seeds if root(contender).recipe else ()
        runs = tuple(f"{name}/{contender.name}-s{seed}" for seed in seeds) or (f"{name}/{contender.name}",)
        suites = None if contender.suites is None else tuple(map(suite_name, contender.suites))
        told = published.about(_system(contender, study.title))
        rows.append(Row(contender.name, runs, seeds, note(contender), suites, reported=told))
    return tuple(rows)


def _system(contender: Contender, where: str) -> str | None:
    """Whose published numbers stand beside those of a contender.

    Raises:
        UserError: it names a system about which nothing was printed.
    """
    if contender.system is not None and contender.system not in published.systems():
        known = published.systems()
        raise UserError(
            f"study '{where}', contender '{contender.name}': nothing is published about '{contender.system}'{did_you_mean(contender.system, known)}"
        )
    unchanged = contender.baseline is not None and not contender.set
    return contender.system or (published.system_of(str(contender.baseline)) if unchanged else None)


def read_study(study: Study, name: str, find: Find, hardware_of: Callable[[str], list[str]], gaps: Problems | None = None) -> Board:
    """The board of a study; what is missing or broken becomes a cell that says so, by the words of `gaps` where those tell more.

    Raises:
        UserError: a contender is a variant of nobody, or everything of the study is missing.
    """
    rows = study_rows(study, config.name_of(name))
    runs = [run for row in rows for run in row.runs]
    called = config.name_of(name)
    profiles = {machine: [path] for machine in hardware_of(called) if (path := find("profile", f"{called}/{machine}"))} if study.profile else {}
    board = _read(rows, tuple(map(suite_name, study.suites)), study.scorers, profiles, find, gaps or {}, strict=False)
    logs = [path for run in runs if (path := find("train", run)) is not None]
    if not board.benches:
        reasons = sorted({reason for _, reason in board.problems.values()})
        raise UserError(
            f"nothing of study '{name}' can be reported ({reasons[0] if reasons else 'no suites'}); run it first: rfbench reproduce {name}"
        )
    return dataclasses.replace(
        board,
        title=study.title,
        study=Path(name).name if name.endswith((".yaml", ".yml")) else name,
        trainings=tuple(map(evidence.read_training, logs)),
        needs=study.needs,
    )


def read_runs(directories: Sequence[Path]) -> Board:
    """The board of some runs, a row per baseline.

    Raises:
        UserError: one of them is not whole.
    """
    kinds: dict[str, dict[str, Path]] = {"generate": {}, "profile": {}, "train": {}}
    for directory in directories:
        run = evidence.run_of(directory)
        if run.verb not in kinds or run.name in kinds[run.verb]:
            raise UserError(
                f"{directory} is {'a second' if run.verb in kinds else 'no'} run that a report can show ({run.verb} {run.name}); leave it out"
            )
        kinds[run.verb][run.name] = directory
    profiles: dict[str, list[Path]] = {}
    timed: list[str] = []
    for name, directory in kinds["profile"].items():
        profiles.setdefault(name.rpartition("/")[2], []).append(directory)
        timed += evidence.read_timings(directory)
    names = list(dict.fromkeys([*(name.rpartition("/")[0] for name in kinds["generate"]), *timed]))
    suites = tuple(dict.fromkeys(name.rpartition("/")[2] for name in kinds["generate"]))
    if not suites:
        raise UserError("none of these runs has clips to report on; name a run of generate, for example reward-forcing/toy-short")
    rows = tuple(
        Row(
            name,
            (name,),
            suites=tuple(suite for suite in suites if f"{name}/{suite}" in kinds["generate"]),
            reported=published.about(published.system_of(name)),
        )
        for name in names
    )
    board = _read(rows, suites, None, profiles, lambda verb, name: kinds[verb].get(name), {}, strict=True)
    return dataclasses.replace(board, trainings=tuple(evidence.read_training(path) for path in kinds["train"].values()))


def _read(
    rows: Sequence[Row],
    suites: tuple[str, ...],
    scorers: tuple[str, ...] | None,
    profiles: dict[str, list[Path]],
    find: Find,
    gaps: Problems,
    *,
    strict: bool,
) -> Board:
    """Read all runs of all rows and the profile runs of each hardware; with `strict` the first problem is raised instead of noted."""
    benches: dict[tuple[str, str], Bench] = {}
    scores: dict[tuple[str, str], tuple[Scores, ...]] = {}
    timings: dict[tuple[str, str], tuple[Timed, ...]] = {}
    problems: Problems = {}
    hardware = tuple(profiles)

    def attempt(place: tuple[str, str, str], directory: Path, read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except UserError as error:
            if strict:
                raise
            problems[place] = (INCOMPLETE, str(error).replace(str(directory), "/".join(place[:2])))  # a report names runs, not paths
        return None

    for row in rows:
        for suite in suites if row.suites is None else row.suites:
            for run in row.runs:
                directory = find("generate", f"{run}/{suite}")
                if directory is None:
                    problems[run, suite, ""] = (NOT_RUN, f"{run}/{suite} has not been generated")
                    continue
                bench = attempt((run, suite, ""), directory, evidence.read_bench, directory)
                if bench is None:
                    continue
                wanted = evidence.scorers_of(bench) if scorers is None else scorers
                found = [attempt((run, suite, scorer), directory, evidence.read_scores, bench, scorer) for scorer in wanted]
                benches[run, suite], scores[run, suite] = bench, tuple(item for item in found if item is not None)
    for machine, directories in profiles.items():
        for directory in directories:
            timed = attempt((BOARD, machine, ""), directory, evidence.read_timings, directory) or {}
            for row in rows:
                if there := tuple(timed[run] for run in row.runs if run in timed):
                    timings[row.name, machine] = timings.get((row.name, machine), ()) + there
    _same_conditions(benches, scores, problems, strict=strict)
    problems |= gaps
    rows = tuple(_described(row, [bench for (run, _), bench in benches.items() if run in row.runs]) for row in rows)
    columns, metrics = _columns(suites, scores, hardware, timings)
    cells = {}
    for row in rows:
        for suite in suites:
            for metric in columns[suite]:
                cells[row.name, suite, metric] = _cell(row, suite, metric, benches, scores, problems)
        for machine in hardware:
            for metric in columns[machine]:
                cells[row.name, machine, metric] = _timed(row, machine, metric, timings.get((row.name, machine), ()), problems)
    for place, cell in cells.items():
        cells[place] = dataclasses.replace(cell, open=division.why_open(cell, benches, timings))
    _rank(cells, metrics)
    columns |= {machine: tuple(metric for metric in columns[machine] if TIMINGS[metric.partition(".")[2]].headline) for machine in hardware}
    return Board("rfbench report", None, rows, suites, hardware, metrics, columns, cells, benches, scores, timings, problems)


def _described(row: Row, benches: Sequence[Bench]) -> Row:
    """A row with what its baseline files say."""
    if not benches:
        return row
    first = benches[0].baseline
    caveats = [RANDOM_WEIGHTS] if any(bench.weights_sha256 == RANDOM for bench in benches) else []
    if isinstance(first, External):
        return dataclasses.replace(row, title=first.title, saw=first.saw, caveats=(*caveats, first.protocol))
    caveats += [APPROXIMATE[what] for what in first.approximate]
    seeds = row.seeds or ((int(first.trained_by["seed"]),) if "seed" in first.trained_by else ())
    return dataclasses.replace(row, title=first.title, saw=first.saw, seeds=seeds, caveats=tuple(caveats))


def _same_conditions(benches: dict[Any, Bench], scores: dict[Any, tuple[Scores, ...]], problems: Problems, *, strict: bool) -> None:
    """Numbers stand beside each other only if their prompts and their scorer are the same: the odd ones out are taken off the table."""

    def usual(values: Iterable[str]) -> str:
        return Counter(values).most_common(1)[0][0]

    def refuse(place: tuple[str, str, str], sentence: str) -> None:
        if strict:
            raise UserError(sentence)
        problems[place] = (INCOMPLETE, sentence)

    for suite in {place[1] for place in benches}:
        wanted = usual(bench.suite_sha256 for (_, name), bench in benches.items() if name == suite)
        for place in [place for place, bench in benches.items() if place[1] == suite and bench.suite_sha256 != wanted]:
            refuse((*place, ""), f"{benches[place].run.name} was generated from another version of suite '{suite}' than the rest; generate it again")
            del benches[place], scores[place]
    for scorer in {item.scorer for found in scores.values() for item in found}:
        version = usual(item.version for found in scores.values() for item in found if item.scorer == scorer)
        for (run, suite), found in scores.items():
            for item in found:
                if item.scorer == scorer and item.version != version:
                    refuse(
                        (run, suite, scorer),
                        f"{run}/{suite} was scored by version {item.version} of '{scorer}', the rest by {version}; score it again",
                    )
            scores[run, suite] = tuple(item for item in found if item.scorer != scorer or item.version == version)


def _columns(
    suites: Sequence[str],
    scores: dict[tuple[str, str], tuple[Scores, ...]],
    hardware: Sequence[str],
    timings: dict[tuple[str, str], tuple[Timed, ...]],
) -> tuple[dict[str, tuple[str, ...]], dict[str, Metric]]:
    """The metrics that say something, by suite and by hardware, in the order of their scorers."""
    columns: dict[str, tuple[str, ...]] = {}
    metrics: dict[str, Metric] = {}
    for suite in suites:
        found = [item for (_, name), items in scores.items() if name == suite for item in items]
        columns[suite] = tuple(dict.fromkeys(metric for item in found for metric in item.metrics if metric in item.values or metric in item.whole))
        metrics |= {metric: text for item in found for metric, text in item.metrics.items()}
    for machine in hardware:
        there = {metric for (_, name), items in timings.items() if name == machine for timed in items for metric in timed.columns}
        columns[machine] = tuple(f"profile.{name}" for name in TIMINGS if f"profile.{name}" in there)
        metrics |= {f"profile.{name}": definition.metric for name, definition in TIMINGS.items() if f"profile.{name}" in there}
    return columns, metrics


def source(directory_name: str, run: records.Run, **more: Any) -> dict[str, Any]:
    """Where a number came from, without the name of the machine or any path on it."""
    code = run.recorded.get("code") or {}
    return {
        "run": directory_name,
        "fingerprint": run.fingerprint,
        "commit": code.get("commit"),
        "dirty": code.get("dirty"),
        "version": code.get("version"),
    } | more


def _cell(
    row: Row,
    suite: str,
    metric: str,
    benches: dict[tuple[str, str], Bench],
    scores: dict[tuple[str, str], tuple[Scores, ...]],
    problems: Problems,
) -> Cell:
    scorer = metric.partition(".")[0]
    empty = Cell(row.name, suite, metric)
    if row.suites is not None and suite not in row.suites:
        return dataclasses.replace(empty, state=LEFT_OUT, reason=f"{row.name} is not run on {suite} here")
    for run in row.runs:
        state, reason = problems.get((run, suite, ""), problems.get((run, suite, scorer), ("", "")))
        if state:
            return dataclasses.replace(empty, state=state, reason=reason)
    values: list[float] = []
    prompts: list[int] = []
    seeds: list[int] = []
    sources = []
    wholes: list[float] = []  # of a metric that is no mean over clips, one per run
    percentage = False
    for number, run in enumerate(row.runs):
        bench = benches[run, suite]
        item = next((item for item in scores[run, suite] if metric in item.values or metric in item.whole), None)
        if item is None:
            return dataclasses.replace(empty, state=INCOMPLETE, reason=f"{run}/{suite} has no '{metric}' although other rows do; score it again")
        if metric in item.whole:
            wholes.append(item.whole[metric])
        for clip in bench.clips:
            if clip.id in item.values.get(metric, ()):
                values.append(item.values[metric][clip.id])
                prompts.append(clip.prompt_id)
                seeds.append(row.seeds[number] if row.seeds else number)
        percentage = item.metrics[metric].unit == "%"
        weights = {"weights_sha256": bench.weights_sha256, "suite_sha256": bench.suite_sha256}
        sources.append(source(bench.run.name, bench.run, **weights, scorer=scorer, scorer_version=item.version))
    seen = any(trained in (metric, scorer) for trained in row.saw)
    if wholes:
        told = "one number of all clips, without an interval"
        return dataclasses.replace(
            empty,
            value=math.fsum(wholes) / len(wholes),
            reason=told,
            clips=sum(len(benches[run, suite].clips) for run in row.runs),
            sources=tuple(sources),
            saw=seen,
        )
    try:
        sample = statistics.sample(values, prompts, seeds)
    except ValueError as error:
        return dataclasses.replace(empty, state=INCOMPLETE, reason=f"{row.name} on {suite}: {error}; generate and score it again")
    found: Interval = statistics.mean(sample)
    bounds = (0.0, 100.0) if percentage else (-math.inf, math.inf)
    return dataclasses.replace(
        empty,
        value=found.value,
        low=None if found.low is None else max(found.low, bounds[0]),
        high=None if found.high is None else min(found.high, bounds[1]),
        reason=found.why,
        clips=len(values),
        prompts=found.prompts,
        seeds=found.seeds,
        sources=tuple(sources),
        saw=seen,
        sample=sample,
    )


def _timed(row: Row, machine: str, metric: str, timings: tuple[Timed, ...], problems: Problems) -> Cell:
    """Median and range over processes, or over the rounds of the only one."""
    empty = Cell(row.name, machine, metric)
    if not timings:
        state, reason = problems.get((BOARD, machine, ""), (NOT_RUN, f"{row.name} has not been profiled on {machine}"))
        return dataclasses.replace(empty, state=state, reason=reason)
    found = [timed for timed in timings if metric in timed.columns]
    if not found:
        return dataclasses.replace(empty, state=LEFT_OUT, reason=f"'{metric}' does not apply: {row.name} does not stream, or not for long enough")
    rounds = {key: value for timed in found for key, value in timed.columns[metric].items()}
    spread = timing.spread(rounds)
    sources = tuple(source(timed.run.name, timed.run, weights_sha256=timed.weights_sha256, timed=timed.contender) for timed in found)
    return dataclasses.replace(empty, value=spread.median, low=spread.low, high=spread.high, repeats=spread.repeats, sources=sources, rounds=rounds)


def _rank(cells: dict[tuple[str, str, str], Cell], metrics: dict[str, Metric]) -> None:
    """Mark the best number of each column, those that cannot be told from it, and the ranks that each may have.

    Closed entries compete among themselves; where there is none, the open ones do.
    """
    for column, metric in dict.fromkeys(place[1:] for place in cells):
        numbers = {place: cell for place, cell in cells.items() if place[1:] == (column, metric) and cell.value is not None}
        numbers = {place: cell for place, cell in numbers.items() if not cell.open} or numbers
        if len(numbers) < 2:
            continue
        higher = metrics[metric].higher_is_better
        leader = max(numbers, key=lambda place: (1 if higher else -1) * (numbers[place].value or 0.0))
        ranks: dict[tuple[str, str, str], tuple[int, int]] = {}
        with contextlib.suppress(ValueError):  # not the same prompts: no ranks
            samples = {place: cell.sample for place, cell in numbers.items() if cell.sample is not None}
            ranks = dict(zip(samples, statistics.ranks(list(samples.values()), higher_is_better=higher), strict=True))
        for place, cell in numbers.items():
            tied = place != leader and _tied(numbers[leader], cell)
            cells[place] = dataclasses.replace(cell, best=place == leader, tied=tied, ranks=ranks.get(place))


def _tied(leader: Cell, cell: Cell) -> bool:
    """Whether the difference from the leader may be zero: by their paired interval, or for timings of separate runs by overlapping ranges."""
    if leader.sample is None or cell.sample is None:
        with contextlib.suppress(ValueError):
            ratio = timing.compared(leader.rounds, cell.rounds, higher_is_better=True)
            return ratio.low is None or ratio.high is None or ratio.low <= 1 <= ratio.high
        return None not in (leader.low, leader.high, cell.low, cell.high) and not (cell.high < leader.low or leader.high < cell.low)  # type: ignore[operator]
    try:
        found = statistics.difference(leader.sample, cell.sample)
    except ValueError:  # not the same prompts
        return False
    return statistics.verdict(found.low, found.high) == statistics.INCONCLUSIVE
