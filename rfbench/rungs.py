"""The rungs of a ladder: ways to make a clip, from the loop as the reference runs it to ours, each timed, and compared with what it should make.

Exact steps come first. Exact means: as near to a float32 run of rung 0 as rung 0 itself is in bfloat16, give or take a tenth
(`Rung.error`), in the first chunk, in chunk STEADY, and in the last chunk of a long clip. What comes before a chunk is given: left
to itself, any two roundings of a clip part at some time, and then their distance says nothing about either. Approximate steps are
settings of a baseline and say what they cost in scores elsewhere; here their latents are compared with those of rung 0.

The rungs take turns, chunk times are those of a steady stream, and every ratio is to rung 0 in the same turn. On a CPU the
clock is the processor time of this process, so what else the machine does counts less; on a GPU it is that of the host, which
waits for the device between chunks.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from rfbench import attention, flops, hardware, video
from rfbench.backbones.base import TEMPORAL, Backbone
from rfbench.backbones.wan import float8
from rfbench.backbones.wan.dit import Eight
from rfbench.backbones.wan.lean import SHORTCUTS, LeanDiT, Shortcuts, usable
from rfbench.config import SamplerCfg
from rfbench.naive import naive
from rfbench.progress import Progress
from rfbench.sampler import Noise, clip_noise, stream
from rfbench.stopwatch import WARM_UPS
from rfbench.timing import STEADY, full
from rfbench.transfer import to_host

Run = Callable[
    [Backbone, Tensor, int, SamplerCfg, Noise, Tensor | None], Iterator[Tensor]
]  # ..., text, latent frames, ..., given ones -> clean chunks
Verdict = Literal["pass", "undecided", "fail"]  # from best to worst
Peak = Callable[["Way"], tuple[float | None, str]]  # in TFLOP/s, and of which dtype and whose figure it is; None: nobody knows
PLAIN = "torch-sdpa"  # the kernel of attention of rung 0
WITHIN = 1.1  # times the error of rung 0
VALUES, ENOUGH = 2**18, 192  # latents of a chunk over which errors are taken: as many clips as it needs, but not more than so many; toy clips
# scatter by a factor of two, their mean by a twentieth, and at full size one clip has enough
NONE = Shortcuts(**dict.fromkeys((field.name for field in dataclasses.fields(Shortcuts)), False))
PLACES = ("chunk 0", f"chunk {STEADY}", "long")
EIGHT: dict[str, Eight] = {"8-bit products": "products", "8-bit attention": "attention"}  # each for itself too, of the weights that are there


@dataclass(frozen=True)
class Way:
    """How a rung makes a clip."""

    name: str
    kind: Literal["reference", "exact", "approximate"]
    run: Run
    backbone: Backbone
    cfg: SamplerCfg
    eight: tuple[Eight, ...] = ()  # what of it is computed from 8-bit floats
    shortcuts: Shortcuts | None = None  # that it decodes and copies by; None: decoded when all of it is there, and copied as float32


@dataclass(frozen=True)
class Error:
    """Relative L2 distance to a float32 run of rung 0, over that of rung 0 in bfloat16, with its 95 % interval over clips, if there are several."""

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Whether the ratio is within the bound; where it is not, but the clips cannot tell it from one that is, that is open."""
        return "pass" if self.ratio <= WITHIN else "undecided" if self.low <= WITHIN else "fail"


@dataclass(frozen=True)
class Rung:
    """What one rung takes and how far it is from rung 0."""

    name: str
    kind: str
    ms: float  # per chunk with its context pass: median over turns of the median over chunks
    ms_low: float  # the least and the most of the turns
    ms_high: float
    dit_fps: float  # pixel frames per second of denoising
    e2e_fps: float  # and of decoding and copying to the host as well, one after the other
    ratio: float  # how many times as long rung 0 takes: median over turns
    ratio_low: float
    ratio_high: float
    tflops: float  # of arithmetic per second of denoising
    share: float | None  # of the peak: the speed of light
    peak: float | None  # in TFLOP/s
    peak_is: str  # of which dtype, and whose figure
    first: float  # relative L2 distance of the latents of chunk 0 to those of rung 0
    steady: float  # of the first chunk that is counted
    whole: float  # of all chunks together
    error: dict[str, Error]  # by place; of exact rungs

    @property
    def verdict(self) -> Verdict | None:
        """The worst one of all places; an approximate rung has none."""
        return max((error.verdict for error in self.error.values()), key=get_args(Verdict).index, default=None)


def reference(backbone: Backbone, text_BLE: Tensor, latents: int, cfg: SamplerCfg, noise: Noise, initial_BFCHW: Tensor | None) -> Iterator[Tensor]:
    return naive(backbone, text_BLE, latents, cfg, noise, initial_BFCHW)


def streamed(shortcuts: Shortcuts, eight: Collection[Eight] = (), by: str | None = None) -> Run:
    """The shared sampler with the given shortcuts and kernel of attention, and what of it is computed from 8-bit floats."""
    made: dict[int, LeanDiT] = {}  # kept between clips, as `rfbench.generate` does

    def run(backbone: Backbone, text_BLE: Tensor, latents: int, cfg: SamplerCfg, noise: Noise, initial_BFCHW: Tensor | None) -> Iterator[Tensor]:
        model = backbone.denoiser
        lean = made.get(id(model)) or made.setdefault(id(model), LeanDiT(model, shortcuts, eight=eight, attention=by))
        return (chunk.latent_BFCHW for chunk in stream(backbone, text_BLE, latents, cfg, noise, initial_BFCHW=initial_BFCHW, lean=lean))

    return run


def ways(backbone: Backbone, cfg: SamplerCfg, approximate: Mapping[str, tuple[Backbone, SamplerCfg]] | None = None) -> list[Way]:
    """Rung 0, the shared sampler without shortcuts, then with this process's kernel of attention if that is not torch's own choice, which rung 0
    takes, then with one more of those that this device can use at a time; then each approximation for itself, with all of them.

    A rung asks for its own shortcut, so that it fails with it; those after it take what proves itself (`rfbench.proof`).
    """
    taken, by, device = dataclasses.asdict(NONE), PLAIN, backbone.denoiser.head.modulation.device

    def way(name: str, kind: Literal["exact", "approximate"], backbone: Backbone = backbone, cfg: SamplerCfg = cfg, *eight: Eight) -> Way:
        return Way(name, kind, streamed(Shortcuts(**taken), eight, by), backbone, cfg, eight, Shortcuts(**taken))

    found = [Way("naive", "reference", reference, backbone, cfg)]
    found.append(way("slots", "exact"))
    if (by := attention.kernel(device)) != PLAIN:
        found.append(way("attention", "exact"))
    for name in usable(device):
        taken[name] = True
        found.append(way(name, "exact"))
        taken[name] = getattr(SHORTCUTS, name)  # True, or None where it is left to the device
    found += [way(name, "approximate", backbone, cfg, what) for name, what in EIGHT.items() if float8.missing(what, device) is None]
    return found + [way(name, "approximate", *changed) for name, changed in (approximate or {}).items()]


@torch.no_grad()
def climb(
    prompt: str,
    steps: Sequence[Way],
    *,
    chunks: int,
    turns: int,
    peak: Peak | None,
    keep: Callable[[Any], None] | None = None,
    broken: dict[str, str] | None = None,
) -> list[Rung]:
    """Time all rungs over streams of `chunks` chunks, `turns` times in turn, and compare their videos of seed 0.

    `peak` tells the speed of light. The first of the steps is rung 0. `keep` gets the raw times of each turn. With `broken` a
    rung that fails is left out and named there, with what it said; rung 0 must not.

    Raises:
        ValueError: too few chunks: those before the window is full are not counted, and the last one has no context pass.
    """
    if chunks < (least := counted_from(steps[0].cfg) + 2):
        raise ValueError(f"a ladder of {chunks} chunks never gets steady; the least is {least}")
    text_BLE = steps[0].backbone.encode_text([prompt])  # of all rungs: no approximation is one of the text encoder
    made, taken, decoding = dict[str, list[Tensor]](), {way.name: list[float]() for way in steps}, dict[str, float]()

    def first(way: Way) -> None:  # which also warms up
        for _ in range(WARM_UPS if way.shortcuts is not None and way.shortcuts.graphs is not False else 1):
            made[way.name], _ = once(way, text_BLE, chunks)
        if not all(bool(latent.isfinite().all()) for latent in made[way.name]):
            raise ValueError("not all of its latents are finite")
        decoding[way.name] = decoding_seconds(way, made[way.name])

    def again(way: Way) -> None:
        _, seconds = once(way, text_BLE, chunks)
        taken[way.name].append(median(seconds))
        if keep is not None:
            keep({"rung": way.name, "turn": len(taken[way.name]) - 1, "seconds": seconds})

    base, error = steps[0].name, dict[str, dict[str, Error]]()
    with Progress("ladder", len(steps) * (turns + 2)) as progress:
        left = whole(steps, first, broken, progress)
        for _ in range(turns):
            left = whole(left, again, broken, progress)
        apart_from = off(prompt, steps[0], chunks)
        left = whole(left, lambda way: error.update(apart_from(way)), broken, progress)
    found = []
    for way in left:
        assert way.cfg.chunk is not None
        ms, frames = sorted(1000 * seconds for seconds in taken[way.name]), TEMPORAL * way.cfg.chunk
        ratios = sorted(slow / fast for slow, fast in zip(taken[base], taken[way.name], strict=True))
        middle = median(taken[way.name])
        tflops = flops.dit_chunk(way.backbone, way.cfg, chunks) / middle / 1e12
        light, whose = peak(way) if peak is not None else (None, "not asked for")
        apart = [distance(made[way.name][part], made[base][part]) for part in (slice(1), slice(STEADY, STEADY + 1), slice(None))]
        rung = Rung(
            name=way.name,
            kind=way.kind,
            ms=median(ms),
            ms_low=ms[0],
            ms_high=ms[-1],
            dit_fps=frames / middle,
            e2e_fps=frames / (middle + decoding[way.name]),
            ratio=median(ratios),
            ratio_low=ratios[0],
            ratio_high=ratios[-1],
            tflops=tflops,
            share=tflops / light if light is not None else None,
            peak=light,
            peak_is=whose,
            first=apart[0],
            steady=apart[1],
            whole=apart[2],
            error=error.get(way.name, {}),
        )
        found.append(rung)
    return found


def whole(steps: Sequence[Way], work: Callable[[Way], None], broken: dict[str, str] | None, progress: Progress) -> list[Way]:
    """Do a part of the work for each; those for which it could be done."""
    found = []
    for way in steps:
        try:
            work(way)
            found.append(way)
        except Exception as error:
            if broken is None or way is steps[0]:
                raise
            broken[way.name] = f"{type(error).__name__}: {error}"
        progress.advance()
    return found


def counted_from(cfg: SamplerCfg) -> int:
    """First chunk whose time counts, see `rfbench.timing.full`."""
    assert cfg.chunk is not None and cfg.cache is not None
    return full(cfg.chunk, cfg.cache.window)


def once(way: Way, text_BLE: Tensor, chunks: int) -> tuple[list[Tensor], list[float]]:
    """The chunks of a clip, and the seconds of each one that counts with its context pass."""
    assert way.cfg.chunk is not None
    first = counted_from(way.cfg)
    made, stamps = [], []
    for latent in way.run(way.backbone, text_BLE, chunks * way.cfg.chunk, way.cfg, clip_noise(way.backbone, [0]), None):
        stamps.append(now(text_BLE.device))
        made.append(latent)
    return made, [after - before for before, after in zip(stamps[first - 1 :], stamps[first:], strict=False)]


def decoding_seconds(way: Way, latents: Sequence[Tensor]) -> float:
    """Seconds for the pixels of a steady chunk, until they can be read on the host."""
    decode, device, stamps, coming = way.backbone.decoder(), latents[0].device, list[float](), list[Callable[[], Tensor]]()
    with hardware.by(way.shortcuts or NONE):
        if way.shortcuts is None:
            begun = now(device)
            (decode(torch.cat(list(latents), 1)).float().cpu() * 127.5 + 127.5).round().clamp(0, 255).byte()
            return (now(device) - begun) / len(latents)
        for latent in latents:
            coming.append(to_host(video.as_uint8(decode(latent))))
            if len(coming) > 1:  # a copy may go along with the next chunk
                coming.pop(0)()
                stamps.append(now(device))
        coming.pop()()
        stamps.append(now(device))
    return median(after - before for before, after in zip(stamps[STEADY - 1 :], stamps[STEADY:], strict=False))


@dataclass(frozen=True)
class Bare:
    """As much of a backbone as makes latents."""

    denoiser: Any
    shape: Any


def off(prompt: str, base: Way, chunks: int) -> Callable[[Way], dict[str, dict[str, Error]]]:
    """Of an exact rung, place by place: its error in bfloat16 over that of rung 0, `base`."""
    assert base.cfg.chunk is not None
    shape, length = base.backbone.shape, base.cfg.chunk
    clips = min(ENOUGH, -(-VALUES // (base.cfg.chunk * shape.channels * shape.height * shape.width)))
    rounded, text_BLE = copy.deepcopy(base.backbone.denoiser), base.backbone.encode_text([prompt] * clips).bfloat16()
    rounded.store(torch.bfloat16)
    exact = copy.deepcopy(rounded)
    exact.store(torch.float32)
    low, high = (cast(Backbone, Bare(model, shape)) for model in (rounded, exact))

    def noise() -> Noise:
        return clip_noise(low, range(1, clips + 1))

    def wide() -> Noise:
        draw = noise()
        return lambda frames: draw(frames).float()

    history = torch.cat(list(reference(high, text_BLE.float(), (chunks - 1) * length, base.cfg, wide(), None)), 1).bfloat16()

    def chunks_of(run: Run, backbone: Backbone, text: Tensor, draw: Callable[[], Noise], given: Tensor) -> list[Tensor]:
        ends = (length, (STEADY + 1) * length, chunks * length)
        return [list(run(backbone, text, end, base.cfg, draw(), given[:, : end - length]))[-1] for end in ends]

    wanted = chunks_of(reference, high, text_BLE.float(), wide, history.float())

    def distances(way: Way) -> list[list[float]]:
        return [each(ours, theirs) for ours, theirs in zip(chunks_of(way.run, low, text_BLE, noise, history), wanted, strict=True)]

    bound = distances(base)

    def told(way: Way) -> dict[str, dict[str, Error]]:
        if way.kind == "approximate":
            return {}
        own = bound if way is base else distances(way)
        return {way.name: {place: compared(*pair) for place, *pair in zip(PLACES, own, bound, strict=True)}}

    return told


def each(found_BFCHW: Tensor, wanted_BFCHW: Tensor) -> list[float]:
    """Relative L2 distance, clip by clip."""
    return [distance([ours], [theirs]) for ours, theirs in zip(found_BFCHW.split(1), wanted_BFCHW.split(1), strict=True)]


def compared(off: Sequence[float], least: Sequence[float]) -> Error:
    """Geometric mean over clips: now and then one rounding more or less moves a whole sprite, here or there.

    Raises:
        ValueError: latents that are not finite, or of another size.
    """
    if not all(map(math.isfinite, off)):
        raise ValueError("in bfloat16 its latents are not finite, or not of the size of those of rung 0")
    logs = [math.log(one / other) for one, other in zip(off, least, strict=True)]
    middle, half = mean(logs), 1.96 * stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else 0.0
    return Error(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def now(device: torch.device) -> float:
    """Seconds by the clock of the module's docstring."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative L2 distance of some chunks; infinite where they are of other sizes."""
    ours, theirs = torch.cat(found, 1).double(), torch.cat(wanted, 1).double()
    return float((ours - theirs).norm() / theirs.norm()) if ours.shape == theirs.shape else float("inf")
