"""Diffusion forcing against diffusers' SkyReels-V2 pipeline with the same weights and noise, and its schedule against the rule it follows."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfbench import layouts
from rfbench.backbones.base import pixel_frames
from rfbench.config import CacheCfg, RerollCfg, SamplerCfg
from rfbench.errors import UserError
from rfbench.forcing import passes
from rfbench.rollouts import chain
from rfbench.sampler import clip_noise, generate, noise_levels, stream, timesteps
from tests.tiny import CFG, Tiny, distance, normal

SYNC = SamplerCfg(6, 8.0, chunk=None, solver="forcing", guidance=6.0, negative="blurred", context_noise=0.02, first_state="overwritten")
ASYNC = replace(SYNC, chunk=5, lag=2, causal=True)
PROMPTS = ["a red disc", "a blue square"]
ONE = PROMPTS[:1]  # the library runs one clip at a time: it repeats the frame rate over frames, not over clips


def model() -> Tiny:
    return Tiny(replace(CFG, fps=24))


class Draws:
    """The noise of a clip: given to the library, and to the sampler in its own order of axes."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frames: int) -> Tensor:
        self.count += 1
        return normal(1, frames, 3, 4, 6, seed=self.count)

    def channels_first(self, frames: int) -> Tensor:
        return self(frames).transpose(1, 2)


def library(cfg: SamplerCfg, latents: int, monkeypatch: pytest.MonkeyPatch, *, rollout: int, overlap: int | None = None) -> Tensor:
    """What the pipeline makes: [B, F, C, H, W]. Its noise is drawn for the frames that it makes, since it overwrites that of the given ones."""
    diffusers: Any = importlib.import_module("diffusers")
    tiny, draws = model(), Draws()
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 3, "text_dim": 8, "freq_dim": 16, "ffn_dim": 48}
    network = diffusers.SkyReelsV2Transformer3DModel(**sizes, num_layers=2, inject_sample_info=True)
    network.load_state_dict({layouts.to_diffusers(name): tensor for name, tensor in tiny.denoiser.state_dict().items()})
    set_timesteps = diffusers.UniPCMultistepScheduler.set_timesteps

    def on_our_grid(scheduler: Any, steps: int, device: Any = None) -> None:  # which is that of the authors' code
        assert steps == cfg.steps
        set_timesteps(scheduler, device=device, sigmas=np.array(noise_levels(cfg)))

    def first_noise(shape: tuple[int, ...], **options: Any) -> Tensor:
        held = 0 if draws.count == 0 else overlap or 0
        return torch.cat([torch.zeros(1, 3, held, 4, 6), draws.channels_first(shape[2] - held)], 2)

    monkeypatch.setattr(diffusers.UniPCMultistepScheduler, "set_timesteps", on_our_grid)
    monkeypatch.setattr(importlib.import_module(diffusers.SkyReelsV2DiffusionForcingPipeline.__module__), "randn_tensor", first_noise)
    monkeypatch.setattr(torch, "randn_like", lambda x, **options: draws.channels_first(x.shape[2]))
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    pipeline = diffusers.SkyReelsV2DiffusionForcingPipeline(tokenizer=None, text_encoder=None, transformer=network, vae=None, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt=None,
        prompt_embeds=tiny.encode_text(ONE),
        negative_prompt_embeds=tiny.encode_text([cfg.negative]),
        height=32,
        width=48,
        num_frames=pixel_frames(latents),
        base_num_frames=pixel_frames(rollout),
        overlap_history=None if overlap is None else pixel_frames(overlap),
        addnoise_condition=1000 * cfg.context_noise,
        num_inference_steps=cfg.steps,
        guidance_scale=cfg.guidance,
        ar_step=cfg.lag or 0,
        causal_block_size=cfg.chunk,
        fps=24,
        output_type="latent",
    )
    frames: Tensor = made.frames
    return frames.transpose(1, 2)


def clip(cfg: SamplerCfg, latents: int, draws: Draws, first: Tensor | None = None) -> list[Tensor]:
    tiny = model()
    null = tiny.encode_text([cfg.negative]) if cfg.guidance != 1.0 else None
    chunks = list(stream(tiny, tiny.encode_text(ONE), latents, cfg, draws, null_BLE=null, initial_BFCHW=first))
    starts = [sum(chunk.latent_BFCHW.shape[1] for chunk in chunks[:index]) for index in range(len(chunks))]
    assert [(chunk.index, chunk.start) for chunk in chunks] == list(enumerate(starts))
    return [chunk.latent_BFCHW for chunk in chunks]


@pytest.mark.parametrize(
    ("cfg", "latents"),
    [(SYNC, 7), (SYNC, 1), (replace(SYNC, guidance=1.0, negative=""), 4), (ASYNC, 15), (replace(ASYNC, lag=5), 15), (replace(ASYNC, lag=9), 10)],
)
def test_a_clip_is_that_of_the_library(cfg: SamplerCfg, latents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = library(cfg, latents, monkeypatch, rollout=latents)
    found = torch.cat(clip(cfg, latents, Draws()), 1)
    print(f"relative error {distance(found, wanted):.1e}")
    assert distance(found, wanted) < 1e-4
    for change in ({"shift": 5.0}, {"first_state": "kept"}):
        assert distance(found, torch.cat(clip(replace(cfg, **change), latents, Draws()), 1)) > 1e-3


@pytest.mark.parametrize(
    ("cfg", "rollout", "overlap", "latents"), [(SYNC, 5, 2, 12), (ASYNC, 15, 5, 30), (replace(SYNC, context_noise=0.0), 5, 2, 8)]
)
def test_a_long_clip_from_latents_is_that_of_the_library(
    cfg: SamplerCfg, rollout: int, overlap: int, latents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = library(cfg, latents, monkeypatch, rollout=rollout, overlap=overlap)
    draws, new = Draws(), list[Tensor]()

    def roll(start: int, length: int, first: Tensor | None) -> Iterator[Tensor]:
        made = clip(cfg, length, draws, first)
        new.append(torch.cat(made, 1)[:, 0 if first is None else overlap :])
        return iter(made)

    tiny = model()
    pixels = torch.cat(list(chain(tiny, latents, RerollCfg(rollout, overlap, anew="none"), roll)), 1)
    joined = torch.cat(new, 1)
    print(f"relative error {distance(joined, wanted):.1e}")
    assert distance(joined, wanted) < 1e-4
    assert torch.equal(pixels, tiny.decoder()(joined))


def rule(blocks: int, steps: int, lag: int, ready: int = 0) -> list[list[int]]:
    """As the authors tell it, row after row: 0 is noise, 1 to `steps` is the step that is taken, `steps` + 1 is clean.

    The first block goes on by one. A block behind one whose last row was its last step, or clean, goes on by one from its own last
    row; any other stands `lag` behind the one before it in the same row. When no block is before its last step, it is over.
    """
    last, rows = [steps + 1] * ready + [0] * (blocks - ready), list[list[int]]()
    while any(stage < steps for stage in last):
        row = list[int]()
        for block in range(blocks):
            alone = block == 0 or last[block - 1] >= steps
            row.append(last[block] + 1 if alone else row[block - 1] - lag)
        last = [min(max(stage, 0), steps + 1) for stage in row]
        rows.append(last)
    return rows


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 20), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_the_schedule_is_the_authors_rule(blocks: int, steps: int, lag: int, ready: int) -> None:
    assert [[number + 1 for number in row] for row in passes(blocks, steps, lag)] == rule(blocks, steps, lag)
    later = [row[ready:] for row in rule(blocks + ready, steps, lag, ready)]
    assert later == rule(blocks, steps, lag), "blocks that are given change nothing for those behind them"


@pytest.mark.parametrize(("frames", "chunk", "lag", "ready"), [(25, 1, 0, 0), (25, 5, 5, 0), (25, 5, 5, 5), (25, 1, 0, 5), (20, 5, 60, 0)])
def test_the_schedule_is_that_of_the_library(frames: int, chunk: int, lag: int, ready: int) -> None:
    """Timesteps frame by frame, which frames move on, and that a pass is over all of them."""
    from diffusers import SkyReelsV2DiffusionForcingPipeline

    cfg = replace(SYNC, steps=50)
    grid = timesteps(cfg)
    matrix = SkyReelsV2DiffusionForcingPipeline.generate_timestep_matrix
    told, _, moves, interval = matrix(None, frames, torch.tensor(grid), frames, lag, ready, chunk)
    new = (frames - ready) // chunk
    rows = passes(new, 50, lag) if lag else passes(1, 50, 0)
    spread = chunk if lag else frames - ready
    level = {-1: 999.0, 50: 0.0} | dict(enumerate(grid))
    assert told.tolist() == [[0.0] * ready + [level[number] for number in row for _ in range(spread)] for row in rows]
    assert moves.tolist() == [[False] * ready + [0 <= number < 50 for number in row for _ in range(spread)] for row in rows]
    assert interval == [(0, frames)] * len(rows)


def test_a_chunk_leaves_as_soon_as_it_is_clean() -> None:
    """Three chunks of six steps, two behind one another: ten passes, and a chunk after the sixth, the eighth and the tenth."""
    tiny, events = model(), list[str]()
    tiny.denoiser.register_forward_hook(lambda module, args, flow: events.append("pass"))
    cfg = replace(ASYNC, guidance=1.0, negative="", causal=False)
    sizes = [len([event for event in events if event == "pass"]) for _ in stream(tiny, tiny.encode_text(ONE), 15, cfg, Draws(), mark=events.append)]
    assert sizes == [6, 8, 10]
    assert [event for event in events if event != "pass"] == ["begin", "denoised", "cached", "begin", "denoised", "cached", "begin", "denoised"]


def test_chunks_see_those_behind_them_unless_they_are_causal() -> None:
    def first(cfg: SamplerCfg, latents: int) -> Tensor:
        noise = normal(1, 15, 3, 4, 6)
        return clip(cfg, latents, lambda frames: noise[:, :frames])[0]  # type: ignore[arg-type]

    assert distance(first(ASYNC, 10), first(ASYNC, 15)) < 1e-5
    both = replace(ASYNC, causal=False)
    assert distance(first(both, 10), first(both, 15)) > 1e-3


@pytest.mark.parametrize(("cfg", "latents"), [(SYNC, 14), (replace(ASYNC, causal=False), 25)])
def test_a_long_clip_of_the_authors_goes_on_from_its_pixels(cfg: SamplerCfg, latents: int) -> None:
    """Put together by hand: the last pixels are encoded, and of the next rollout only what is new is shown."""
    rollout, overlap = (6, 2) if cfg.chunk is None else (15, 5)
    tiny, seeds = model(), [1, 2]
    cfg = replace(cfg, reroll=RerollCfg(rollout, overlap, anew="all"))
    text, null, noise = tiny.encode_text(PROMPTS), tiny.encode_text([cfg.negative] * 2), clip_noise(tiny, seeds)
    shared, made, start = pixel_frames(overlap), torch.zeros(2, 0, 3, 4, 6), 0
    while True:
        length = min(rollout, latents - start)
        first = tiny.encode_pixels(made[:, -shared:]) if start else None
        parts = stream(tiny, text, length, replace(cfg, reroll=None), noise, null_BLE=null, initial_BFCHW=first)
        shown = tiny.decoder()(torch.cat([chunk.latent_BFCHW for chunk in parts], 1))
        made = torch.cat([made, shown[:, shared if start else 0 :]], 1)
        if start + length == latents:
            break
        start += rollout - overlap
    found = torch.cat(list(generate(tiny, PROMPTS, latents, cfg, seeds)), 1)
    assert found.shape[1] == pixel_frames(latents) and torch.equal(found, made)


def test_what_diffusion_forcing_cannot_use_is_refused() -> None:
    with pytest.raises(UserError, match="has no 'cache'"):
        replace(ASYNC, cache=CacheCfg("full"))
    for change in ({"lag": None}, {"chunk": None}, {"lag": 0}):
        with pytest.raises(UserError, match="'lag' of at least one step exactly when it has a 'chunk'"):
            replace(ASYNC, **change)
    with pytest.raises(UserError, match="'causal' from chunk to chunk"):
        replace(SYNC, causal=True)
    assert replace(SYNC, solver="unipc", first_state="kept").lag is None
    with pytest.raises(UserError, match="has a grid of its own"):
        replace(SYNC, steps=(1000, 500))
    with pytest.raises(UserError, match="solver 'unipc' does not use 'lag', 'causal' and 'first_state'"):
        replace(SYNC, solver="unipc")
    for cfg, reroll in ((SYNC, (5, 5)), (SYNC, (5, 0)), (ASYNC, (25, 3)), (ASYNC, (24, 5))):
        with pytest.raises(UserError, match="'reroll' needs whole chunks"):
            replace(cfg, reroll=RerollCfg(*reroll))
    tiny = model()
    options: list[dict[str, Any]] = [{"exit_step": 1}, {"switches": [(5, normal(1, 4, 8))]}, {"watch": print}]
    for option in options:
        with pytest.raises(ValueError, match="joint window"):
            list(stream(tiny, normal(1, 4, 8), 10, replace(ASYNC, guidance=1.0, negative=""), Draws(), **option))
    with pytest.raises(ValueError, match="whole chunks of 5"):
        clip(ASYNC, 12, Draws())
