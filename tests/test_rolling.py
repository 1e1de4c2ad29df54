"""The joint window against loops that keep no cache: one masked pass where frames stand at one place, keys from scratch where they do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rfbench.attention import attend, rotate, rotations
from rfbench.cache import CacheShape
from rfbench.config import CacheCfg, SamplerCfg
from rfbench.errors import UserError
from rfbench.rolling import RollingCache
from rfbench.sampler import stream, timesteps
from tests.tiny import Tiny, distance, normal

CPU = torch.device("cpu")
CACHE = CacheCfg("static_sink", window=60, sink=3, rope="absolute")
CFG = SamplerCfg((1000, 700, 400), 5.0, chunk=3, solver="rolling", cache=CACHE)
TOKENS = 6  # per frame


class Noise:
    def __init__(self) -> None:
        self.draws = 0

    def __call__(self, frames: int) -> Tensor:
        self.draws += 1
        return normal(2, frames, 3, 4, 6, seed=self.draws)


def clip(cfg: SamplerCfg, latents: int, **options: Any) -> Tensor:
    tiny = Tiny()
    text = tiny.encode_text(["a red disc", "a blue square"])
    return torch.cat([chunk.latent_BFCHW for chunk in stream(tiny, text, latents, cfg, Noise(), **options)], 1)


@torch.no_grad()
def plain(cfg: SamplerCfg, chunks: int) -> Tensor:
    """By the schedule alone: in turn t, chunk c takes step t - c; a pass goes over the clean chunks and those in work."""
    tiny, noise, grid = Tiny(), Noise(), timesteps(cfg)
    text = tiny.encode_text(["a red disc", "a blue square"])
    state: dict[int, Tensor] = {}
    clean: list[Tensor] = []
    for turn in range(chunks + len(grid) - 1):
        if turn < chunks:
            state[turn] = noise(3)
        work = [chunk for chunk in sorted(state) if 0 <= turn - chunk < len(grid)]
        times = torch.tensor([[0.0] * len(clean) * 3 + [grid[turn - chunk] for chunk in work for _ in range(3)]])
        number = torch.arange(len(clean) + len(work)).repeat_interleave(3 * TOKENS).clamp(max=len(clean))  # those in work see each other
        frames = torch.cat([*clean, *(state[chunk] for chunk in work)], 1)
        flow = tiny.denoiser(frames, times, text, mask_SS=number[None] <= number[:, None])[:, 3 * len(clean) :]
        for place, chunk in enumerate(work):
            sigma = grid[turn - chunk] / 1000
            x0 = state[chunk] - sigma * flow[:, 3 * place : 3 * place + 3]
            if turn - chunk == len(grid) - 1:
                clean.append(x0)
                continue
            following = grid[turn - chunk + 1] / 1000
            state[chunk] = (1 - following) * x0 + following * noise(3)
    return torch.cat(clean, 1)


@pytest.mark.parametrize("steps", [(1000,), (1000, 500), (1000, 700, 400)])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_a_clip_is_what_the_schedule_says_while_everything_is_within_the_window(steps: tuple[int, ...], chunks: int) -> None:
    cfg = replace(CFG, steps=steps)
    assert distance(clip(cfg, 3 * chunks), plain(cfg, chunks)) < 1e-5


def test_with_one_step_it_is_the_ordinary_sampler() -> None:
    cfg = replace(CFG, steps=(1000,))
    assert distance(clip(cfg, 15), clip(replace(cfg, solver="renoise", cache=CacheCfg("full", rope="absolute")), 15)) < 1e-5


@torch.no_grad()
def test_a_joint_pass_sees_the_sink_right_before_the_latest_frames_and_a_clean_pass_the_last_ones() -> None:
    """Window 10, sink 2: with 4 frames in work there is room for 4 cached ones; keys are kept raw here and rotated from scratch."""
    shape = CacheShape(layers=2, batch=2, heads=2, head_dim=12, height=2, width=3, latents=0)
    cache = RollingCache(CacheCfg("static_sink", window=10, sink=2, rope="absolute"), shape, dtype=torch.float32, device=CPU)
    raw: list[tuple[Tensor, Tensor]] = []  # of each clean frame, in all layers alike but for a factor

    def expect(q: Tensor, k: Tensor, v: Tensor, start: int, past: list[tuple[int, int]], factor: float) -> Tensor:
        """`past`: (frame, position)."""
        own = tuple(range(start, start + q.shape[1] // TOKENS))
        keys = [rotate(factor * raw[frame][0], rotations((place,), 2, 3, 12, CPU)) for frame, place in past]
        values = [factor * raw[frame][1] for frame, _ in past]
        rotation = rotations(own, 2, 3, 12, CPU)
        return attend(rotate(q, rotation), torch.cat([*keys, rotate(k, rotation)], 1), torch.cat([*values, v], 1))

    for turn in range(9):
        start = 2 * turn
        for size in (4, 2, 6):  # joint passes of several lengths, the clean one between them left out
            q, k, v = (normal(2, size * TOKENS, 2, 12, seed=100 * turn + 10 * size + i) for i in range(3))
            room = 10 - 2 - size
            past = [] if start == 0 else list(range(max(2, start - room), start))
            sink = [] if start == 0 else [(0, start - len(past) - 2), (1, start - len(past) - 1)]
            cache.begin(start, size, clean=False)
            for layer, factor in enumerate((1.0, 0.5)):
                found = attend(*cache.extend(layer, factor * q, factor * k, factor * v))
                assert distance(found, expect(factor * q, factor * k, factor * v, start, [*sink, *zip(past, past, strict=True)], factor)) < 1e-5
        q, k, v = (normal(2, 2 * TOKENS, 2, 12, seed=100 * turn + i) for i in range(3))
        past = list(range(max(0, start + 2 - 10), start))
        cache.begin(start, 2, clean=True)
        for layer, factor in enumerate((1.0, 0.5)):
            found = attend(*cache.extend(layer, factor * q, factor * k, factor * v))
            assert distance(found, expect(factor * q, factor * k, factor * v, start, list(zip(past, past, strict=True)), factor)) < 1e-5
        raw += list(zip(k.split(TOKENS, 1), v.split(TOKENS, 1), strict=True))


def test_a_chunk_leaves_as_soon_as_it_is_clean() -> None:
    """Three passes fill the window, then one joint and one clean pass make a chunk; nobody caches the last one."""
    tiny, events = Tiny(), list[str]()

    def record(module: Any, args: Any, flow: Tensor) -> None:
        events.append(" ".join(f"{t:.0f}" for t in args[1][0, ::3].tolist()))

    tiny.denoiser.register_forward_hook(record)
    text = tiny.encode_text(["a red disc"] * 2)
    sizes = [len(events) for _ in stream(tiny, text, 12, CFG, Noise(), mark=events.append)]
    assert sizes == [5, 10, 15, 20] and len(events) == 20
    assert events[:5] == ["begin", "1000", "921 1000", "769 921 1000", "denoised"]
    assert events[5:10] == ["0", "cached", "begin", "769 921 1000", "denoised"]
    assert events[10:] == ["0", "cached", "begin", "769 921", "denoised", "0", "cached", "begin", "769", "denoised"]


def test_what_a_joint_window_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match="policy 'static_sink' with rope 'absolute'"):
        replace(CFG, cache=CacheCfg("window", window=60))
    with pytest.raises(UserError, match="'window' for the sink and a chunk per step"):
        replace(CFG, cache=replace(CACHE, window=11))
    with pytest.raises(UserError, match="does not use 'guidance'"):
        replace(CFG, guidance=2.0)
    for options in ({"exit_step": 1}, {"initial_BFCHW": normal(2, 3, 3, 4, 6)}, {"switches": [(3, normal(2, 4, 8))]}):
        with pytest.raises(ValueError, match="joint window"):
            clip(CFG, 6, **options)
