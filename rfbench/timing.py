"""What `profile` writes down, and what its numbers mean: raw times of chunks in, every metric out, each defined here and nowhere else.

Contenders are timed in rounds. In a round each of them takes one turn, so whatever the machine does meanwhile happens to all
of them alike, and two of them are compared round by round. A turn is a clip of 81 frames from the request of a new prompt
on, and a stream whose prompt is already encoded and switches at its end. Frames count when their bytes can be read in host memory.

    runs/profile/<name>/<hardware>/rounds.jsonl      one Round per line: a round that was cut short is a torn line, so it is none
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rfbench import records, strict
from rfbench.scorers.base import Metric
from rfbench.statistics import Ratio, ratio

CLIP = 81  # pixel frames
STEADY = 3  # first chunk of a stream that is counted, at the earliest
BUFFERS = (0, 1, 2)  # chunks in store before playing starts, besides the first
FEWEST_PROCESSES = 3  # that have to agree before a claim about speed is judged: rounds of one process share its luck with memory and cores
APART = 5  # counted chunks of the stream by which steps are told from context passes where these go along with others
TAIL = 662  # gaps between chunks from which on a 99th percentile says something (MLPerf Inference's number of samples for p99)


@dataclass(frozen=True)
class Chunk:
    """One chunk of a timed clip or stream; seconds since that began."""

    index: int
    frames: int  # pixel frames that it yields
    begin: float  # its first step starts
    denoised: float  # its last step ends
    readable: float  # its uint8 frames can be read on the host
    cached: float | None  # its context pass ends; the last chunk of a clip has none
    held_bytes: int | None = None  # memory held when it can be read: allocated on a GPU, resident on a CPU
    decoded: float | None = None  # its frames are decoded and the device goes on to the context pass, a copy beside it or not; None in old records


@dataclass(frozen=True)
class Turn:
    """One contender's part of a round."""

    contender: str
    fps: int  # of the video: how fast a viewer plays it
    clip: tuple[Chunk, ...]  # since the request of a new prompt, text encoder included; cut to CLIP frames
    stream: tuple[Chunk, ...]  # since the request of an encoded prompt; nothing where the model has no chunks
    switched: Chunk | None  # the stream's next chunk but one, at whose beginning the prompt switches to another encoded one
    peak_bytes: int  # most memory held during the turn: allocated on a GPU, resident on a CPU
    reserved_bytes: int | None  # the same with what torch keeps in reserve on the GPU
    device_bytes: int | None  # in use on the GPU as a whole when the turn ended
    cold_start_s: float | None  # from the start of its process to its first frame; in the first turn of a process that loaded weights
    joint: bool = False  # a context pass goes along with the next chunk's first step, so it counts there and cannot be told apart
    warm_up_s: float | None = None  # from the start of its process until it had warmed up; where `cold_start_s` is
    apart: tuple[Chunk, ...] = ()  # where `joint`: a stream of APART chunks, each with a context pass of its own
    steady: int = STEADY  # first chunk of the streams that is counted, see `full`
    joules: float | None = None  # that the GPU took for the whole stream, which is longer than `stream`; None where nothing tells
    whole: int | None = None  # frames of the whole stream; None in old records, where `switched` is its end


@dataclass(frozen=True)
class Round:
    """Every contender once; `turns` in the order in which they were taken."""

    process: int
    number: int  # within the process
    turns: tuple[Turn, ...]


Key = tuple[str, int, int]  # run, process, round: what makes two values a pair


@dataclass(frozen=True)
class Timing:
    """A metric of a turn: how to read it, and how it is computed; None where it does not apply."""

    metric: Metric
    of: Callable[[Turn], float | None]
    headline: bool = False  # shown in the tables of reports; the others are in the CSV
    counts: str = ""  # what counts, in a few words; with them it is in the table of a profile, the others are in its document


def read_rounds(directory: Path) -> list[Round]:
    """The whole rounds of a profile run, in the order in which they were timed.

    Raises:
        UserError: a damaged file.
    """
    path = directory / "rounds.jsonl"
    rows: list[dict[str, Any]] = records.read_rows(path, dict)
    return as_rounds(rows, str(path))


def as_rounds(rows: Iterable[Mapping[str, Any]], where: str) -> list[Round]:
    """Rounds from their JSON.

    Raises:
        UserError: not that of a Round; says where.
    """
    return [strict.build(Round, row, where=f"{where} round {i}") for i, row in enumerate(rows)]


def order(names: Sequence[str], number: int) -> tuple[str, ...]:
    """Who goes when in the `number`-th round: every second one backwards, and each pair of rounds begins one further on.

    Over 2 n rounds each of n contenders is at each place twice, and each comes before each other in half of the rounds.
    """
    start = number // 2 % len(names)
    turned = (*names[start:], *names[:start])
    return turned[::-1] if number % 2 else turned


def full(chunk: int, window: int | None) -> int:
    """First chunk of a stream that is counted: from it on each one looks back at as many frames as the next, for which one before it has to go.

    `chunk` and `window` are in latent frames. Without a window no two chunks look back at as many; then it is STEADY.
    """
    return STEADY if window is None else max(STEADY, -(-window // chunk))


def steady(stream: Sequence[Chunk], first: int) -> tuple[Chunk, ...]:
    """The chunks of a stream that are counted, from the `first` one on; none where there are fewer than two."""
    found = tuple(chunk for chunk in stream if chunk.index >= first)
    return found if len(found) > 1 else ()


def denoising(chunk: Chunk) -> float:
    """Seconds of a chunk's steps, with their noise and bookkeeping."""
    return chunk.denoised - chunk.begin


def with_context(chunk: Chunk) -> float:
    """Seconds of a chunk's steps and of its context pass, which starts when its frames are decoded."""
    assert chunk.cached is not None, "a stream is made longer than it is timed"
    return denoising(chunk) + chunk.cached - (chunk.readable if chunk.decoded is None else chunk.decoded)


def _dit_fps(stream: Sequence[Chunk], first: int, seconds: Callable[[Chunk], float]) -> float | None:
    counted = steady(stream, first)
    return counted[0].frames / median(map(seconds, counted)) if counted else None


def pace(stream: Sequence[Chunk], first: int) -> float | None:
    """Frames per second of the counted chunks, until they can be read."""
    counted = steady(stream, first)
    return sum(chunk.frames for chunk in counted) / (counted[-1].readable - stream[first - 1].readable) if counted else None


def _rtf(turn: Turn) -> float | None:
    fps = pace(turn.stream, turn.steady)
    return None if fps is None else fps / turn.fps


def _jitter(turn: Turn, share: float, least: int = 1) -> float | None:
    """Nearest-rank quantile of the gaps between the first frames of neighbouring chunks."""
    gaps = sorted(after.readable - before.readable for before, after in itertools.pairwise(steady(turn.stream, turn.steady)))
    return gaps[math.ceil(share * len(gaps)) - 1] if len(gaps) >= least else None


def _slowdown(turn: Turn) -> float | None:
    took = [with_context(chunk) for chunk in steady(turn.stream, turn.steady)]
    third = max(1, len(took) // 3)
    return median(took[-third:]) / median(took[:third]) if took else None


def _joules(turn: Turn) -> float | None:
    made = turn.whole or sum(chunk.frames for chunk in (*turn.stream, *([turn.switched] if turn.switched else [])))
    return None if turn.joules is None or not made else turn.joules / made


@dataclass(frozen=True)
class Viewing:
    """What a viewer sees of a stream who starts when a number of chunks is in store."""

    in_time: float  # share of the frames that are there when a clock that never stops wants them
    underruns: int  # how often a player stands still that waits for what is late
    stalled: float  # seconds for which it stands still


def viewing(chunks: Sequence[Chunk], fps: int, buffer: int) -> Viewing:
    """Play a stream at `fps` from the moment on when chunk `buffer` can be read."""
    due = patient = chunks[buffer].readable
    in_time, underruns, stalled = 0, 0, 0.0
    for chunk in chunks:
        late = chunk.readable - due  # of its first frame; each later one may be as much later as it is shown later
        in_time += chunk.frames - (0 if late <= 0 else min(chunk.frames, math.ceil(late * fps)))
        wait = max(0.0, chunk.readable - patient)
        underruns += wait > 0
        stalled += wait
        due += chunk.frames / fps
        patient += wait + chunk.frames / fps
    return Viewing(in_time / sum(chunk.frames for chunk in chunks), underruns, stalled)


def _view(turn: Turn, buffer: int, of: Callable[[Viewing], float]) -> float | None:
    return of(viewing(turn.stream, turn.fps, buffer)) if steady(turn.stream, turn.steady) else None


def _viewed(buffer: int) -> dict[str, Timing]:
    store = f"with {buffer} chunk{'s' * (buffer != 1)} in store before playing starts, besides the first"
    in_time = Metric(True, "%", f"Frames that are there when a clock at the video's frame rate wants them, {store}.")
    underruns = Metric(False, "", f"How often a player that waits for late frames stands still, {store}.")
    stalled = Metric(False, "s", f"Time for which such a player stands still, {store}.")
    told = f"frames in time, {buffer} chunk{'s' * (buffer != 1)} in store"
    return {
        f"deadline_{buffer}": Timing(
            in_time, functools.partial(_view, buffer=buffer, of=lambda seen: 100 * seen.in_time), headline=buffer == 1, counts=told
        ),
        f"underruns_{buffer}": Timing(underruns, functools.partial(_view, buffer=buffer, of=lambda seen: float(seen.underruns))),
        f"stall_{buffer}_s": Timing(stalled, functools.partial(_view, buffer=buffer, of=lambda seen: seen.stalled)),
    }


COUNTED = f"once its window is full and chunk {STEADY} has come"

TIMINGS: dict[str, Timing] = {
    "dit_fps": Timing(
        Metric(True, "FPS", f"Frames of a chunk over the median time of its steps and its context pass, {COUNTED}; no decoding."),
        lambda turn: _dit_fps(turn.stream, turn.steady, with_context),
        headline=True,
        counts="steps + context pass, no decoding",
    ),
    "dit_fps_no_context": Timing(
        Metric(True, "FPS", "The same without the context pass, as some publish it: a stream cannot go on without that pass."),
        lambda turn: _dit_fps(turn.apart if turn.joint else turn.stream, turn.steady, denoising),
        counts="steps alone; of a short stream apart where passes are joined",
    ),
    "e2e_fps": Timing(
        Metric(True, "FPS", f"Frames over the time that they take until they can be read, {COUNTED}: decoding and copying included."),
        lambda turn: pace(turn.stream, turn.steady),
        headline=True,
        counts="steps + context pass + decoding, uint8 on the host",
    ),
    "clip_fps": Timing(
        Metric(True, "FPS", "Frames of an 81 frame clip over the time from request to last frame: text encoder included, what a user sees."),
        lambda turn: CLIP / turn.clip[-1].readable,
        headline=True,
        counts="81 frames from the request, text encoder included",
    ),
    "ttff_s": Timing(
        Metric(False, "s", "Time from the request of a new prompt to its first frame, model and text encoder in memory."),
        lambda turn: turn.clip[0].readable,
        headline=True,
        counts="to the first frame, new prompt, all in memory",
    ),
    "ttff_cached_s": Timing(
        Metric(False, "s", "Time from the request of a prompt that is already encoded to its first frame."),
        lambda turn: turn.stream[0].readable if turn.stream else None,
        counts="to the first frame, prompt already encoded",
    ),
    "switch_s": Timing(
        Metric(
            False, "s", "Time from a switch of the prompt between two chunks, to one that is already encoded, to the first frame that follows it."
        ),
        lambda turn: None if turn.switched is None else turn.switched.readable - turn.switched.begin,
        counts="from a prompt switch to its first frame",
    ),
    "cold_start_s": Timing(
        Metric(False, "s", "Time from the start of a process to its first frame: interpreter, imports, weights, first chunk."),
        lambda turn: turn.cold_start_s,
        counts="to the first frame of a cold process",
    ),
    "warm_up_s": Timing(
        Metric(False, "s", "Time from the start of a process until it is warm: its first frame and the rest of two clips."),
        lambda turn: turn.warm_up_s,
    ),
    "rtf": Timing(
        Metric(True, "×", "Seconds of video per second of computing; above 1 is faster than real time."),
        _rtf,
        headline=True,
        counts="seconds of video per second",
    ),
    "jitter_p50_s": Timing(Metric(False, "s", f"Median time between neighbouring chunks, {COUNTED}."), lambda turn: _jitter(turn, 0.5)),
    "jitter_p95_s": Timing(
        Metric(False, "s", "95th percentile of the time between neighbouring chunks."),
        lambda turn: _jitter(turn, 0.95),
        counts="from chunk to chunk",
    ),
    "jitter_p99_s": Timing(
        Metric(False, "s", f"99th percentile of the time between neighbouring chunks, of streams with at least {TAIL} gaps."),
        lambda turn: _jitter(turn, 0.99, TAIL),
    ),
    "jitter_max_s": Timing(Metric(False, "s", "Longest time between neighbouring chunks."), lambda turn: _jitter(turn, 1.0)),
    **{name: timing for buffer in BUFFERS for name, timing in _viewed(buffer).items()},
    "slowdown": Timing(
        Metric(False, "×", "Median time of a chunk in the last third of a stream over that in the first third: 1 is constant cost."),
        _slowdown,
        headline=True,
        counts="last third of a stream to first",
    ),
    "peak_memory_bytes": Timing(
        Metric(False, "bytes", "Most memory that was held after warm-up: allocated on a GPU, resident on a CPU."),
        lambda turn: float(turn.peak_bytes),
        headline=True,
        counts="most allocated, or resident on a CPU",
    ),
    "reserved_memory_bytes": Timing(
        Metric(False, "bytes", "Most GPU memory that torch held after warm-up, what it keeps in reserve included."),
        lambda turn: None if turn.reserved_bytes is None else float(turn.reserved_bytes),
    ),
    "device_memory_bytes": Timing(
        Metric(False, "bytes", "Memory in use on the GPU as a whole: the driver's, other processes' and other contenders' included."),
        lambda turn: None if turn.device_bytes is None else float(turn.device_bytes),
    ),
    "joules_per_frame": Timing(
        Metric(False, "J", "Energy that the GPU took for a stream, idle power included, over its frames; as NVML counts it."),
        _joules,
        counts="of the GPU, by NVML",
    ),
}


@dataclass(frozen=True)
class Spread:
    """A timing: its median over processes, or over the rounds of the only one, and the range of those."""

    median: float
    low: float
    high: float
    repeats: int


def values(rounds: Iterable[Round], run: str) -> dict[str, dict[str, dict[Key, float]]]:
    """Contender -> metric -> value of each round; a metric that does not apply is not there."""
    found: dict[str, dict[str, dict[Key, float]]] = {}
    for each in rounds:
        for turn in each.turns:
            for name, timing in TIMINGS.items():
                value = timing.of(turn)
                if value is not None:
                    found.setdefault(turn.contender, {}).setdefault(name, {})[run, each.process, each.number] = value
    return found


def by_process(column: Mapping[Key, float]) -> list[list[float]]:
    """The values of each process."""
    found: dict[tuple[str, int], list[float]] = {}
    for (run, process, _), value in sorted(column.items()):
        found.setdefault((run, process), []).append(value)
    return list(found.values())


def spread(column: Mapping[Key, float]) -> Spread:
    """Summarise a metric's values."""
    processes = by_process(column)
    counted = processes[0] if len(processes) == 1 else [median(own) for own in processes]
    return Spread(median(counted), min(counted), max(counted), len(counted))


def compared(better: Mapping[Key, float], than: Mapping[Key, float], higher_is_better: bool) -> Ratio:
    """How many times as good one is as the other, over the rounds in which both were timed and over no others.

    Raises:
        ValueError: there are no such rounds, or a value is not positive.
    """
    pairs = {key: (better[key], than[key]) for key in better.keys() & than.keys()}
    sides = [by_process({key: pair[side] for key, pair in pairs.items()}) for side in (0, 1)]
    return ratio(*(sides if higher_is_better else sides[::-1]))
