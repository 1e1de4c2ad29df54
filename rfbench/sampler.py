"""The one denoising loop: training rollouts, generation and profiling all call `stream`.

Chunk by chunk: draw noise, take the steps, hand out the clean chunk, then (only when another chunk is wanted) run the clean
pass that leaves its keys and values in the cache. A clip without chunks is one chunk of all frames without a cache, which
is the bidirectional sampler. A clip that is longer than a model's rollouts may be several of them (`rfbench.rollouts`).

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, L text tokens, E text width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rfbench.backbones.base import Backbone, latent_frames
from rfbench.backbones.wan.lean import SHORTCUTS, LeanDiT
from rfbench.cache import CacheShape, Gradients, KVCache
from rfbench.config import SamplerCfg
from rfbench.forcing import force
from rfbench.rolling import RollingCache, roll
from rfbench.rollouts import chain
from rfbench.schedule import Schedule, add_noise, flow_to_x0, wan_grid
from rfbench.settings import settings
from rfbench.transfer import to_device
from rfbench.unipc import UniPC

ALONE = replace(SHORTCUTS, kernels=False, graphs=False)  # of a model that makes one stream: nothing has to prove itself first
Noise = Callable[[int], Tensor]  # latent frames -> noise [B, F, C, H, W]; draws follow each other in the sampler's order


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: clean latents of the frames from `start` on."""

    index: int
    start: int
    latent_BFCHW: Tensor


def clip_noise(backbone: Backbone, seeds: Sequence[int]) -> Noise:
    """Standard normal noise, one CPU generator per clip: a clip is the same in any batch, in any order, on any device."""
    parameter = next(backbone.denoiser.parameters())
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = (backbone.shape.channels, backbone.shape.height, backbone.shape.width)

    def draw(frames: int) -> Tensor:
        drawn = [torch.randn(1, frames, *size, generator=rng) for rng in generators]
        return to_device(torch.cat(drawn) if len(drawn) > 1 else drawn[0], parameter.device).to(backbone.denoiser.dtype)

    return draw


def timesteps(cfg: SamplerCfg) -> tuple[float, ...]:
    """The timesteps that are taken, noisiest first."""
    schedule = Schedule(cfg.shift)
    if isinstance(cfg.steps, int):
        return wan_grid(cfg.steps, cfg.shift)[0] if cfg.solver in ("unipc", "forcing") else schedule.spaced(cfg.steps)
    return schedule.warp(cfg.steps) if cfg.warp else tuple(float(step) for step in cfg.steps)


def noise_levels(cfg: SamplerCfg) -> list[float]:
    """Sigma of each timestep that is taken."""
    if cfg.solver in ("unipc", "forcing"):
        assert isinstance(cfg.steps, int)
        return list(wan_grid(cfg.steps, cfg.shift)[1])
    steps = timesteps(cfg)
    return Schedule(cfg.shift).sigma(torch.tensor(steps)).tolist() if cfg.solver != "euler" else [step / 1000 for step in steps]


def lean_of(backbone: Backbone, cfg: SamplerCfg) -> LeanDiT | None:
    """What streams run their passes by, one after the other, as this machine's rfbench.toml says; None where all frames of a joint window
    are in work, which has passes of its own.

    Raises:
        UserError: rfbench.toml asks for a shortcut that this device cannot take.
    """
    return LeanDiT(backbone.denoiser, settings().fast.shortcuts) if is_lean(cfg) else None


def is_lean(cfg: SamplerCfg) -> bool:
    """Whether passes without gradients are run by a `LeanDiT`."""
    return cfg.solver not in ("rolling", "forcing")


def cache_shape(backbone: Backbone, batch: int, latents: int) -> CacheShape:
    """Sizes of the cache that `backbone` needs for `batch` clips of `latents` latent frames."""
    cfg, shape = backbone.denoiser.cfg, backbone.shape
    return CacheShape(cfg.num_layers, batch, cfg.num_heads, cfg.head_dim, shape.height // cfg.patch[1], shape.width // cfg.patch[2], latents)


def stream(
    backbone: Backbone,
    text_BLE: Tensor,
    latents: int,
    cfg: SamplerCfg,
    noise: Noise,
    *,
    null_BLE: Tensor | None = None,
    initial_BFCHW: Tensor | None = None,
    switches: Sequence[tuple[int, Tensor]] = (),
    exit_step: int | None = None,
    grad_from: int | None = None,
    cache_gradients: Gradients = "detached",
    mark: Callable[[str], None] | None = None,
    watch: Callable[[Tensor], None] | None = None,
    lean: LeanDiT | None = None,
) -> Iterator[Chunk]:
    """Make a batch of clips of `latents` latent frames, chunk by chunk, at constant memory.

    Args:
        text_BLE: one prompt embedding per clip.
        noise: called with a chunk's length once at its start, once before every step but the first (`renoise`), and once for
            the clean pass when `cfg.context_noise` is not 0.
        null_BLE: embedding of the unconditional prompt; needed exactly when `cfg.guidance` is not 1.
        initial_BFCHW: given frames that the clip goes on from, whole chunks; they are handed out first.
        switches: (latent frame, prompt embeddings) in order: chunks that start there or later follow these prompts. At a switch
            the clean passes of the cached frames are run again, chunk by chunk, with the new text; the sink's keys and values
            stay as they are (LongLive's KV recache, arXiv:2509.22622, NVlabs/LongLive v1.0). With the cache's `shot_offset`
            nothing is run again, and a shot begins (`KVCache.begin`).
        exit_step: training: stop every chunk at this step (0-based) instead of the last.
        grad_from: training: record gradients in the exit step of chunks that start at or after this frame.
        cache_gradients: training: whether cached keys and values carry gradients, see `KVCache` (D-34).
        mark: called with "begin", "denoised" and "cached" as each chunk passes that point, for timers. A clean pass that goes along
            with the next chunk's first step counts there, and "cached" comes before it.
        watch: called with the noisy latents that each step starts from, for trajectories.
        lean: how passes without gradients are run, made of this backbone's denoiser whose weights did not change since (`lean_of`);
            None makes one.

    Yields:
        the clean chunks in order. The caller's work on a chunk comes before its clean pass, so pixels leave as early as they can.

    Raises:
        ValueError: lengths that do not fit the chunk, null text missing or unused, or switches that are out of order or without a cache.
    """
    length = cfg.chunk or (1 if cfg.solver == "forcing" else latents)
    if latents % length or (initial_BFCHW is not None and initial_BFCHW.shape[1] % length):
        raise ValueError(f"{latents} latent frames are not whole chunks of {length}")
    if (null_BLE is None) != (cfg.guidance == 1.0):
        raise ValueError("the unconditional prompt is needed exactly when guidance is not 1")
    joint = cfg.solver in ("rolling", "forcing")
    if joint and (switches or exit_step is not None or grad_from is not None or watch is not None):
        raise ValueError("chunks in a joint window have no switch, exit or trajectory of their own")
    if cfg.solver == "rolling" and initial_BFCHW is not None:
        raise ValueError("chunks in a joint window that rolls have no beginning of their own")
    if switches and (cfg.cache is None or any(later <= earlier for (earlier, _), (later, _) in itertools.pairwise(switches))):
        raise ValueError("prompts switch between chunks, in the order of their frames")
    if cfg.context != "clean" and (exit_step is not None or grad_from is not None):
        raise ValueError("a rollout for training fills its cache with clean passes")
    model = backbone.denoiser
    given = [text for text in (text_BLE, null_BLE) if text is not None]
    with torch.no_grad():
        texts = [model.text_kv(text) for text in given]
    steps, sigmas = timesteps(cfg), noise_levels(cfg)
    last = len(steps) - 1 if exit_step is None else exit_step
    batch, device = len(text_BLE), text_BLE.device
    shape = cache_shape(backbone, batch, latents)
    tell = mark or (lambda event: None)
    shots = cfg.cache is not None and cfg.cache.shot_offset is not None
    if cfg.solver == "rolling":
        assert cfg.cache is not None
        rolling = RollingCache(cfg.cache, shape, dtype=text_BLE.dtype, device=device)
        rolled = roll(model, texts[0], latents // length, length, noise, steps, sigmas, rolling, tell)
        yield from (Chunk(index, index * length, x0) for index, x0 in enumerate(rolled))
        return
    if cfg.solver == "forcing":
        start = 0
        for index, x0 in enumerate(force(model, texts, latents, cfg, noise, steps, sigmas, initial_BFCHW, tell)):
            yield Chunk(index, start, x0)
            start += x0.shape[1]
        return
    lean, memory = lean or LeanDiT(model, ALONE), {"dtype": text_BLE.dtype, "device": device, "gradients": cache_gradients}
    caches = [lean.cache(cfg.cache, shape, **memory) for _ in texts if cfg.cache is not None]
    held: Sequence[KVCache | None] = caches or [None] * len(given)
    due = list(switches)
    pending: Tensor | None = None  # a clean chunk whose pass goes along with the next one's first step
    context: dict[int, Tensor] = {}  # while a switch is to come: what the clean passes of the cached chunks saw

    def flow(x_BFCHW: Tensor, step: float, grad: bool, clean_BFCHW: Tensor | None) -> Tensor:
        with torch.set_grad_enabled(grad):
            if clean_BFCHW is not None:
                outs = [lean.fill_and_step(clean_BFCHW, x_BFCHW, step, text, cache) for text, cache in zip(texts, caches, strict=True)]
            elif grad:  # the text projections must be recomputed, or their weights would get no gradient (D-35)
                outs = [model(x_BFCHW, at(step), text, cache=cache) for text, cache in zip(given, held, strict=True)]
            else:
                outs = [lean(x_BFCHW, step, text, cache, kept=cfg.context == "last_step") for text, cache in zip(texts, held, strict=True)]
            return outs[0] if len(outs) == 1 else outs[1] + cfg.guidance * (outs[0] - outs[1])

    def at(value: float) -> Tensor:
        """One timestep or sigma for all clips: a product with a single row rounds otherwise than one with a row per clip."""
        return torch.full((1, 1), value, dtype=torch.float64, device=device)

    def is_given(start: int) -> bool:
        return initial_BFCHW is not None and start < initial_BFCHW.shape[1]

    def goes_along(following: int) -> bool:
        """Whether the next chunk begins with a pass that a clean pass can be part of: one with the same text and without gradients."""
        graded = grad_from is not None and last == 0 and following >= grad_from
        return lean.shortcuts.joint and cfg.context == "clean" and not (is_given(following) or graded or any(frame <= following for frame, _ in due))

    def switch(text_BLE: Tensor) -> None:
        given[0] = text_BLE
        with torch.no_grad():
            texts[0] = model.text_kv(text_BLE)
            if shots:
                return
            for chunk, numbers in itertools.groupby(caches[0].rewind(), key=lambda number: number // length):
                again = [number - chunk * length for number in numbers]
                caches[0].begin(len(again))
                lean.fill(context[chunk][:, again], texts[0], caches[0])

    try:
        for index in range(latents // length):
            start = index * length
            tell("begin")
            ready = [text for frame, text in due if frame <= start]
            if ready:
                due = due[len(ready) :]
                switch(ready[-1])
            for cache in caches:
                cache.begin(length, cut=shots and bool(ready) and start > 0, carried=pending is None)
            if initial_BFCHW is not None and start < initial_BFCHW.shape[1]:
                x0 = initial_BFCHW[:, start : start + length]
            else:
                x, solver = noise(length), UniPC(sigmas) if cfg.solver == "unipc" else None
                for number in range(last + 1):
                    if watch is not None:
                        watch(x)
                    grad = number == last and grad_from is not None and start >= grad_from
                    velocity = flow(x, steps[number], grad, pending)
                    pending = None
                    following = sigmas[number + 1] if number < len(sigmas) - 1 else 0.0
                    if solver is not None:
                        x0 = x = solver.step(x, velocity)
                    elif cfg.solver == "euler":
                        x0 = x = x + velocity * (following - sigmas[number])
                    else:
                        with torch.set_grad_enabled(grad):
                            x0 = flow_to_x0(velocity, x, sigmas[number])
                        if number < last:
                            x = add_noise(x0, noise(length), following)
            tell("denoised")
            yield Chunk(index, start, x0)
            if start + length < latents:
                clean = add_noise(x0.detach(), noise(length), cfg.context_noise) if cfg.context_noise else x0.detach()
                if goes_along(start + length):
                    pending = clean
                elif cfg.context == "clean" or is_given(start):
                    for text, cache in zip(texts, caches, strict=True):
                        lean.fill(clean, text, cache)
                if due and not shots:
                    cached = {number // length for number in caches[0].numbers}
                    context = {chunk: seen for chunk, seen in [*context.items(), (index, clean)] if chunk in cached}
                tell("cached")
    finally:  # also where nobody wants the rest
        for cache in caches:
            lean.done(cache)


def generate(
    backbone: Backbone,
    prompts: Sequence[str],
    latents: int,
    cfg: SamplerCfg,
    seeds: Sequence[int],
    *,
    given_BTCHW: Tensor | None = None,
    switches: Sequence[tuple[int, Sequence[str]]] = (),
    lean: LeanDiT | None = None,
) -> Iterator[Tensor]:
    """Pixels of one clip per prompt and seed, as a stream: [B, T, 3, H, W] in [-1, 1] for each chunk.

    `given_BTCHW` are pixels of whole chunks that the clips go on from; they come first, as the autoencoder shows them.
    `switches` are (latent frame, one prompt per clip), see `stream` and `latent_at`; `lean` as there.
    """
    with torch.no_grad():
        text = backbone.encode_text(prompts)
        null = backbone.encode_text([cfg.negative] * len(prompts)) if cfg.guidance != 1.0 else None
        later = [(frame, backbone.encode_text(others)) for frame, others in switches]
        noise = clip_noise(backbone, seeds)
        given = None if given_BTCHW is None else backbone.encode_pixels(given_BTCHW)

        def roll(start: int, length: int, initial_BFCHW: Tensor | None) -> Iterator[Tensor]:
            initial_BFCHW = initial_BFCHW if start else given
            turns = [(frame - start, then) for frame, then in later]
            made = stream(backbone, text, length, cfg, noise, null_BLE=null, initial_BFCHW=initial_BFCHW, switches=turns, lean=lean)
            return (chunk.latent_BFCHW for chunk in made)

        if cfg.reroll is not None:
            yield from chain(backbone, latents, cfg.reroll, roll)
        else:
            yield from map(backbone.decoder(), roll(0, latents, None))


def can_switch(cfg: SamplerCfg) -> bool:
    """Whether a prompt can change on the way: between the chunks of a stream."""
    return cfg.cache is not None and cfg.solver not in ("rolling", "forcing")


def can_continue(cfg: SamplerCfg) -> bool:
    """Whether a clip can go on from given frames: its first chunks."""
    return (cfg.chunk is not None or cfg.solver == "forcing") and cfg.solver != "rolling"


def latent_at(seconds: float, fps: int) -> int:
    """The latent frame that is shown at a time of the clip."""
    return latent_frames(round(seconds * fps) + 1, None) - 1
