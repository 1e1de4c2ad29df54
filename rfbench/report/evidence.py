"""What a report is made of: run directories or their records read back, and refused with a sentence when anything is not whole.

Nothing is repaired or left out here. A run that is not done, videos that are not the recorded bytes, scores that do not
cover every clip once, numbers that are not finite: each is a UserError, and what becomes of it is the report's decision.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rfbench import config, records, timing
from rfbench.config import Baseline, External
from rfbench.errors import AGAIN, UserError
from rfbench.records import Clip, Run, Score
from rfbench.report import record
from rfbench.report.record import Record, is_record
from rfbench.scorers.base import Metric, verify_video
from rfbench.strict import build
from rfbench.timing import Chunk, Key

REAL = (int, float)  # a union is made anew whenever it is written out, which millions of values feel


@dataclass(frozen=True)
class Bench:
    """Finished clips of one baseline on one suite, whose videos are the bytes that were recorded."""

    directory: Path  # or the record's file
    run: Run
    baseline: Baseline | External
    clips: tuple[Clip, ...]
    suite: str
    suite_sha256: str
    weights_sha256: str
    kept: Record | None = field(default=None, repr=False)  # what it was read from where that is a record: there are no videos

    @functools.cached_property
    def prompts(self) -> dict[str, int]:
        """Clip id -> prompt."""
        return {clip.id: clip.prompt_id for clip in self.clips}


@dataclass(frozen=True)
class Scores:
    """What one scorer found on a Bench. Metrics are called `<scorer>.<metric>`."""

    scorer: str
    version: str
    metrics: dict[str, Metric]
    values: dict[str, dict[str, float]]  # metric -> clip id -> value
    segments: dict[str, dict[str, tuple[float, ...]]]  # metric -> clip id -> values of its segments in order
    sparse: tuple[str, ...] = ()  # metrics that may lack a value for some clips of a prompt
    whole: dict[str, float] = field(default_factory=dict)  # metric -> what all clips add up to, where that is no mean over them


@dataclass(frozen=True)
class Timed:
    """One contender timed on one machine."""

    run: Run
    contender: str  # as the run calls it; of contenders that differ in weights alone, the one that was timed
    weights_sha256: str
    columns: dict[str, dict[Key, float]]  # `profile.<metric>` -> value of each round
    streams: tuple[tuple[Chunk, ...], ...]  # of each round
    rounds: tuple[Mapping[str, Any], ...] = field(repr=False)  # of everybody who was timed with it, as they were written
    beside: str = ""  # what counted where it was timed as it made its clips, and in no rounds with others


@dataclass(frozen=True)
class Training:
    """What a training run logged: the steps, and a column per statistic (None where a row has none)."""

    directory: Path
    run: Run
    steps: tuple[int, ...]
    columns: dict[str, tuple[float | None, ...]]


def run_of(source: Path) -> Run:
    """The Run of a directory or of a record.

    Raises:
        UserError: it is neither.
    """
    return record.read(source).run if is_record(source) else records.read_run(source)


def finished(source: Path, verb: str, kept: Record | None = None) -> Run:
    """The Run of a directory, or of the record that was read from there, if it is of this verb and done.

    Raises:
        UserError: it is not.
    """
    run = kept.run if kept else records.read_run(source)
    if run.verb != verb:
        raise UserError(f"{source} holds a {run.verb} run where a {verb} run is needed")
    if run.status != records.DONE:
        told = f"{source} failed: {run.error}" if run.status == records.FAILED and run.error else f"{source} is not finished, it is {run.status}"
        raise UserError(f"{told.removesuffix(AGAIN)}{AGAIN}")
    return run


def declared(run: Run, *keys: str) -> Any:
    """An entry of a run's declared inputs.

    Raises:
        UserError: it is not there.
    """
    value: Any = run.inputs
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            raise UserError(f"run {run.name} does not declare '{'.'.join(keys)}', so its numbers cannot be traced; run it again with this version")
        value = value[key]
    return value


def read_bench(source: Path) -> Bench:
    """Clips of a generate run.

    Raises:
        UserError: not done, no clips, not all clips, or a video that is not what was recorded.
    """
    kept = record.read(source) if is_record(source) else None
    run = finished(source, "generate", kept)
    told = run.recorded.get("baseline")
    if isinstance(told, dict):
        told = {key: value for key, value in told.items() if key != "reported"}  # older runs keep there what `published` says now
    baseline = config.told(told, where=f"{source}/run.json, recorded.baseline")
    suite = declared(run, "suite")
    clips = list(kept.clips) if kept else records.read_clips(source)
    wanted = sum(prompt.get("samples") or suite["samples"] for prompt in suite["prompts"]) if {"prompts", "samples"} <= suite.keys() else len(clips)
    if not clips or len(clips) != wanted:
        raise UserError(f"{source} has {len(clips)} of {wanted or 'its'} clips although it is done; generate it again")
    if kept is None:
        _verify(source, clips)
    names = declared(run, "suite", "name"), declared(run, "suite", "sha256"), declared(run, "weights_sha256")
    return Bench(source, run, baseline, tuple(clips), *names, kept)


def _verify(source: Path, clips: Sequence[Clip]) -> None:
    """Hash every video, on as many cores as there are.

    Raises:
        UserError: one is not what was recorded; the first such clip.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = -(-len(clips) // cores)

    def verify(begin: int) -> None:
        for clip in clips[begin : begin + share]:
            verify_video(source, clip)

    with ThreadPoolExecutor(cores) as pool:
        for _ in pool.map(verify, range(0, len(clips), share)):
            pass


def scorers_of(bench: Bench) -> list[str]:
    """Names of the scorers that have been over a Bench."""
    return sorted(path.stem for path in (bench.directory / "scores").glob("*.json")) if bench.kept is None else sorted(bench.kept.scores)


Values = dict[str, dict[str, float]]  # metric -> clip id -> value
Segments = dict[str, dict[str, tuple[float, ...]]]  # metric -> clip id -> values of its segments in order


def read_scores(bench: Bench, scorer: str) -> Scores:
    """One scorer's rows, all finite, each once. Where a metric has only segments, a clip's value is their mean.

    A metric may say nothing about a prompt (there is no direction in "a red disc") but then about none of its clips, and
    every clip has a number of some metric. Metrics that say nothing at all about this suite have no values.

    Raises:
        UserError: not scored, of other clips, not all of them, twice, or not a number.
    """
    again = f"score it again: rfbench eval {bench.run.name} -s {scorer}"
    where = f"{bench.run.name}, scorer '{scorer}'"
    if scorer not in scorers_of(bench):
        raise UserError(f"{bench.run.name} has not been scored by '{scorer}'; {again.replace(' again', '', 1)}")
    note, values, segments = (_kept_rows if bench.kept else _written_rows)(bench, scorer, where, again)
    for name, parts_of in segments.items():
        if not values.get(name):
            values[name] = {clip: sum(parts) / len(parts) for clip, parts in parts_of.items()}
    for name, column in values.items():
        if _finite(column.values()):
            continue
        bad = [clip for clip, value in column.items() if not isinstance(value, REAL) or not math.isfinite(value)]
        for clip in bad[:1]:
            raise UserError(f"{where}: '{name}' of clip {clip} is {column[clip]}, not a number; {again}")
    ids, prompt_of, order = bench.prompts.keys(), bench.prompts, list(bench.prompts)
    complete = {name for name, column in values.items() if list(column) == order}  # nothing is missing, and all is in order
    partial = [(name, column.keys()) for name, column in values.items() if name not in complete]
    for name, there in [*partial, *((name, column.keys()) for name, column in segments.items())]:
        rest = ids - there
        missing = {prompt_of[clip] for clip in there} & {prompt_of[clip] for clip in rest} if rest else set()
        if missing and name not in note.get("sparse", ()):
            raise UserError(f"{where}: '{name}' has no value for some clips of prompt {min(missing)}; {again}")
    silent = set() if complete else set(ids).difference(*values.values())
    if silent:
        raise UserError(f"{where}: there is no number at all for clip {min(silent)}; {again}")
    metrics = {f"{scorer}.{name}": build(Metric, text, where=f"{where}: {name}") for name, text in note["metrics"].items()}
    return Scores(
        scorer,
        str(note["version"]),
        metrics,
        {f"{scorer}.{name}": column if name in complete else _in_order_of(order, column) for name, column in values.items() if column},
        {f"{scorer}.{name}": column for name, column in segments.items()},
        tuple(note.get("sparse", ())),
        {f"{scorer}.{name}": value for name, value in note.get("whole", {}).items()},
    )


def _finite(values: Iterable[float]) -> bool:
    """Whether all are numbers and none is NaN or infinite; False may be wrong, True is not."""
    try:
        return math.isfinite(math.fsum(values))
    except (TypeError, ValueError, OverflowError):
        return False


def _in_order_of(clips: Iterable[str], column: dict[str, float]) -> dict[str, float]:
    """A column in the order of the clips, whatever that of the rows is."""
    return {clip: column[clip] for clip in clips if clip in column}


def _kept_rows(bench: Bench, scorer: str, where: str, again: str) -> tuple[dict[str, Any], Values, Segments]:
    """Note, values and segments from a record's columns."""
    assert bench.kept is not None
    note, ids = bench.kept.scores[scorer], [clip.id for clip in bench.clips]
    for column in (*note["values"].values(), *note["segments"].values()):
        if len(column) != len(ids):
            raise UserError(f"{where}: scored {len(column)} clips, but the run has {len(ids)}; {again}")
    found: list[Any] = [
        {name: {clip: value for clip, value in zip(ids, column, strict=True) if value is not None} for name, column in note[key].items()}
        for key in ("values", "segments")
    ]
    pieces = {name: {clip: tuple(parts) for clip, parts in column.items()} for name, column in found[1].items()}
    for name, column in pieces.items():
        if len({len(parts) for parts in column.values()}) > 1:
            raise UserError(f"{where}: '{name}' does not have the same segments for every clip; {again}")
    return note, found[0], pieces


def _written_rows(bench: Bench, scorer: str, where: str, again: str) -> tuple[dict[str, Any], Values, Segments]:
    """Note, values and segments from the files that a scorer left."""
    folder = bench.directory / "scores"
    note = records.read_json(folder / f"{scorer}.json")
    ids = {clip.id for clip in bench.clips}
    if note.get("clips") != len(ids):
        raise UserError(f"{where}: scored {note.get('clips')} clips, but the run has {len(ids)}; {again}")
    if refused := note.get("refused"):
        first, reason = next(iter(refused.items()))
        raise UserError(
            f"{where}: incomplete, {len(refused)} of {len(ids)} clips could not be scored, first {first} ({reason}); mend them, then {again}"
        )
    if note.get("clips_sha256") != records.clips_sha256(bench.clips):
        raise UserError(f"{where}: the scored videos are not the ones that are there now; {again}")
    content = path.read_bytes() if (path := folder / f"{scorer}.jsonl").exists() else b""
    if not content or note.get("rows_sha256") != hashlib.sha256(content).hexdigest():
        raise UserError(f"{where}: {scorer}.jsonl is not what the scorer wrote; {again}")
    if (found := _plain_rows(content, note["metrics"])) is not None and all(column.keys() <= ids for column in found.values()):
        return note, found, {}
    values: dict[str, dict[str, float]] = {name: {} for name in note["metrics"]}
    pieces: dict[str, dict[str, dict[int, float]]] = {name: {} for name in note["metrics"]}
    for row in records.read_rows(folder / f"{scorer}.jsonl", Score):
        if row.clip not in ids or row.metric not in values:
            raise UserError(f"{where}: a row is about clip {row.clip}, metric '{row.metric}', which the run or the scorer does not have; {again}")
        if not isinstance(row.value, REAL) or not math.isfinite(row.value):
            raise UserError(f"{where}: '{row.metric}' of clip {row.clip} is {row.value}, not a number; {again}")
        column: dict[Any, float] = values[row.metric] if row.segment is None else pieces[row.metric].setdefault(row.clip, {})
        key = row.clip if row.segment is None else row.segment
        if key in column:
            raise UserError(f"{where}: '{row.metric}' of clip {row.clip} is there twice; {again}")
        column[key] = float(row.value)
    return note, values, {name: _in_order(found, f"{where}: '{name}'", again) for name, found in pieces.items() if found}


ROW = re.compile(r'{"clip":"([\w-]+)","metric":"(\w+)","segment":null,"value":(-?\d[\d.e+-]*)}\n')
OF_A_ROW = len('{"clip":"","metric":"","segment":null,"value":}\n')


def _plain_rows(content: bytes, metrics: Iterable[str]) -> Values | None:
    """Rows that are all spelled as they are written, of known metrics, each once and none of a segment; None: look at each of them.

    Millions are read like this in the time that their JSON would take ten times.
    """
    text = content.decode()
    rows = ROW.findall(text)
    if sum(map(len, itertools.chain.from_iterable(rows))) + OF_A_ROW * len(rows) != len(text):
        return None
    found: Values = {name: {} for name in metrics}
    try:
        for clip, metric, value in rows:
            found[metric][clip] = float(value)
    except (KeyError, ValueError):
        return None
    return found if sum(map(len, found.values())) == len(rows) else None


def _in_order(found: dict[str, dict[int, float]], what: str, again: str) -> dict[str, tuple[float, ...]]:
    """Segments as a row per clip, if all clips have equally many and none is missing."""
    count = len(next(iter(found.values())))
    if any(sorted(parts) != list(range(count)) for parts in found.values()):
        raise UserError(f"{what} does not have the same segments for every clip; {again}")
    return {clip: tuple(parts[i] for i in range(count)) for clip, parts in found.items()}


def read_timings(source: Path) -> dict[str, Timed]:
    """What a profile run timed, by contender; those that another was timed for are there as well.

    Raises:
        UserError: not done, not the rounds that were asked for, not what was written, or times that go backwards.
    """
    kept = record.read(source) if is_record(source) else None
    run = finished(source, "profile", kept)
    again, directory = "profile it again with --fresh", source
    rows = _rounds_file(source) if kept is None else "".join(records.canonical(row) + "\n" for row in kept.rounds).encode()
    if rows is None or run.result.get("rounds_sha256") != hashlib.sha256(rows).hexdigest():
        raise UserError(f"{directory}: rounds.jsonl is not what was written; {again}")
    plain: Sequence[Mapping[str, Any]] = records.read_rows(source / "rounds.jsonl", dict) if kept is None else kept.rounds
    rounds = timing.as_rounds(plain, f"{source}/rounds.jsonl")
    names = declared(run, "contenders")
    asked = {(process, number) for process in range(declared(run, "processes")) for number in range(declared(run, "repeats"))}
    if sorted(asked) != sorted((each.process, each.number) for each in rounds):
        raise UserError(f"{directory}/rounds.jsonl does not have the {len(asked)} rounds that were asked for, each once; {again}")
    for each in rounds:
        if sorted(turn.contender for turn in each.turns) != sorted(names):
            raise UserError(f"{directory}/rounds.jsonl: round {each.number} does not have every contender once; {again}")
        for turn in each.turns:
            where = f"{directory}/rounds.jsonl: of '{turn.contender}' in round {each.number}"
            if sum(chunk.frames for chunk in turn.clip) != timing.CLIP:
                raise UserError(f"{where} the clip does not have {timing.CLIP} frames; {again}")
            if any(chunk.cached is None for chunk in (*turn.stream, *turn.apart)):
                raise UserError(f"{where} the stream lacks a context pass; {again}")
            _forward(turn.clip, f"{where} the clip", again)
            _forward(turn.apart, f"{where} the stream with separate context passes", again)
            after = [replace(turn.switched, index=len(turn.stream))] if turn.switched else []  # whatever lies between is not recorded
            _forward((*turn.stream, *after), f"{where} the stream", again)
    found = {}
    for name, columns in timing.values(rounds, run.name).items():
        streams = tuple(turn.stream for each in rounds for turn in each.turns if turn.contender == name)
        weights = str(names[name]["weights_sha256"])
        found[name] = Timed(run, name, weights, {f"profile.{metric}": column for metric, column in columns.items()}, streams, tuple(plain))
    return found | {name: found[other] for name, other in run.recorded.get("timed_as", {}).items()}


def timed_beside(bench: Bench) -> tuple[str, Timed] | None:
    """The machine on which its authors' code made clips of its own length, and how fast; None where that was not told."""
    told = bench.run.result.get("times") or {}
    if not isinstance(bench.baseline, External) or "hardware" not in told or bench.clips[0].frames != bench.baseline.frames:
        return None
    columns = {f"profile.{name}": {(bench.run.name, 0, 0): float(told[name])} for name in timing.TIMINGS if name in told}
    return told["hardware"], Timed(bench.run, bench.run.name, bench.weights_sha256, columns, (), (), told["timed"])


def _rounds_file(directory: Path) -> bytes | None:
    path = directory / "rounds.jsonl"
    return path.read_bytes() if path.exists() else None


def _forward(chunks: Sequence[Chunk], what: str, again: str) -> None:
    """Chunks that follow each other in time, each of which took some; NaN is never later than anything."""
    ended = 0.0
    for number, chunk in enumerate(chunks):
        shown = chunk.readable if chunk.decoded is None else chunk.decoded  # a copy may end after the context pass has begun
        stamps = [stamp for stamp in (ended, chunk.begin, chunk.denoised, shown, chunk.cached) if stamp is not None]
        forward = all(before <= after for before, after in itertools.pairwise(stamps)) and chunk.begin < chunk.denoised <= chunk.readable
        if chunk.index != number or chunk.frames < 1 or not forward or not math.isfinite(chunk.readable + stamps[-1]):
            raise UserError(f"{what} has a chunk {chunk.index} whose times do not go forward from the one before; {again}")
        ended = shown  # a context pass that is left to the device may end when the next chunk has begun


def read_training(source: Path) -> Training:
    """The log of a train run.

    Raises:
        UserError: not done, no log, or a statistic that is not finite.
    """
    kept = record.read(source) if is_record(source) else None
    run, directory = finished(source, "train", kept), source
    if kept is not None:
        log = {name: tuple(column) for name, column in kept.log.items()}
        steps = log.pop("step", ())
        if not steps or any(len(column) != len(steps) for column in log.values()):
            raise UserError(f"{source}: its log does not have a value per step; record its run again")
        return Training(source, run, tuple(int(step or 0) for step in steps), log)
    rows: list[dict[str, Any]] = records.read_rows(directory / "log.jsonl", dict)
    if not rows or not all("step" in row for row in rows):
        raise UserError(f"{directory}/log.jsonl does not have rows with a step; train it again with --fresh")
    names = dict.fromkeys(name for row in rows for name, value in row.items() if name != "step" and isinstance(value, int | float))
    for row in rows:
        for name in names:
            if row.get(name) is not None and not math.isfinite(row[name]):
                raise UserError(f"{directory}/log.jsonl: '{name}' is {row[name]} at step {row['step']}; the training went wrong, train it again")
    columns = {name: tuple(None if row.get(name) is None else float(row[name]) for row in rows) for name in names}
    return Training(directory, run, tuple(int(row["step"]) for row in rows), columns)
