"""The streaming sampler against plain loops that use neither its cache nor its code, and what it promises about noise, gradients and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rfbench.backbones.wan.dit import block_causal_mask
from rfbench.cache import KVCache
from rfbench.config import CacheCfg, SamplerCfg
from rfbench.sampler import clip_noise, generate, stream, timesteps
from tests.tiny import Tiny, distance, normal

FULL, WINDOW = CacheCfg("full", rope="absolute"), CacheCfg("window", window=6)
STUDENT = SamplerCfg((1000, 750, 500, 250), 5.0, chunk=3, cache=FULL)
TEACHER = SamplerCfg(5, 3.0, chunk=None, solver="euler", guidance=2.0)
PROMPTS = ["a red disc", "a blue square"]


class Noise:
    """Draws that can be replayed, and how many frames each was asked for."""

    def __init__(self, batch: int = 2) -> None:
        self.batch, self.asked = batch, list[int]()

    def __call__(self, frames: int) -> Tensor:
        self.asked.append(frames)
        return normal(self.batch, frames, 3, 4, 6, seed=len(self.asked))


def texts(tiny: Tiny, cfg: SamplerCfg) -> tuple[Tensor, Tensor | None]:
    return tiny.encode_text(PROMPTS), tiny.encode_text(["", ""]) if cfg.guidance != 1.0 else None


def clip(tiny: Tiny, latents: int, cfg: SamplerCfg, noise: Callable[[int], Tensor], **options: Any) -> Tensor:
    text, null = texts(tiny, cfg)
    return torch.cat([chunk.latent_BFCHW for chunk in stream(tiny, text, latents, cfg, noise, null_BLE=null, **options)], 1)


@torch.no_grad()
def plain(tiny: Tiny, latents: int, cfg: SamplerCfg, noise: Callable[[int], Tensor], exit_step: int | None = None) -> Tensor:
    """Every step passes all frames so far through the network, clean ones at timestep 0, under a block-causal mask."""
    text, null = texts(tiny, cfg)
    size, grid = cfg.chunk or latents, timesteps(cfg)
    done: list[Tensor] = []
    context: list[Tensor] = []
    for start in range(0, latents, size):
        x = noise(size)
        for j, t in enumerate(grid):
            times = torch.cat([torch.zeros(1, start), torch.full((1, size), t)], 1)
            mask = block_causal_mask(start + size, 6, size, None, torch.device("cpu"))
            now = torch.cat([*context, x], 1)
            flow = tiny.denoiser(now, times, text, mask_SS=mask)[:, start:]
            if null is not None:
                without = tiny.denoiser(now, times, null, mask_SS=mask)[:, start:]
                flow = (1 - cfg.guidance) * without + cfg.guidance * flow
            sigma, following = t / 1000, grid[j + 1] / 1000 if j + 1 < len(grid) else 0.0
            x0 = x - sigma * flow
            if j == exit_step or j + 1 == len(grid):
                break
            x = (1 - following) * x0 + following * noise(size) if cfg.solver == "renoise" else x0 + following * flow
        done.append(x0)
        if start + size < latents:
            context.append((1 - cfg.context_noise) * x0 + cfg.context_noise * noise(size) if cfg.context_noise else x0)
    return torch.cat(done, 1)


@pytest.mark.parametrize(
    "cfg",
    [
        TEACHER,
        replace(TEACHER, guidance=1.0),
        STUDENT,
        replace(STUDENT, guidance=3.0),
        replace(STUDENT, context_noise=0.1),
        replace(STUDENT, chunk=1, steps=(1000, 300)),
        SamplerCfg(4, 5.0, chunk=3, solver="euler", cache=FULL),
    ],
    ids=["bidirectional", "unguided", "few-step", "guided", "noisy-context", "frame-by-frame", "euler-chunks"],
)
@torch.no_grad()
def test_a_clip_is_what_a_plain_loop_makes_from_the_same_draws(cfg: SamplerCfg) -> None:
    tiny, found, wanted = Tiny(), Noise(), Noise()
    assert distance(clip(tiny, 6, cfg, found), plain(tiny, 6, cfg, wanted)) < 1e-5
    assert found.asked == wanted.asked


def test_timesteps_are_looked_up_taken_as_they_are_or_spaced() -> None:
    assert timesteps(STUDENT) == pytest.approx((1000, 937.5, 833.33333, 625))
    assert timesteps(replace(STUDENT, warp=False)) == (1000, 750, 500, 250)
    assert timesteps(replace(TEACHER, steps=2, shift=3.0)) == pytest.approx((1000, 750))


@torch.no_grad()
def test_noise_is_drawn_at_a_chunks_start_before_later_steps_and_for_the_context() -> None:
    noise = Noise()
    clip(Tiny(), 6, replace(STUDENT, context_noise=0.01), noise)
    assert noise.asked == [3] * (1 + 3 + 1 + 1 + 3)
    noise = Noise()
    clip(Tiny(), 6, STUDENT, noise, exit_step=1)
    assert noise.asked == [3] * (1 + 1) * 2


@torch.no_grad()
def test_work_is_done_when_it_is_asked_for_and_no_more() -> None:
    """Pixels can leave before a chunk's clean pass, and nobody caches the last chunk."""
    tiny, events = Tiny(), list[str]()
    tiny.denoiser.register_forward_hook(lambda module, args, flow: events.append(f"pass {float(args[1].flatten()[0]):.0f}"))
    chunks = stream(tiny, tiny.encode_text(PROMPTS), 6, replace(STUDENT, steps=(1000, 500)), Noise(), mark=events.append)
    assert events == []
    first = next(chunks)
    assert (first.index, first.start) == (0, 0)
    assert events == ["begin", "pass 1000", "pass 833", "denoised"]
    second = next(chunks)
    assert (second.index, second.start) == (1, 3)
    assert events[4:] == ["pass 0", "cached", "begin", "pass 1000", "pass 833", "denoised"]
    assert next(chunks, None) is None
    assert len(events) == 10


@torch.no_grad()
def test_watch_sees_where_each_step_starts() -> None:
    tiny, seen, noise = Tiny(), list[Tensor](), Noise()
    result = clip(tiny, 3, replace(TEACHER, guidance=1.0, steps=3), noise, watch=seen.append)
    assert len(seen) == 3 and torch.equal(seen[0], Noise()(3))
    last = timesteps(replace(TEACHER, steps=3))[-1]
    flow = tiny.denoiser(seen[-1], torch.tensor([[last]]), tiny.encode_text(PROMPTS))
    assert distance(result, seen[-1] - last / 1000 * flow) < 1e-5


@torch.no_grad()
def test_a_given_beginning_is_handed_out_and_gone_on_from() -> None:
    tiny, draws = Tiny(), list[Tensor]()
    noise = Noise()

    def record(frames: int) -> Tensor:
        draws.append(noise(frames))
        return draws[-1]

    whole = clip(tiny, 12, STUDENT, record)
    rest = iter(draws[8:])
    again = clip(tiny, 12, STUDENT, lambda frames: next(rest), initial_BFCHW=whole[:, :6])
    assert torch.equal(again[:, :6], whole[:, :6])
    assert distance(again, whole) < 1e-6
    assert next(rest, None) is None


@pytest.mark.parametrize("exit_step", [0, 2, 3])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_only_the_exit_step_is_differentiated(exit_step: int, guidance: float) -> None:
    """Parameter gradients of a chunk against autograd through its last call alone, text projections included (D-35)."""
    tiny, cfg, direction = Tiny(), replace(STUDENT, guidance=guidance), normal(2, 3, 3, 4, 6, seed=99)
    found = clip(tiny, 3, cfg, Noise(), exit_step=exit_step, grad_from=0)
    (found * direction).sum().backward()
    gradients = {name: parameter.grad for name, parameter in tiny.denoiser.named_parameters()}
    tiny.denoiser.zero_grad(set_to_none=True)

    noise, (text, null), grid = Noise(), texts(tiny, cfg), timesteps(cfg)
    x = noise(3)
    for j in range(exit_step + 1):
        with torch.set_grad_enabled(j == exit_step):
            t = torch.tensor([[grid[j]]])
            flow = tiny.denoiser(x, t, text)
            flow = flow if null is None else flow + (guidance - 1) * (flow - tiny.denoiser(x, t, null))
            x0 = x - grid[j] / 1000 * flow
        if j < exit_step:
            x = (1 - grid[j + 1] / 1000) * x0 + grid[j + 1] / 1000 * noise(3)
    assert distance(found.detach(), x0.detach()) < 1e-5
    (x0 * direction).sum().backward()
    for name, parameter in tiny.denoiser.named_parameters():
        gradient = gradients[name]
        assert parameter.grad is not None and gradient is not None, name
        assert distance(gradient, parameter.grad) < 1e-4, name


def test_gradients_begin_at_the_chunk_that_is_asked_for() -> None:
    tiny, cfg = Tiny(), replace(STUDENT, cache=WINDOW)
    chunks = list(stream(tiny, tiny.encode_text(PROMPTS), 9, cfg, Noise(), exit_step=1, grad_from=3))
    assert [chunk.latent_BFCHW.requires_grad for chunk in chunks] == [False, True, True]
    without = list(stream(tiny, tiny.encode_text(PROMPTS), 9, cfg, Noise(), exit_step=1))
    assert not any(chunk.latent_BFCHW.requires_grad for chunk in without)
    for a, b in zip(chunks, without, strict=True):
        assert distance(a.latent_BFCHW.detach(), b.latent_BFCHW) < 1e-5


@torch.no_grad()
def test_memory_does_not_grow_with_length() -> None:
    tiny, held = Tiny(), list[int]()

    def weigh(module: Any, args: Any, kwargs: dict[str, Any], flow: Tensor) -> None:
        cache: KVCache = kwargs["cache"]
        buffers = {t.data_ptr(): t.numel() for t in (*cache.raw, *cache.rotated, *cache.values, *(t for pair in cache.sinks for t in pair))}
        held.append(sum(buffers.values()))

    tiny.denoiser.register_forward_hook(weigh, with_kwargs=True)
    cfg = replace(STUDENT, steps=(1000,), cache=CacheCfg("ema_sink", window=9, sink=3, alpha=0.99, fold_dtype="float32"))
    frame = 2 * 6 * 24  # clips, tokens, width
    for latents in (15, 60):
        held.clear()
        for _ in stream(tiny, tiny.encode_text(PROMPTS), latents, cfg, Noise()):
            pass
        assert len(held) == 2 * latents // 3 - 1
        # per layer raw and rotated keys and values of the window, and from the first fold on keys and values of the sink
        assert held[0] == 2 * 3 * 9 * frame and held[-1] == max(held) == 2 * (3 * 9 + 2 * 3) * frame


@torch.no_grad()
def test_a_clip_does_not_depend_on_its_batch_mates() -> None:
    tiny, cfg = Tiny(), replace(STUDENT, cache=WINDOW, guidance=2.0)
    prompts, seeds = ["a red disc", "a blue square", "a cyan disc moves up"], [7, 2**62, 9]
    together = torch.cat(list(generate(tiny, prompts, 9, cfg, seeds)), 1)
    assert together.shape == (3, 33, 3, 4, 6)
    for i in range(3):
        alone = torch.cat(list(generate(tiny, prompts[i : i + 1], 9, cfg, seeds[i : i + 1])), 1)
        assert distance(alone, together[i : i + 1]) < 1e-5
    assert distance(together[1], together[0]) > 0.1
    assert torch.equal(clip_noise(tiny, seeds)(3)[1:2], clip_noise(tiny, seeds[1:2])(3))
    assert torch.equal(torch.cat(list(generate(tiny, prompts, 9, cfg, seeds)), 1), together)


def test_lengths_and_prompts_that_do_not_fit_are_refused() -> None:
    tiny = Tiny()
    text = tiny.encode_text(PROMPTS)
    with pytest.raises(ValueError, match="7 latent frames are not whole chunks of 3"):
        next(stream(tiny, text, 7, STUDENT, Noise()))
    with pytest.raises(ValueError, match="whole chunks"):
        next(stream(tiny, text, 6, STUDENT, Noise(), initial_BFCHW=normal(2, 2, 3, 4, 6)))
    with pytest.raises(ValueError, match="unconditional"):
        next(stream(tiny, text, 6, STUDENT, Noise(), null_BLE=text))
    with pytest.raises(ValueError, match="unconditional"):
        next(stream(tiny, text, 6, TEACHER, Noise()))
