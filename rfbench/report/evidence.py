"""What a report is made of: run directories read back, and refused with a sentence when anything about them is not whole.

Nothing is repaired or left out here. A run that is not done, videos that are not the recorded bytes, scores that do not
cover every clip once, numbers that are not finite: each is a UserError, and what becomes of it is the report's decision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfbench import records
from rfbench.config import Baseline
from rfbench.errors import UserError
from rfbench.records import Chunk, Clip, Run, Score
from rfbench.scorers.base import Metric, verify_video
from rfbench.strict import build

TIMINGS = {
    "dit_fps": Metric(True, "FPS", "Frames of a chunk over the median time of its steps and its context pass, from chunk 3 on; no decoding."),
    "e2e_fps": Metric(True, "FPS", "Frames after chunk 2 over the time that they take until they can be read: decoding and copying included."),
    "clip_fps": Metric(True, "FPS", "Frames of an 81 frame clip over the time from request to last frame: text encoder included, what a user sees."),
    "ttff_s": Metric(False, "s", "Time from the request of a new prompt to its first frame."),
    "rtf": Metric(True, "×", "Seconds of video per second of computing; above 1 is faster than real time."),
    "slowdown": Metric(False, "×", "Median time of a chunk in the last third of a stream over that in the first third: 1 is constant cost."),
    "peak_memory_bytes": Metric(False, "bytes", "Most memory that was held after warm-up: allocated on a GPU, resident on a CPU."),
}


@dataclass(frozen=True)
class Bench:
    """Finished clips of one baseline on one suite, whose videos are the bytes that were recorded."""

    directory: Path
    run: Run
    baseline: Baseline
    clips: tuple[Clip, ...]
    suite: str
    suite_sha256: str
    weights_sha256: str


@dataclass(frozen=True)
class Scores:
    """What one scorer found on a Bench. Metrics are called `<scorer>.<metric>`."""

    scorer: str
    version: str
    metrics: dict[str, Metric]
    values: dict[str, dict[str, float]]  # metric -> clip id -> value
    segments: dict[str, dict[str, tuple[float, ...]]]  # metric -> clip id -> values of its segments in order


@dataclass(frozen=True)
class Spread:
    """A timing over repetitions: its median, and the range that is not to be claimed."""

    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class Timing:
    """One baseline timed on one machine."""

    directory: Path
    run: Run
    baseline: str
    hardware: str
    metrics: dict[str, Spread]  # `profile.<metric>` -> spread
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Training:
    """What a training run logged: the steps, and a column per statistic (None where a row has none)."""

    directory: Path
    run: Run
    steps: tuple[int, ...]
    columns: dict[str, tuple[float | None, ...]]


def finished(directory: Path, verb: str) -> Run:
    """The Run of a directory, if it is of this verb and done.

    Raises:
        UserError: it is not.
    """
    run = records.read_run(directory)
    if run.verb != verb:
        raise UserError(f"{directory} holds a {run.verb} run where a {verb} run is needed")
    if run.status != records.DONE:
        told = f" ({run.error})" if run.error else ""
        raise UserError(f"{directory} is not finished, it is {run.status}{told}; run the command that began it again")
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


def read_bench(directory: Path) -> Bench:
    """Clips of a generate run.

    Raises:
        UserError: not done, no clips, not all clips, or a video that is not what was recorded.
    """
    run = finished(directory, "generate")
    baseline = build(Baseline, declared(run, "baseline"), where=f"{directory}/run.json baseline")
    suite = declared(run, "suite")
    clips = records.read_clips(directory)
    wanted = len(suite["prompts"]) * suite["samples"] if {"prompts", "samples"} <= suite.keys() else len(clips)
    if not clips or len(clips) != wanted:
        raise UserError(f"{directory} has {len(clips)} of {wanted or 'its'} clips although it is done; generate it again")
    for clip in clips:
        verify_video(directory, clip)
    return Bench(
        directory, run, baseline, tuple(clips), declared(run, "suite", "name"), declared(run, "suite", "sha256"), declared(run, "weights_sha256")
    )


def scorers_of(bench: Bench) -> list[str]:
    """Names of the scorers that have been over a Bench."""
    return sorted(path.stem for path in (bench.directory / "scores").glob("*.json"))


def read_scores(bench: Bench, scorer: str) -> Scores:
    """One scorer's rows, all finite, each once. Where a metric has only segments, a clip's value is their mean.

    A metric may say nothing about a prompt (there is no direction in "a red disc") but then about none of its clips, and
    every clip has a number of some metric. Metrics that say nothing at all about this suite have no values.

    Raises:
        UserError: not scored, of other clips, not all of them, twice, or not a number.
    """
    folder = bench.directory / "scores"
    again = f"score it again: rfbench eval {bench.run.name} -s {scorer}"
    if not (folder / f"{scorer}.json").exists():
        raise UserError(f"{bench.run.name} has not been scored by '{scorer}'; {again.replace(' again', '', 1)}")
    note = records.read_json(folder / f"{scorer}.json")
    where = f"{bench.run.name}, scorer '{scorer}'"
    ids = {clip.id for clip in bench.clips}
    if note.get("clips") != len(ids):
        raise UserError(f"{where}: scored {note.get('clips')} clips, but the run has {len(ids)}; {again}")
    if note.get("clips_sha256") != records.clips_sha256(bench.clips):
        raise UserError(f"{where}: the scored videos are not the ones that are there now; {again}")
    if not (folder / f"{scorer}.jsonl").exists() or note.get("rows_sha256") != records.sha256_of(folder / f"{scorer}.jsonl"):
        raise UserError(f"{where}: {scorer}.jsonl is not what the scorer wrote; {again}")
    values: dict[str, dict[str, float]] = {name: {} for name in note["metrics"]}
    pieces: dict[str, dict[str, dict[int, float]]] = {name: {} for name in note["metrics"]}
    seen = set()
    for row in records.read_rows(folder / f"{scorer}.jsonl", Score):
        if row.clip not in ids or row.metric not in values:
            raise UserError(f"{where}: a row is about clip {row.clip}, metric '{row.metric}', which the run or the scorer does not have; {again}")
        if not isinstance(row.value, int | float) or not math.isfinite(row.value):
            raise UserError(f"{where}: '{row.metric}' of clip {row.clip} is {row.value}, not a number; {again}")
        if (row.metric, row.clip, row.segment) in seen:
            raise UserError(f"{where}: '{row.metric}' of clip {row.clip} is there twice; {again}")
        seen.add((row.metric, row.clip, row.segment))
        if row.segment is None:
            values[row.metric][row.clip] = float(row.value)
        else:
            pieces[row.metric].setdefault(row.clip, {})[row.segment] = float(row.value)
    segments = {name: _in_order(found, f"{where}: '{name}'", again) for name, found in pieces.items() if found}
    for name, parts_of in segments.items():
        if not values[name]:
            values[name] = {clip: sum(parts) / len(parts) for clip, parts in parts_of.items()}
    prompt_of = {clip.id: clip.prompt_id for clip in bench.clips}
    for name, there in [*((name, set(column)) for name, column in values.items()), *((name, set(column)) for name, column in segments.items())]:
        missing = {prompt_of[clip] for clip in there} & {prompt_of[clip] for clip in ids - there}
        if missing:
            raise UserError(f"{where}: '{name}' has no value for some clips of prompt {min(missing)}; {again}")
    silent = ids.difference(*values.values())
    if silent:
        raise UserError(f"{where}: there is no number at all for clip {min(silent)}; {again}")
    metrics = {f"{scorer}.{name}": build(Metric, text, where=f"{where}: {name}") for name, text in note["metrics"].items()}
    return Scores(
        scorer,
        str(note["version"]),
        metrics,
        {f"{scorer}.{name}": column for name, column in values.items() if column},
        {f"{scorer}.{name}": column for name, column in segments.items()},
    )


def _in_order(found: dict[str, dict[int, float]], what: str, again: str) -> dict[str, tuple[float, ...]]:
    """Segments as a row per clip, if all clips have equally many and none is missing."""
    count = len(next(iter(found.values())))
    if any(sorted(parts) != list(range(count)) for parts in found.values()):
        raise UserError(f"{what} does not have the same segments for every clip; {again}")
    return {clip: tuple(parts[i] for i in range(count)) for clip, parts in found.items()}


def read_timing(directory: Path) -> Timing:
    """Headline timings and chunk rows of a profile run.

    Raises:
        UserError: not done, or a timing is not a positive number.
    """
    run = finished(directory, "profile")
    baseline, _, hardware = run.name.rpartition("/")
    metrics = {}
    for name, found in run.result.items():
        if name not in TIMINGS or not isinstance(found, Mapping):
            continue
        spread = Spread(float(found["median"]), float(found["min"]), float(found["max"]), int(found["n"]))
        if not all(math.isfinite(value) and value > 0 for value in (spread.median, spread.low, spread.high)):
            raise UserError(f"{directory}: '{name}' is {found}, not a timing; profile it again")
        metrics[f"profile.{name}"] = spread
    chunks = records.read_rows(directory / "chunks.jsonl", Chunk)
    for before, chunk in itertools.pairwise(sorted(chunks, key=lambda chunk: (chunk.process, chunk.repeat, chunk.index))):
        if (before.process, before.repeat) == (chunk.process, chunk.repeat) and not before.readable < chunk.readable:
            raise UserError(f"{directory}/chunks.jsonl: chunk {chunk.index} is readable before the one before it; profile it again")
    if not metrics:
        raise UserError(f"{directory}: its run.json has no timings; profile it again")
    return Timing(directory, run, baseline, hardware, metrics, tuple(chunks))


def read_training(directory: Path) -> Training:
    """The log of a train run.

    Raises:
        UserError: not done, no log, or a statistic that is not finite.
    """
    run = finished(directory, "train")
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
