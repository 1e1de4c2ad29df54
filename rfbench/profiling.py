"""`rfbench profile`: how fast a baseline streams, chunk by chunk, by one protocol.

    runs/profile/<baseline>/<hardware>/{run.json, chunks.jsonl}

Each process starts from nothing, warms up on two clips, and then repeats: a clip of 81 frames from the request on, and a long
stream whose prompt is already encoded. Frames count when their bytes can be read in host memory. Nothing waits for the
device but the reader of frames, as in use: on a GPU the denoiser is timed by events in its own queue. The median of a
process is taken over its repetitions, the median of the run over its processes.

What is counted (chunks from 0; the first ones, while the window fills, are left out):

    dit_fps               frames of a chunk / median time of its steps and its context pass, from chunk 3 on
    dit_fps_no_context    the same without the context pass
    e2e_fps               frames after chunk 2 / time from the last frame of chunk 2 to the last of all: decoding and copying included
    clip_fps              81 / time from request to last frame, text encoder included
    ttff_s                request to first frame of a new prompt; ttff_cached_s: of a prompt that is encoded already
    jitter_*_s            between the first frames of neighbouring chunks, from chunk 3 on
    rtf                   e2e_fps / frame rate
    deadline_B            share of frames that are there in time when playing starts with B chunks in store besides the first
    stall_B_s             time for which such a player stands still, if it waits for what is late
    slowdown              median time of the last third's chunks / that of the first third's, from chunk 3 on
    cold_start_s          process start to first frame: interpreter, imports, weights, first chunk
    peak_memory_bytes     most that was held after warm-up: allocated on a GPU, resident on a CPU
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from rfbench import attention, baselines, config, provenance, records, sampler, video
from rfbench.backbones.base import Backbone
from rfbench.baselines import Prepared
from rfbench.config import SamplerCfg
from rfbench.errors import UserError
from rfbench.progress import Progress
from rfbench.records import Chunk
from rfbench.suites import load_suite

CLIP = 81  # pixel frames
WARM_UPS = 2  # clips
STEADY = 3  # first chunk that is counted
BUFFERS = (0, 1, 2)  # chunks in store before playing starts, besides the first


def profile(
    baseline: str,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    chunks: int,
    repeats: int,
    processes: int = 1,
    random_weights: bool = False,
    fresh: bool = False,
) -> Path:
    """Time a baseline; `Run.result` has a median, least and most of every metric that applies to it.

    A bidirectional model has no chunks, so of it only whole clips are timed. A model that cannot make `chunks` chunks is
    timed over as many as it can, which is recorded.

    Returns:
        the run directory.

    Raises:
        UserError: the baseline cannot be used, or too few chunks for a steady state.
    """
    if chunks < STEADY + 2:
        raise UserError(f"--chunks {chunks} never gets steady: the first {STEADY} are not counted; the least is {STEADY + 2}")
    ready = baselines.prepare(baseline, overrides, name=name, random_weights=random_weights)
    device = baselines.device()
    hardware = config.settings().hardware_name(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    directory = config.settings().runs / "profile" / ready.name / hardware
    inputs = ready.inputs() | {"chunks": chunks, "repeats": repeats, "processes": processes}
    with provenance.session(directory, "profile", f"{ready.name}/{hardware}", inputs, fresh=fresh) as run:
        if run.done and not (directory / "chunks.jsonl").exists():
            run.reopen()
        if not run.done:
            counted = possible(ready, chunks)
            facts = {"device": str(device), "attention": attention.kernel(), "threads": torch.get_num_threads(), "chunks": counted}
            run.record(**facts, trained_by=ready.cfg.trained_by)
            taken = []
            with Progress(run.run.name, processes) as progress:
                for number in range(processes):
                    taken.append(_in_new_process(ready, number, counted, repeats))
                    progress.advance()
            records.write_rows(directory / "chunks.jsonl", [row for times in taken for row in times.chunks])
            run.record(**taken[0].about)
            run.result.update(summary(taken))
    return directory


def possible(ready: Prepared, chunks: int) -> int:
    """How many of the wanted chunks can be timed: 0 without chunks; one more than is timed has to be made."""
    length, most = ready.cfg.sampler.chunk, ready.cfg.max_latents
    if length is None:
        return 0
    return chunks if most is None else min(chunks, most // length - 1)


@dataclass(frozen=True)
class Times:
    """What one process measured: a value per repetition of every metric, and the chunks behind them."""

    values: dict[str, list[float]]
    chunks: list[Chunk]
    about: dict[str, str]  # dtype, and what memory is that was metered


def summary(taken: Sequence[Times]) -> dict[str, dict[str, float]]:
    """Median, least, most and number of each metric: over processes, or over the repetitions of the only one."""
    found = {}
    for metric in taken[0].values:
        values = taken[0].values[metric] if len(taken) == 1 else [median(times.values[metric]) for times in taken]
        found[metric] = {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}
    return found


def _in_new_process(ready: Prepared, number: int, chunks: int, repeats: int) -> Times:
    """Measure in a fresh interpreter: its start is part of the cold start, and its memory is its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, ready, number, chunks, repeats, torch.get_num_threads(), time.time()).result()


def measure(ready: Prepared, process: int, chunks: int, repeats: int, threads: int, born: float) -> Times:
    """All that one process does; `born` is when it was asked for, by the wall clock."""
    torch.set_num_threads(threads)
    backbone = ready.open()
    prompt = load_suite("smoke").prompts[0].text
    latents, fps = ready.latents(CLIP, "the profile"), backbone.shape.fps
    begun = time.time()
    cold, _ = time_clip(backbone, ready.cfg.sampler, prompt, latents)
    for _ in range(WARM_UPS - 1):
        time_clip(backbone, ready.cfg.sampler, prompt, latents)
    memory, peak = meter()
    values: dict[str, list[float]] = {"cold_start_s": [begun - born + cold]}
    rows: list[Chunk] = []
    for repeat in range(repeats):
        first, last = time_clip(backbone, ready.cfg.sampler, prompt, latents)
        found = {"ttff_s": first, "clip_fps": CLIP / last}
        if chunks:
            streamed = time_stream(backbone, ready.cfg.sampler, prompt, chunks, process=process, repeat=repeat)
            found |= streaming(streamed, fps)
            rows += streamed
        for metric, value in found.items():
            values.setdefault(metric, []).append(value)
    dtype = str(next(backbone.denoiser.parameters()).dtype).removeprefix("torch.")
    return Times(values | {"peak_memory_bytes": [float(peak())]}, rows, {"dtype": dtype, "memory": memory})


def meter() -> tuple[str, Callable[[], int]]:
    """Forget the most memory held so far; what is metered from now on, and how to read it, in bytes."""
    if baselines.device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return "allocated on the GPU after warm-up", torch.cuda.max_memory_allocated
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return "resident after warm-up", lambda: 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    except OSError:  # not Linux, or not allowed
        unit = 1 if sys.platform == "darwin" else 1024
        return "resident, of the whole process", lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Clock:
    """Seconds since it was made: on the host, or as points in the GPU's queue that the host does not wait for."""

    def __init__(self) -> None:
        self.cuda = baselines.device().type == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
        self.zero = self._event() if self.cuda else None
        self.start = time.perf_counter()

    def host(self) -> float:
        """The present."""
        return time.perf_counter() - self.start

    def queue(self) -> Callable[[], float]:
        """When the device has done all that it was given so far; to be asked for when everything is over."""
        if self.zero is None:
            now = self.host()
            return lambda: now
        zero, event = self.zero, self._event()

        def seconds() -> float:
            event.synchronize()
            return float(zero.elapsed_time(event)) / 1000

        return seconds

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@torch.no_grad()
def time_clip(backbone: Backbone, cfg: SamplerCfg, prompt: str, latents: int) -> tuple[float, float]:
    """Seconds from a request with a new prompt to its first and to its last frame of CLIP."""
    clock, left, stamps = Clock(), CLIP, []
    for pixels in sampler.generate(backbone, [prompt], latents, cfg, [0]):
        left -= video.as_uint8(pixels[:, :left]).cpu().shape[1]
        stamps.append(clock.host())
    return stamps[0], stamps[-1]


@torch.no_grad()
def time_stream(backbone: Backbone, cfg: SamplerCfg, prompt: str, chunks: int, *, process: int, repeat: int) -> list[Chunk]:
    """Stamps of `chunks` chunks of a stream whose prompt is encoded before the clock starts."""
    assert cfg.chunk is not None
    text = backbone.encode_text([prompt])
    null = None if cfg.guidance == 1.0 else backbone.encode_text([""])
    clock, decode = Clock(), backbone.decoder()
    stamps: dict[str, list[Callable[[], float]]] = {"begin": [], "denoised": [], "cached": []}
    readable: list[tuple[float, int]] = []

    def mark(event: str) -> None:
        stamps[event].append(clock.queue())

    noise = sampler.clip_noise(backbone, [repeat])
    for chunk in sampler.stream(backbone, text, (chunks + 1) * cfg.chunk, cfg, noise, null_BLE=null, mark=mark):
        if chunk.index == chunks:
            break  # it was made because the last chunk of a clip has no context pass
        frames = video.as_uint8(decode(chunk.latent_BFCHW)).cpu().shape[1]
        readable.append((clock.host(), frames))
    return [
        Chunk(process, repeat, index, frames, *(round(second, 7) for second in (begin(), denoised(), seen, cached())))
        for index, ((seen, frames), begin, denoised, cached) in enumerate(
            zip(readable, stamps["begin"], stamps["denoised"], stamps["cached"], strict=False)
        )
    ]


def streaming(rows: Sequence[Chunk], fps: int) -> dict[str, float]:
    """The metrics of one long stream; nothing where it is too short for a steady state."""
    steady = [row for row in rows if row.index >= STEADY]
    if len(steady) < 2:
        return {}
    bare = [row.denoised - row.begin for row in steady]
    full = [row.denoised - row.begin + row.cached - row.readable for row in steady]
    gaps = sorted(after.readable - before.readable for before, after in itertools.pairwise(steady))
    third = max(1, len(full) // 3)
    e2e = sum(row.frames for row in steady) / (steady[-1].readable - rows[STEADY - 1].readable)
    found = {
        "dit_fps": steady[0].frames / median(full),
        "dit_fps_no_context": steady[0].frames / median(bare),
        "e2e_fps": e2e,
        "rtf": e2e / fps,
        "ttff_cached_s": rows[0].readable,
        "jitter_p50_s": median(gaps),
        "jitter_p95_s": gaps[math.ceil(0.95 * len(gaps)) - 1],
        "jitter_max_s": gaps[-1],
        "slowdown": median(full[-third:]) / median(full[:third]),
    }
    for buffer in BUFFERS:
        found[f"deadline_{buffer}"], found[f"stall_{buffer}_s"] = viewing(rows, fps, buffer)
    return found


def viewing(rows: Sequence[Chunk], fps: int, buffer: int) -> tuple[float, float]:
    """What a viewer sees who starts when chunk `buffer` is there.

    Returns:
        share of the frames that are there when a clock that never stops wants them; seconds that a player stands still
        which waits for what is late.
    """
    due = patient = rows[buffer].readable
    in_time, stalled = 0, 0.0
    for row in rows:
        late = row.readable - due  # of its first frame; each later one may be as much later as it is shown later
        missed = 0 if late <= 0 else min(row.frames, math.ceil(late * fps))
        in_time += row.frames - missed
        wait = max(0.0, row.readable - patient)
        stalled += wait
        due += row.frames / fps
        patient += wait + row.frames / fps
    return in_time / sum(row.frames for row in rows), stalled
