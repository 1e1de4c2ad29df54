"""`rfbench report --check`: whether what is committed under reports/ is whole, unaltered and follows from its records.

    reports/<study>/evidence.json    a manifest: which records the report rests on, why others are missing, the hash of every file

No run and no video has to be there: tables are made again from the records and compared byte for byte. Where the runs are
there, their records are made again as well, which reads every score row and hashes every clip.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rfbench import records
from rfbench.errors import UserError
from rfbench.report import account, evidence, leaderboard, record, reported, sources, tables
from rfbench.report.cells import Problems
from rfbench.report.claims import Finding
from rfbench.report.evidence import Bench, Scores
from rfbench.report.leaderboard import Board

MANIFEST = "evidence.json"
SCHEMA = 1
PAGE = "index.html"  # made from videos, large, and not committed
UNRECORDED = "No evidence records stand behind this report."  # what the README of a report has to say that cannot be checked


def texts(board: Board, findings: tuple[Finding, ...]) -> dict[str, str]:
    """The tables of a report, which need no video: name -> content."""
    summary, commands = account.summary(board), account.commands(board)
    found = {
        "README.md": tables.to_markdown(board, findings, summary, commands, reported.to_markdown(board)),
        "leaderboard.csv": tables.to_csv(board),
        "leaderboard.tex": tables.to_latex(board) + reported.to_latex(board),
    }
    found |= {"claims.csv": tables.claims_csv(findings)} if findings else {}
    return found | ({"reported.csv": reported.to_csv(board)} if any(row.reported for row in board.rows) else {})


def condensed(board: Board) -> dict[str, str]:
    """The records of everything that a board was read from: place below reports/records -> text."""
    found = {record.place(bench.run): _of_bench(bench, board.scores[place]) for place, bench in board.benches.items()}
    for timed in {timed.run.name: timed for timings in board.timings.values() for timed in timings}.values():
        found[record.place(timed.run)] = record.of_profile(timed.run, timed.rounds)
    for log in board.trainings:
        found[record.place(log.run)] = record.of_training(log.run, log.steps, log.columns)
    for place, content in found.items():
        for where in record.private(content):
            raise UserError(f"{place} cannot be recorded: its '{where}' holds a path of this machine or a token; run it without that", code=1)
    return {place: record.text(content) for place, content in found.items()}


def _of_bench(bench: Bench, scores: Iterable[Scores]) -> dict[str, Any]:
    """The record of a Bench and what scorers found on it."""

    def short(column: Mapping[str, Any]) -> dict[str, Any]:
        return {metric.partition(".")[2]: value for metric, value in column.items()}

    scored = {}
    for item in sorted(scores, key=lambda item: item.scorer):
        metrics = {name: dataclasses.asdict(told) for name, told in short(item.metrics).items()}
        scored[item.scorer] = {"version": item.version, "metrics": metrics, "values": short(item.values), "segments": short(item.segments)}
        if item.sparse:
            scored[item.scorer]["sparse"] = list(item.sparse)
        if item.whole:
            scored[item.scorer]["whole"] = short(item.whole)
    return record.of_bench(bench.run, bench.clips, scored)


def manifest(board: Board, kept: Mapping[str, str], files: Mapping[str, bytes]) -> str:
    """What a report rests on, as text."""
    gaps = [[*place, *why] for place, why in board.problems.items()]
    hashes = {place: json.loads(text)["sha256"] for place, text in sorted(kept.items())}
    own = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    return record.text({"schema": SCHEMA, "study": board.study, "records": hashes, "missing": gaps, "files": own})


def check(reports: Path, runs: Path, only: Path | None = None) -> list[str]:
    """What is wrong with the records and reports below `reports`, a sentence each; with `only` of one report and the records.

    `runs` is where the runs are, if they are: their records are made again and compared.
    """
    store = reports / "records"
    broken = {str(path.relative_to(store)): why for path in sorted(store.rglob("*.json")) if (why := _wrong(path, store))}
    found = [*_removed(reports), *broken.values()]
    found += [
        f"{folder} has tables and no {MANIFEST}, so nothing of it can be checked; {_from_runs(folder)}, or say in its README.md: {UNRECORDED}"
        for folder, told in _unrecorded(reports).items()
        if not told
    ]
    folders = [only] if only else sorted(path.parent for path in reports.rglob(MANIFEST))
    if not folders and not found:
        return [f"{reports} has no report with records; write one with `rfbench report --record`"]
    for folder in folders:
        found += _report(folder, store, broken)
    return found + list(_unlike_runs(store, runs, broken))


def unchecked(reports: Path) -> list[str]:
    """What `check` passes over below `reports` because it says of itself that there is nothing to hold it against, a sentence each."""
    told = [folder for folder, told in _unrecorded(reports).items() if told]
    return [f"not checked: {folder}, as its README.md says ({UNRECORDED.rstrip('.').lower()}); {_from_runs(folder)}" for folder in told]


def _unrecorded(reports: Path) -> dict[Path, bool]:
    """Folders with tables and no manifest, and whether their README says so."""
    folders = [path.parent for path in sorted(reports.rglob("leaderboard.csv")) if not (path.parent / MANIFEST).is_file()]
    readmes = {folder: folder / "README.md" for folder in folders}
    return {folder: readme.is_file() and UNRECORDED in readme.read_text(encoding="utf-8") for folder, readme in readmes.items()}


def _from_runs(folder: Path) -> str:
    return f"write it again from its runs with `rfbench report --study {folder.name} --record`"


def _wrong(path: Path, store: Path) -> str:
    """What is wrong with one record, or nothing."""
    try:
        kept = record.read(path)
        if record.place(kept.run) != str(path.relative_to(store)):
            return f"{path} is the record of {record.place(kept.run)}; move it there"
        for where in record.private(record.parse(path, record.SCHEMA)):
            return f"{path}: '{where}' holds a path of some machine or a token; record the run again without it"
        if kept.run.verb == "generate":
            bench = evidence.read_bench(path)
            for scorer in evidence.scorers_of(bench):
                evidence.read_scores(bench, scorer)
        elif kept.run.verb == "profile":
            evidence.read_timings(path)
        else:
            evidence.read_training(path)
    except UserError as error:
        return str(error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"{path} is not a record ({type(error).__name__}: {error}); write it again from its run: rfbench report --record"
    return ""


def _removed(reports: Path) -> Iterator[str]:
    """Records and manifests of the last commit that are gone; nothing where there is no repository."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(reports), "ls-tree", "-r", "-z", "--name-only", "HEAD", "--", "."]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    except OSError:
        return
    for name in done.stdout.split("\0") if done.returncode == 0 else ():
        kept = name.startswith("records/") or Path(name).name == MANIFEST
        if kept and not (reports / name).is_file():
            yield f"{reports / name} was removed since the last commit; bring it back: git checkout HEAD -- {reports / name}"


def _report(folder: Path, store: Path, broken: Mapping[str, str]) -> list[str]:
    """What is wrong with one report, apart from its records."""
    try:
        told = record.parse(folder / MANIFEST, SCHEMA)
        study, kept, gaps, files = told["study"], told["records"], told["missing"], told["files"]
    except UserError as error:
        return [str(error)]
    except KeyError as error:
        return [f"{folder / MANIFEST} lacks {error}; write the report again with --record"]
    again = f"rfbench report {f'--study {study} ' if study else ''}--record --out {folder}"
    found: list[str] = []
    for place in kept:
        if not (store / place).is_file():
            found.append(f"{store / place} is missing, which {folder} rests on; bring it back, or write the report again: {again}")
        elif place not in broken and record.parse(store / place, record.SCHEMA)["sha256"] != kept[place]:
            found.append(f"{store / place} is not the one that {folder} rests on; write the report again: {again}")
    for name, sha256 in files.items():
        path = folder / name
        if not path.is_file():
            found += [] if name == PAGE else [f"{path} is missing; bring it back, or write the report again: {again}"]
        elif records.sha256_of(path) != sha256:
            found.append(f"{path} is not what was written; write the report again: {again}")
    if found or broken.keys() & kept.keys():
        return found  # tables made from damaged records would only repeat it
    try:
        made = texts(*board_of(study, kept, gaps, store))
    except UserError as error:
        return [f"{folder} cannot be made again from its records: {error}"]
    return [
        f"{folder / name} is not what its records say; write the report again: {again}"
        for name, content in made.items()
        if name not in files or (folder / name).read_bytes() != content.encode()
    ]


def board_of(study: str | None, kept: Iterable[str], gaps: Iterable[Any], store: Path) -> tuple[Board, tuple[Finding, ...]]:
    """The board that a manifest stands for, from records alone."""
    if study is None:
        return leaderboard.read_runs([store / place for place in kept]), ()
    problems: Problems = {(run, column, scorer): (state, reason) for run, column, scorer, state, reason in gaps}
    return sources.study_board(study, sources.kept(store, kept), problems)


def _unlike_runs(store: Path, runs: Path, broken: Mapping[str, str]) -> Iterator[str]:
    """Records that are not what their run says, where the run is there."""
    for path in sorted(store.rglob("*.json")):
        place = str(path.relative_to(store))
        if place in broken:
            continue
        run = record.read(path).run
        directory = runs / sources.FOLDERS[run.verb] / run.name
        if not (directory / "run.json").is_file():
            continue
        try:
            made = again(directory, evidence.scorers_of(evidence.read_bench(path)) if run.verb == "generate" else ())
        except UserError as error:
            yield f"{path}: its run is damaged: {error}"
            continue
        if made != path.read_text(encoding="utf-8"):
            yield f"{path} is not what {directory} says; if that run is the one that counts, write its reports again with --record"


def again(directory: Path, scorers: Iterable[str]) -> str:
    """The record of a run directory, made from its files.

    Raises:
        UserError: the run is not whole.
    """
    run = records.read_run(directory)
    if run.verb == "profile":
        return record.text(record.of_profile(run, next(iter(evidence.read_timings(directory).values())).rounds))
    if run.verb == "train":
        log = evidence.read_training(directory)
        return record.text(record.of_training(run, log.steps, log.columns))
    bench = evidence.read_bench(directory)
    return record.text(_of_bench(bench, [evidence.read_scores(bench, scorer) for scorer in scorers]))
