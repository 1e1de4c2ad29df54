"""From run directories to a table: a row per contender, a cell per suite and metric.

A row pools the training seeds of its contender. Under a study every cell that was asked for is there: with a number and
where it came from, or with the reason why there is none. Without a study a run that is not whole is refused.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfbench import config, published
from rfbench.config import Contender, External, Study
from rfbench.errors import UserError, did_you_mean
from rfbench.records import RANDOM
from rfbench.report import cells as cells_of
from rfbench.report import division, evidence
from rfbench.report.cells import BOARD, INCOMPLETE, NOT_RUN, Cell, Problems, Row
from rfbench.report.evidence import Bench, Scores, Timed, Training
from rfbench.scorers.base import Metric
from rfbench.timing import TIMINGS

RANDOM_WEIGHTS = "its weights are random, so its scores mean nothing"
APPROXIMATE = {
    "8-bit products": "its network multiplies 8-bit floats, so its scores and times are approximate",
    "8-bit attention": "its network's attention is computed from 8-bit floats, so its scores and times are approximate",
    "tiny decoder": "its pixels come from the tiny decoder, so its scores and the times that count decoding are approximate",
}


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
    profiles = {machine: [path] for machine in hardware_of(called) if (path := find("profile", f"{called}/{machine}"))}
    board = _read(rows, tuple(map(suite_name, study.suites)), study.scorers, profiles if study.profile else None, find, gaps or {}, strict=False)
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
    profiles: dict[str, list[Path]] | None,
    find: Find,
    gaps: Problems,
    *,
    strict: bool,
) -> Board:
    """Read all runs of all rows and the profile runs of each hardware; with `strict` the first problem is raised instead of noted.

    Without `profiles`, not even none, no speeds are asked for.
    """
    benches: dict[tuple[str, str], Bench] = {}
    scores: dict[tuple[str, str], tuple[Scores, ...]] = {}
    timings: dict[tuple[str, str], tuple[Timed, ...]] = {}
    problems: Problems = {}

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
    for machine, directories in (profiles or {}).items():
        for directory in directories:
            timed = attempt((BOARD, machine, ""), directory, evidence.read_timings, directory) or {}
            for row in rows:
                if there := tuple(timed[run] for run in row.runs if run in timed):
                    timings[row.name, machine] = timings.get((row.name, machine), ()) + there
    speeds = dict(timings)
    for row in rows if profiles is not None else ():
        for machine, beside in filter(None, [evidence.timed_beside(bench) for (run, _), bench in benches.items() if run in row.runs]):
            speeds[row.name, machine] = (*speeds.get((row.name, machine), ()), beside)
    hardware = tuple(dict.fromkeys([*(profiles or ()), *(machine for _, machine in speeds)]))
    _same_conditions(benches, scores, problems, strict=strict)
    problems |= gaps
    rows = tuple(_described(row, [bench for (run, _), bench in benches.items() if run in row.runs]) for row in rows)
    columns, metrics = _columns(suites, scores, hardware, speeds)
    cells = {}
    for row in rows:
        for suite in suites:
            for metric in columns[suite]:
                cells[row.name, suite, metric] = cells_of.of_suite(row, suite, metric, benches, scores, problems)
        for machine in hardware:
            for metric in columns[machine]:
                cells[row.name, machine, metric] = cells_of.of_timing(row, machine, metric, speeds.get((row.name, machine), ()), problems)
    for place, cell in cells.items():
        cells[place] = dataclasses.replace(cell, open=division.why_open(cell, benches, speeds))
    cells_of.rank(cells, metrics)
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
