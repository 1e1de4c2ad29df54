"""The one denoising loop: training rollouts, generation and profiling all call `stream`.

Chunk by chunk: draw noise, take the steps, hand out the clean chunk, then (only when another chunk is wanted) run the clean
pass that leaves its keys and values in the cache. A clip without chunks is one chunk of all frames without a cache, which
is the bidirectional sampler.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, L text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rfbench.backbones.base import Backbone
from rfbench.backbones.wan.dit import TextKV
from rfbench.cache import CacheShape, KVCache
from rfbench.config import SamplerCfg
from rfbench.schedule import Schedule, add_noise, flow_to_x0

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
        return torch.stack([torch.randn(frames, *size, generator=rng) for rng in generators]).to(parameter.device, parameter.dtype)

    return draw


def timesteps(cfg: SamplerCfg) -> tuple[float, ...]:
    """The timesteps that are taken, noisiest first."""
    schedule = Schedule(cfg.shift)
    if isinstance(cfg.steps, int):
        return schedule.spaced(cfg.steps)
    return schedule.warp(cfg.steps) if cfg.warp else tuple(float(step) for step in cfg.steps)


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
    exit_step: int | None = None,
    grad_from: int | None = None,
    mark: Callable[[str], None] | None = None,
    watch: Callable[[Tensor], None] | None = None,
) -> Iterator[Chunk]:
    """Make a batch of clips of `latents` latent frames, chunk by chunk, at constant memory.

    Args:
        text_BLE: one prompt embedding per clip.
        noise: called with a chunk's length once at its start, once before every step but the first (`renoise`), and once for
            the clean pass when `cfg.context_noise` is not 0.
        null_BLE: embedding of the unconditional prompt; needed exactly when `cfg.guidance` is not 1.
        initial_BFCHW: given frames that the clip goes on from, whole chunks; they are handed out first.
        exit_step: training: stop every chunk at this step (0-based) instead of the last.
        grad_from: training: record gradients in the exit step of chunks that start at or after this frame. Cached keys and
            values never carry gradients (D-34).
        mark: called with "begin", "denoised" and "cached" as each chunk passes that point, for timers.
        watch: called with the noisy latents that each step starts from, for trajectories.

    Yields:
        the clean chunks in order. The caller's work on a chunk comes before its clean pass, so pixels leave as early as they can.

    Raises:
        ValueError: lengths that do not fit the chunk, or null text missing or unused.
    """
    length = latents if cfg.chunk is None else cfg.chunk
    if latents % length or (initial_BFCHW is not None and initial_BFCHW.shape[1] % length):
        raise ValueError(f"{latents} latent frames are not whole chunks of {length}")
    if (null_BLE is None) != (cfg.guidance == 1.0):
        raise ValueError("the unconditional prompt is needed exactly when guidance is not 1")
    model, schedule = backbone.denoiser, Schedule(cfg.shift)
    given = [text for text in (text_BLE, null_BLE) if text is not None]
    with torch.no_grad():
        texts = [model.text_kv(text) for text in given]
    steps = timesteps(cfg)
    sigmas = schedule.sigma(torch.tensor(steps)).tolist() if cfg.solver == "renoise" else [step / 1000 for step in steps]
    last = len(steps) - 1 if exit_step is None else exit_step
    batch, device = len(text_BLE), text_BLE.device
    shape = cache_shape(backbone, batch, latents)
    caches = [] if cfg.cache is None else [KVCache(cfg.cache, shape, dtype=text_BLE.dtype, device=device) for _ in texts]
    # One timestep for all clips: a product with a single row rounds otherwise than one with a row per clip.
    times = {step: torch.full((1, 1), step, dtype=torch.float64, device=device) for step in (*steps, 0.0)}
    tell = mark or (lambda event: None)

    def flow(x_BFCHW: Tensor, step: float, grad: bool = False) -> Tensor:
        with torch.set_grad_enabled(grad):
            # Under autograd the text projections must be recomputed, or their weights would get no gradient (D-35).
            keys_values: Sequence[Tensor | TextKV] = given if grad else texts
            held: Sequence[KVCache | None] = caches or [None] * len(given)
            outs = [model(x_BFCHW, times[step], text, cache=cache) for text, cache in zip(keys_values, held, strict=True)]
            return outs[0] if len(outs) == 1 else outs[1] + cfg.guidance * (outs[0] - outs[1])

    def at(sigma: float) -> Tensor:
        return torch.full((1, 1), sigma, dtype=torch.float64, device=device)

    for index in range(latents // length):
        start = index * length
        tell("begin")
        for cache in caches:
            cache.begin(length)
        if initial_BFCHW is not None and start < initial_BFCHW.shape[1]:
            x0 = initial_BFCHW[:, start : start + length]
        else:
            x = noise(length)
            for number in range(last + 1):
                if watch is not None:
                    watch(x)
                grad = number == last and grad_from is not None and start >= grad_from
                velocity = flow(x, steps[number], grad)
                following = sigmas[number + 1] if number < len(sigmas) - 1 else 0.0
                if cfg.solver == "euler":
                    x0 = x = x + velocity * (following - sigmas[number])
                else:
                    with torch.set_grad_enabled(grad):
                        x0 = flow_to_x0(velocity, x, at(sigmas[number]))
                    if number < last:
                        x = add_noise(x0, noise(length), at(following))
        tell("denoised")
        yield Chunk(index, start, x0)
        if start + length < latents:
            clean = x0.detach()
            flow(add_noise(clean, noise(length), at(cfg.context_noise)) if cfg.context_noise else clean, 0.0)
            tell("cached")


def generate(backbone: Backbone, prompts: Sequence[str], latents: int, cfg: SamplerCfg, seeds: Sequence[int]) -> Iterator[Tensor]:
    """Pixels of one clip per prompt and seed, as a stream: [B, T, 3, H, W] in [-1, 1] for each chunk."""
    with torch.no_grad():
        text = backbone.encode_text(prompts)
        null = backbone.encode_text([""] * len(prompts)) if cfg.guidance != 1.0 else None
        decode = backbone.decoder()
        for chunk in stream(backbone, text, latents, cfg, clip_noise(backbone, seeds), null_BLE=null):
            yield decode(chunk.latent_BFCHW)
