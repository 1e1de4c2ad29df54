"""How much one device carries: many clips made together, and many streams that are watched while they are made.

    runs/batch/<name>/<hardware>/{run.json, trials.jsonl}      `profile --batch 1,2,4`: clips per second against clips made together
    runs/streams/<name>/<hardware>/{run.json, trials.jsonl}    `profile --streams`: the most streams that meet their deadlines

Streams share one model, in two ways: they take turns, a chunk each, so that anybody can come and go; or they are made together, a chunk of all
at a time, which fills a device better, and makes everybody wait for the slowest. All begin at once, the worst moment for the first chunk.
A number of streams is carried if each of them, in each repetition, has at least TARGET of its frames in time with BUFFER chunks in
store, and keeps the pace of its video once its window is full: a store hides for a while that a device is too slow.

Frames count when their bytes can be read in host memory. Each trial is one row with the raw times of all its chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rfbench import attention, baselines, hardware, proof, provenance, records, sampler, stopwatch, strict, timing
from rfbench.errors import UserError
from rfbench.settings import settings
from rfbench.suites import load_suite
from rfbench.timing import CLIP, STEADY, Chunk

TARGET = 0.99  # of the frames of a stream
BUFFER = 1  # chunks in store before playing starts, besides the first
MOST = 256  # streams that are tried
IN_TURN, TOGETHER = "in turn", "together"


@dataclass(frozen=True)
class Trial:
    """Clips or streams that were made at the same time."""

    count: int  # clips that were made together, or streams
    repeat: int
    streams: tuple[tuple[Chunk, ...], ...]  # seconds since all were asked for: the one batch of clips, or each stream; none: out of memory
    peak_bytes: int
    together: bool = False  # streams: whether a chunk of all was made at a time
    steady: int = STEADY  # first chunk of a stream that is counted, see `timing.full`


def largest(carried: Callable[[int], bool], most: int = MOST) -> int:
    """The most that is carried while one more is not, up to `most`: doubled until it is too much, then halved in between. 0 if not even one."""
    good, bad = 0, 1
    while bad <= most and carried(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if carried(middle) else (good, middle)
    return good


def in_time(trial: Trial, fps: int) -> float:
    """Share of the frames that are in time with BUFFER chunks in store, of the stream that has the least."""
    return min((timing.viewing(stream, fps, BUFFER).in_time for stream in trial.streams), default=0.0)


def pace(trial: Trial) -> float:
    """Frames per second of the slowest stream, of its counted chunks."""
    return min((timing.pace(stream, trial.steady) or 0.0 for stream in trial.streams), default=0.0)


def clips_per_second(trial: Trial) -> float:
    """Clips of a batch over the time from their request to their last frame; 0 where they were too many."""
    return trial.count / trial.streams[0][-1].readable if trial.streams else 0.0


def tried(count: int, repeat: int, make: Callable[[], tuple[tuple[Chunk, ...], ...]], *, together: bool = False, steady: int = STEADY) -> Trial:
    """A trial, which may be too much for the memory of a GPU."""
    _, peak = stopwatch.meter()
    try:
        return Trial(count, repeat, make(), peak(), together, steady)
    except torch.OutOfMemoryError:
        pass  # only out of here is nothing held any more
    torch.cuda.empty_cache()
    return Trial(count, repeat, (), peak(), together, steady)


def counts(text: str) -> list[int]:
    """Numbers of clips that are given as `1,2,4`.

    Raises:
        UserError: they are not.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words) or len(set(words)) < len(words):
        raise UserError(f"--batch '{text}' is not a list of different numbers of clips; for example --batch 1,2,4,8")
    return [int(word) for word in words]


def profile(
    baseline: str,
    fields: Sequence[str],
    *,
    batches: Sequence[int] = (),
    name: str | None = None,
    chunks: int,
    repeats: int,
    random_weights: bool = False,
    fresh: bool = False,
) -> Path:
    """`profile --batch` with `batches`, `profile --streams` without: see `rfbench.load`.

    Raises:
        UserError: the baseline cannot be used, or has no streams that get steady.
    """
    ready = baselines.prepare(baseline, fields, name=name, random_weights=random_weights)
    steady = stopwatch.counted_from(ready)
    if not batches:
        stopwatch.refuse_short(ready, chunks)
    if not batches and stopwatch.possible(ready, chunks) < chunks:
        raise UserError(f"'{baseline}' cannot make a stream of {chunks} chunks; --batch times whole clips of it")
    device, verb = baselines.device(), "batch" if batches else "streams"
    machine = hardware.name(device)
    directory = settings().runs / verb / ready.name / machine
    inputs = {"contender": ready.inputs(), "repeats": repeats} | ({"batches": sorted(batches)} if batches else {"chunks": chunks})
    inputs |= {"settings": hardware.timed_by()}
    with provenance.session(directory, verb, f"{ready.name}/{machine}", inputs, fresh=fresh) as run:
        if not run.done:
            run.record(
                device=str(device), attention=attention.kernel(device), software=hardware.software(device), weights_sha256=ready.weights_sha256
            )
            before, backbone = hardware.state(device), ready.open()
            stopwatch.forget_prompts(backbone)
            cfg, prompts = ready.cfg.sampler, [prompt.text for prompt in load_suite("smoke").prompts]
            lean, latents = sampler.lean_of(backbone, cfg), ready.latents(CLIP, "the profile")
            run.record(
                precision=stopwatch.precision(backbone),
                approximate=ready.cfg.approximate,
                fps=backbone.shape.fps,
            )

            last: list[tuple[int, bool]] = []

            def make(count: int, repeat: int, together: bool = False) -> tuple[tuple[Chunk, ...], ...]:
                texts, seeds = list(itertools.islice(itertools.cycle(prompts), count)), range(repeat, repeat + count)

                def made() -> tuple[tuple[Chunk, ...], ...]:
                    if batches:
                        return (stopwatch.time_clips(backbone, cfg, lean, texts, latents, seeds),)
                    return stopwatch.time_streams(backbone, cfg, lean, texts, chunks, seeds, together=together)

                again = (
                    stopwatch.WARM_UPS if lean is not None and "graphs" in lean.taken else 1
                )  # passes are recorded when they come for the second time
                if last != [(count, together)]:  # a batch of a new size is slow at first, and so are passes of memory that was not used yet
                    last[:] = [(count, together)]
                    for _ in range(again):
                        made()
                return made()

            path = directory / "trials.jsonl"
            there = {(trial.count, trial.repeat, trial.together): trial for trial in read_trials(directory)}
            with records.appending(path) as append:

                def trial(count: int, repeat: int, together: bool = False) -> Trial:
                    key = count, repeat, together
                    if key not in there:
                        there[key] = tried(count, repeat, lambda: make(*key), together=together, steady=steady)
                        append(there[key])
                    return there[key]

                if batches:
                    for repeat in range(repeats):
                        for place in timing.order([str(batch) for batch in sorted(batches)], repeat):
                            trial(int(place), repeat)
                else:
                    fps = backbone.shape.fps
                    most = {
                        how: largest(lambda count, how=how: all(meets(trial(count, repeat, how == TOGETHER), fps) for repeat in range(repeats)))  # type: ignore[misc]
                        for how in (IN_TURN, TOGETHER)
                    }
                    run.result.update(streams=max(most.values()), by=most)
            run.record(shortcuts=lean.taken if lean else [], left_out=dict(proof.left_out))
            run.record(hardware={"before": before, "after": hardware.state(device)})
            run.result.update(trials_sha256=records.sha256_of(path))
    return directory


def meets(trial: Trial, fps: int) -> bool:
    """Whether all streams of a trial meet their deadlines and keep the pace."""
    return in_time(trial, fps) >= TARGET and pace(trial) >= fps


def read_trials(directory: Path) -> list[Trial]:
    """The trials of a run, in the order in which they were made.

    Raises:
        UserError: a damaged file.
    """
    path = directory / "trials.jsonl"
    rows: list[dict[str, Any]] = records.read_rows(path, dict) if path.exists() else []
    return [strict.build(Trial, row, where=f"{path} trial {i}") for i, row in enumerate(rows)]


def document(directory: Path) -> dict[str, Any]:
    """A finished run as one JSON document: `tried` has, for each number of clips or streams, every repetition's figures."""
    run, trials = records.read_run(directory), read_trials(directory)
    found: dict[str, Any] = {"name": run.name, "status": run.status, "fingerprint": run.fingerprint, "seconds": run.seconds}
    found |= {"asked": {key: value for key, value in run.inputs.items() if key not in ("contender", "settings")}, "recorded": run.recorded}
    if run.verb == "streams":
        found |= {"streams": run.result["streams"], "by": run.result["by"], "most_tried": MOST, "target": TARGET, "buffer": BUFFER}
    fps, rows = run.recorded["fps"], []
    for together, count in sorted({(trial.together, trial.count) for trial in trials}):
        own = [trial for trial in trials if (trial.together, trial.count) == (together, count)]
        row: dict[str, Any] = {"count": count, "peak_bytes": max(trial.peak_bytes for trial in own)}
        row["out_of_memory"] = any(not trial.streams for trial in own)
        if run.verb == "streams":
            row |= {
                "how": TOGETHER if together else IN_TURN,
                "in_time": [in_time(trial, fps) for trial in own],
                "fps": [pace(trial) for trial in own],
            }
            row["meets"] = all(meets(trial, fps) for trial in own)
        else:
            row["clips_per_second"] = [clips_per_second(trial) for trial in own]
        rows.append(row)
    return found | {"tried": rows}


def table(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """A document as rows for people: a number of clips made together or of streams each."""
    rows = []
    for tried in document["tried"]:
        row = {"": f"{tried['count']} {tried.get('how', '')}".strip()}
        memory = "out of memory" if tried["out_of_memory"] else f"{tried['peak_bytes'] / 1e6:.4g}"
        if "clips_per_second" in tried:
            rates = tried["clips_per_second"]
            row |= {"clips per second, text encoder included": _spread(rates), "frames per second": f"{CLIP * median(rates):.4g}"}
        else:
            row |= {"FPS of the slowest stream": _spread(tried["fps"]), "frames in time, of the worst stream": _spread(tried["in_time"], 100, "%")}
            row["carried"] = "yes" if tried["meets"] else "no"
        rows.append(row | {"peak MB": memory})
    return rows


def _spread(values: Sequence[float], scale: float = 1.0, unit: str = "") -> str:
    return f"{scale * median(values):.4g}{unit} [{scale * min(values):.4g}, {scale * max(values):.4g}]"
