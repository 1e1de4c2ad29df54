"""One contender timed in an interpreter of its own, which takes a turn whenever it is asked to.

Its start is part of the cold start, and its memory is nobody else's. Nothing waits for the device but the reader of frames,
as in use: on a GPU the denoiser is timed by events in its own queue, everything else by the clock of the host.
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from rfbench import baselines, hardware, proof, sampler, timing, video
from rfbench.backbones.base import Backbone
from rfbench.backbones.wan.lean import LeanDiT
from rfbench.backbones.wan.text import WanText
from rfbench.baselines import Prepared
from rfbench.config import SamplerCfg
from rfbench.errors import UserError
from rfbench.suites import load_suite
from rfbench.timing import APART, CLIP, STEADY, Chunk, Turn
from rfbench.transfer import side, to_host

WARM_UPS = 2  # turns: on a GPU a pass is recorded when it comes for the second time
TOLD = -1  # in place of the number of a turn


class Worker:
    """A process that holds a contender ready; it lives until the end of the block, or as long as this process."""

    def __init__(self, ready: Prepared, chunks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = ready.name
        self.connection, theirs = context.Pipe()
        asked = (theirs, ready, chunks, torch.get_num_threads(), time.time())
        self.process = context.Process(target=serve, args=asked, daemon=True)
        self.process.start()
        theirs.close()
        self.about: dict[str, Any] = self._answer()  # what it holds; `told` says what it knows now

    def told(self) -> dict[str, Any]:
        """What the contender is and how it runs, as far as that is known by now: a shortcut may fail to prove itself in a turn."""
        self.about = self._answer(TOLD)
        return self.about

    def turn(self, number: int) -> Turn:
        """Time the contender once; its noise is seeded with `number`.

        Raises:
            UserError: the process died (code 1).
        """
        turn: Turn = self._answer(number)
        return turn

    def _answer(self, number: int | None = None) -> Any:
        """What the process says next, or in answer to a number: of a turn, or TOLD."""
        try:
            if number is not None:
                self.connection.send(number)
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            told = f"the process that timed '{self.name}' ended with {self.process.exitcode}, perhaps for lack of memory; run the same command again"
            raise UserError(told, code=1) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.connection.close()  # which it sees and ends, unless it is in the middle of a turn that nobody waits for
        if error is not None:
            self.process.terminate()
        self.process.join()


def serve(connection: Connection, ready: Prepared, chunks: int, threads: int, born: float) -> None:
    """What the process does: get ready, say what it holds, then a turn for every number that comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both, and the other one ends this one
    try:
        torch.set_num_threads(threads)
        contestant = warm(ready, chunks, born)
        connection.send(about(contestant))
        while True:
            number = connection.recv()
            connection.send(about(contestant) if number == TOLD else take(contestant, number))
    except (EOFError, ConnectionError):
        return  # nobody wants more
    except Exception as error:
        error.add_note(f"in the process that timed '{ready.name}':\n{traceback.format_exc()}")
        connection.send(error)


@dataclass
class Contestant:
    """A contender in memory, warmed up."""

    name: str
    backbone: Backbone
    sampler: SamplerCfg
    lean: LeanDiT | None
    latents: int  # of a clip
    chunks: int  # of a stream; 0 where there are none
    steady: int  # first of them that is counted
    prompts: tuple[str, str]  # of a clip and a stream; that a stream switches to
    cold_start_s: float | None  # until a turn has reported it; never with random weights
    warm_up_s: float | None  # likewise
    energy: Callable[[], float] | None  # joules of the GPU so far
    about: dict[str, Any]


def warm(ready: Prepared, chunks: int, born: float) -> Contestant:
    """Load a contender and take WARM_UPS turns; `born` is when its process was asked for, by the wall clock."""
    backbone = ready.open()
    forget_prompts(backbone)
    prompts = load_suite("smoke").prompts[0].text, load_suite("smoke").prompts[1].text
    latents = ready.latents(CLIP, "the profile")
    lean = sampler.lean_of(backbone, ready.cfg.sampler)
    begun = time.time()
    what, _ = meter()
    energy, whose = hardware.energy(baselines.device())
    steady = counted_from(ready)
    held = {
        "weights_sha256": ready.weights_sha256,
        "precision": precision(backbone),
        "approximate": ready.cfg.approximate,
        "memory": what,
        "energy": whose,
        "chunks": chunks,
        "steady": steady,
    }
    found = Contestant(ready.name, backbone, ready.cfg.sampler, lean, latents, chunks, steady, prompts, None, None, energy, held)
    first, *_ = [take(found, 0).clip[0].readable for _ in range(WARM_UPS)]
    if ready.weights is not None:  # drawing weights is not loading them
        found.cold_start_s, found.warm_up_s = begun - born + first, time.time() - born
    return found


def about(contestant: Contestant) -> dict[str, Any]:
    """What a run records of a contender, with the shortcuts that are taken and, of those that did not prove themselves, why."""
    return contestant.about | {"shortcuts": contestant.lean.taken if contestant.lean else [], "left_out": dict(proof.left_out)}


def precision(backbone: Backbone) -> dict[str, str]:
    """The dtypes of each part that has weights."""
    assert isinstance(backbone, nn.Module)
    found = {name: {weight.dtype for weight in part.parameters()} for name, part in backbone.named_children()}
    text = getattr(backbone, "text", None)
    if isinstance(text, WanText):
        found["text"] = {text.dtype}
    told = {name: "+".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) for name, dtypes in found.items() if dtypes}
    return told | {f"denoiser's {what}": "float8_e4m3fn" for what in backbone.denoiser.cfg.float8}


def forget_prompts(backbone: Backbone) -> None:
    """Take away the embeddings that lie on disk: a prompt that is to be timed as a new one has to be encoded."""
    text = getattr(backbone, "text", None)
    if isinstance(text, WanText):
        text.cache = None


def take(contestant: Contestant, number: int) -> Turn:
    """One turn: a clip, then a stream at whose end the prompt switches."""
    _, peak = meter()
    backbone, cfg, lean = contestant.backbone, contestant.sampler, contestant.lean
    clip = time_clips(backbone, cfg, lean, contestant.prompts[:1], contestant.latents, [number])
    joint = cfg.cache is not None and lean is not None and "joint" in lean.taken
    stream, joules, apart = tuple[Chunk, ...](), None, tuple[Chunk, ...]()
    if contestant.chunks:
        stream, joules = time_stream(backbone, cfg, lean, contestant.prompts, contestant.chunks, number, contestant.energy)
        if joint and lean is not None:
            alone = copy.copy(lean)  # the same weights in the same memory
            alone.shortcuts = replace(lean.shortcuts, joint=False)
            count = min(contestant.steady + APART, contestant.chunks)
            apart = time_stream(backbone, cfg, alone, contestant.prompts, count, number)[0][:count]
    switched = stream[-1] if stream and cfg.solver != "rolling" else None
    cold, contestant.cold_start_s = contestant.cold_start_s, None
    warmed, contestant.warm_up_s = contestant.warm_up_s, None
    reserved, device = None, None
    if baselines.device().type == "cuda":
        free, total = torch.cuda.mem_get_info()
        reserved, device = torch.cuda.max_memory_reserved(), total - free
    told = contestant.name, backbone.shape.fps, clip, stream[: contestant.chunks], switched, peak(), reserved, device, cold
    whole = sum(chunk.frames for chunk in stream)
    return Turn(*told, joint=joint, warm_up_s=warmed, apart=apart, steady=contestant.steady, joules=joules, whole=whole)


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


def held() -> int | None:
    """Bytes in use now: allocated on a GPU, resident on a CPU; None where nobody tells."""
    if baselines.device().type == "cuda":
        return torch.cuda.memory_allocated()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        return None


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

    def queue(self, *, beside: torch.device | None = None) -> Callable[[], float]:
        """When the device has done all that it was given so far, or all copies from that device to the host; to be
        asked for when everything is over."""
        if self.zero is None:
            now = self.host()
            return lambda: now
        zero, event = self.zero, self._event(None if beside is None else side(beside))

        def seconds() -> float:
            event.synchronize()
            return float(zero.elapsed_time(event)) / 1000

        return seconds

    @staticmethod
    def _event(stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event


@torch.no_grad()
def time_clips(
    backbone: Backbone, cfg: SamplerCfg, lean: LeanDiT | None, prompts: Sequence[str], latents: int, seeds: Sequence[int]
) -> tuple[Chunk, ...]:
    """The chunks of clips of CLIP frames that are made together, from the request with new prompts on."""
    clock = Clock()
    return Film(clock, backbone, cfg, lean, _texts(backbone, cfg, prompts), latents, seeds, frames=CLIP).whole()


@torch.no_grad()
def time_stream(
    backbone: Backbone,
    cfg: SamplerCfg,
    lean: LeanDiT | None,
    prompts: tuple[str, str],
    chunks: int,
    seed: int,
    energy: Callable[[], float] | None = None,
) -> tuple[tuple[Chunk, ...], float | None]:
    """All of a stream of which `chunks` chunks are timed, and the joules that it took by the meter `energy`.

    On its last chunk the prompt switches (in a joint window no chunk can), so the context pass of the one before is by itself even
    where others go along with steps: neither is one of the timed. Both prompts are encoded before clock and meter start.
    """
    assert cfg.chunk is not None
    texts, other = _texts(backbone, cfg, prompts[:1]), backbone.encode_text([prompts[1]])
    made = chunks + beyond(cfg, switching=True)
    switches = [] if cfg.solver == "rolling" else [((made - 1) * cfg.chunk, other)]
    spent = energy() if energy is not None else 0.0
    rows = Film(Clock(), backbone, cfg, lean, texts, made * cfg.chunk, [seed], switches=switches).whole()
    return rows, None if energy is None else energy() - spent


@torch.no_grad()
def time_streams(
    backbone: Backbone, cfg: SamplerCfg, lean: LeanDiT | None, prompts: Sequence[str], chunks: int, seeds: Sequence[int], *, together: bool = False
) -> tuple[tuple[Chunk, ...], ...]:
    """Streams of `chunks` chunks that begin at once and take turns, a chunk each, or are made `together`, a chunk of all at a time; their
    prompts are encoded before the clock starts."""
    assert cfg.chunk is not None
    groups = [list(zip(prompts, seeds, strict=True))] if together else [[one] for one in zip(prompts, seeds, strict=True)]
    texts, latents = [_texts(backbone, cfg, [prompt for prompt, _ in group]) for group in groups], (chunks + beyond(cfg)) * cfg.chunk
    clock = Clock()
    films = [Film(clock, backbone, cfg, lean, text, latents, [seed for _, seed in group]) for text, group in zip(texts, groups, strict=True)]
    for _ in range(chunks):
        for film in films:
            film.advance()
    return tuple(film.rows() for film, group in zip(films, groups, strict=True) for _ in group)


def beyond(cfg: SamplerCfg, *, switching: bool = False) -> int:
    """Chunks that a stream is longer than what is timed of it: the last has no context pass, that before a switch one of another
    kind, and a joint window, in which nothing switches, runs empty."""
    if cfg.solver == "rolling":
        return 1 if isinstance(cfg.steps, int) else max(1, len(cfg.steps) - 1)
    return 1 + switching


def possible(ready: Prepared, chunks: int) -> int:
    """How many of the wanted chunks can be timed: 0 without chunks or where a whole clip of them is in work at once, no more than one
    rollout has; some more than are timed have to be made."""
    sampler = ready.cfg.sampler
    if sampler.chunk is None or sampler.solver == "forcing":
        return 0
    longest = [most for most in (ready.cfg.max_latents, sampler.reroll.latents if sampler.reroll else None) if most is not None]
    return min([chunks, *(most // sampler.chunk - beyond(sampler, switching=True) for most in longest)])


def counted_from(ready: Prepared) -> int:
    """First chunk of its streams that is counted: when its window is full, or STEADY where no clip of the model gets that far."""
    cfg = ready.cfg.sampler
    first = STEADY if cfg.chunk is None or cfg.cache is None else timing.full(cfg.chunk, cfg.cache.window)
    return first if possible(ready, first + 2) == first + 2 else STEADY


def refuse_short(ready: Prepared, chunks: int) -> None:
    """
    Raises:
        UserError: a stream of so many chunks has fewer than two that are counted.
    """
    if chunks < (least := counted_from(ready) + 2):
        raise UserError(f"--chunks {chunks} never gets steady: '{ready.name}' is counted from chunk {least - 2} on; the least is {least}")


def _texts(backbone: Backbone, cfg: SamplerCfg, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    return backbone.encode_text(list(prompts)), None if cfg.guidance == 1.0 else backbone.encode_text([cfg.negative] * len(prompts))


class Film:
    """A stream of clips that are made together, or its first `frames` frames, and the stamps of its chunks."""

    def __init__(
        self,
        clock: Clock,
        backbone: Backbone,
        cfg: SamplerCfg,
        lean: LeanDiT | None,
        texts: tuple[Tensor, Tensor | None],
        latents: int,
        seeds: Sequence[int],
        *,
        frames: int | None = None,
        switches: Sequence[tuple[int, Tensor]] = (),
    ) -> None:
        self.clock, self.frames, self.decode = clock, frames, backbone.decoder()
        self.stamps: dict[str, list[Callable[[], float]]] = {"begin": [], "denoised": [], "decoded": [], "cached": []}
        self.readable: list[tuple[Callable[[], float], int, int | None]] = []
        self.coming: list[Callable[[], Tensor]] = []
        noise, null = sampler.clip_noise(backbone, seeds), texts[1]
        self.chunks = sampler.stream(backbone, texts[0], latents, cfg, noise, null_BLE=null, switches=switches, mark=self._mark, lean=lean)

    def _mark(self, event: str) -> None:
        self.stamps[event].append(self.clock.queue())

    def advance(self) -> bool:
        """Make the next chunk, whose frames go to the host while the one after it is made; whether there was one."""
        chunk = next(self.chunks, None)
        if chunk is None:
            return False
        pixels, left = self.decode(chunk.latent_BFCHW), None if self.frames is None else self.frames - sum(made for _, made, _ in self.readable)
        shown = video.as_uint8(pixels[:, :left])
        self.coming.append(to_host(shown))
        self._mark("decoded")
        self.readable.append((self.clock.queue(beside=pixels.device), shown.shape[1], held()))
        if len(self.coming) > 1:
            self.coming.pop(0)()  # as `generate` takes them
        return True

    def whole(self) -> tuple[Chunk, ...]:
        """Make all of it."""
        while self.advance():
            pass
        return self.rows()

    def rows(self) -> tuple[Chunk, ...]:
        """What there is so far."""
        return tuple(self._row(index, *seen) for index, seen in enumerate(self.readable))

    def _row(self, index: int, seen: Callable[[], float], frames: int, kept: int | None) -> Chunk:
        begin, denoised, decoded = (round(self.stamps[event][index](), 7) for event in ("begin", "denoised", "decoded"))
        cached = round(self.stamps["cached"][index](), 7) if index < len(self.stamps["cached"]) else None
        return Chunk(index, frames, begin, denoised, round(seen(), 7), cached, kept, decoded)
