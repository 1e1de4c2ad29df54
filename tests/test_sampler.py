"""The streaming sampler against plain loops that use neither its cache nor its code, and what it promises about noise, gradients and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rfbench.backbones.base import pixel_frames
from rfbench.backbones.toy import ToyBackbone
from rfbench.backbones.wan.dit import block_causal_mask
from rfbench.backbones.wan.lean import LeanDiT, Shortcuts
from rfbench.cache import KVCache
from rfbench.config import CacheCfg, RerollCfg, SamplerCfg
from rfbench.errors import UserError
from rfbench.sampler import cache_shape, clip_noise, generate, latent_at, stream, timesteps
from tests.tiny import Tiny, distance, normal, observe

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
def plain(
    tiny: Tiny, latents: int, cfg: SamplerCfg, noise: Callable[[int], Tensor], given: Tensor | None = None, text: Tensor | None = None
) -> Tensor:
    """Every step passes all frames so far through the network, clean ones at timestep 0, under a block-causal mask."""
    text, null = (texts(tiny, cfg)[0] if text is None else text), texts(tiny, cfg)[1]
    size, grid = cfg.chunk or latents, timesteps(cfg)
    done = [] if given is None else list(given.split(size, 1))
    context = list(done)
    for start in range(size * len(done), latents, size):
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
            if j + 1 == len(grid):
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
def test_work_is_done_when_it_is_asked_for_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels can leave before a chunk's clean pass, and nobody caches the last chunk."""
    tiny, events = Tiny(), list[str]()
    observe(monkeypatch, lambda x, t, cache, flow: events.append(f"pass {t:.0f}"))
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
def test_memory_does_not_grow_with_length(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, held = Tiny(), list[int]()

    def weigh(x: Tensor, t: float, cache: KVCache, flow: Tensor) -> None:
        buffers = {t.data_ptr(): t.numel() for t in (*cache.raw, *cache.rotated, *cache.values, *(t for pair in cache.sinks for t in pair))}
        held.append(sum(buffers.values()))

    observe(monkeypatch, weigh)
    cfg = replace(STUDENT, steps=(1000,), cache=CacheCfg("ema_sink", window=9, sink=3, alpha=0.99, fold_dtype="float32"))
    frame = 2 * 6 * 24  # clips, tokens, width
    for latents in (15, 60):
        held.clear()
        for _ in stream(tiny, tiny.encode_text(PROMPTS), latents, cfg, Noise()):
            pass
        assert len(held) == 2 * latents // 3 - 1
        # per layer raw and rotated keys and values of the window, and keys and values of the sink in the dtype of the average
        assert set(held) == {2 * (3 * 9 + 2 * 3) * frame}


JOINT: dict[str, tuple[dict[str, Any], Callable[[Tiny], dict[str, Any]], int]] = {  # settings, what is asked for, passes that go along with another
    "every policy's like": ({}, lambda tiny: {}, 4),
    "one chunk at a time": ({"cache": CacheCfg("window", window=3)}, lambda tiny: {}, 4),
    "guided": ({"guidance": 2.0}, lambda tiny: {"null_BLE": tiny.encode_text(["", ""])}, 8),
    "context noise": ({"context_noise": 0.1}, lambda tiny: {}, 4),
    "a given beginning": ({}, lambda tiny: {"initial_BFCHW": normal(2, 6, 3, 4, 6, seed=9)}, 3),
    "a switch": ({}, lambda tiny: {"switches": [(6, tiny.encode_text(PROMPTS[::-1]))]}, 3),
    "gradients": ({}, lambda tiny: {"exit_step": 0, "grad_from": 9}, 2),
}


@pytest.mark.parametrize("name", JOINT)
def test_a_clean_pass_goes_along_with_the_next_step_where_it_can_and_the_video_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, asked, joined = JOINT[name]
    tiny, passes, both = Tiny(), list[str](), LeanDiT.fill_and_step

    def told(*given: Any) -> Tensor:
        passes.append("joint")
        return both(*given)

    monkeypatch.setattr(LeanDiT, "fill_and_step", told)
    cfg = replace(STUDENT, **({"cache": CacheCfg("ema_sink", window=7, sink=2, alpha=0.9, fold_dtype="float32")} | settings))

    def made(joint: bool) -> Tensor:
        lean = LeanDiT(tiny.denoiser, Shortcuts(joint=joint))
        return torch.cat([chunk.latent_BFCHW for chunk in stream(tiny, tiny.encode_text(PROMPTS), 15, cfg, Noise(), lean=lean, **asked(tiny))], 1)

    wanted = made(False)
    assert not passes
    assert distance(made(True), wanted) < 1e-6
    assert len(passes) == joined


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


@torch.no_grad()
def test_a_negative_prompt_takes_the_place_of_the_empty_one() -> None:
    tiny, seeds = Tiny(), [3, 4]
    plain_text, worse = (replace(TEACHER, guidance=2.0, negative=negative) for negative in ("", "worst quality"))
    found = {cfg.negative: torch.cat(list(generate(tiny, PROMPTS, 3, cfg, seeds)), 1) for cfg in (plain_text, worse)}
    null = tiny.encode_text(["worst quality"] * 2)
    (chunk,) = stream(tiny, tiny.encode_text(PROMPTS), 3, worse, clip_noise(tiny, seeds), null_BLE=null)
    assert torch.equal(found["worst quality"], tiny.decoder()(chunk.latent_BFCHW))
    assert distance(found[""], found["worst quality"]) > 1e-3
    with pytest.raises(UserError, match="'negative' prompt is not used without guidance"):
        replace(STUDENT, negative="worst quality")
    with pytest.raises(UserError, match="worst quality"):
        next(generate(ToyBackbone(), ["a red disc"], 3, worse, [0]))


@torch.no_grad()
def test_after_a_switch_a_clip_goes_on_as_if_its_beginning_had_been_made_for_the_new_prompt() -> None:
    """Against the plain loop, given the beginning that the old prompt made: with a full cache nothing else can depend on it."""
    tiny, new, noise, replay = Tiny(), Tiny().encode_text(["a cyan disc", "a grey square"]), Noise(), Noise()
    found = clip(tiny, 15, STUDENT, noise, switches=[(4, new)])  # of the chunks 0, 3, 6, ... the first at 4 or later is 6
    unswitched = clip(tiny, 15, STUDENT, Noise())
    assert torch.equal(found[:, :6], unswitched[:, :6]) and distance(found[:, 6:], unswitched[:, 6:]) > 1e-2
    for _ in range(8):
        replay(3)
    assert distance(found, plain(tiny, 15, STUDENT, replay, given=found[:, :6], text=new)) < 1e-5
    assert torch.equal(clip(tiny, 15, STUDENT, Noise(), switches=[(4, PROMPT), (5, new)]), found)
    assert torch.equal(clip(tiny, 6, STUDENT, Noise(), switches=[(0, new)]), clip_of(tiny, 6, new))


PROMPT = normal(2, 4, 8, seed=77)


def clip_of(tiny: Tiny, latents: int, text: Tensor) -> Tensor:
    return torch.cat([chunk.latent_BFCHW for chunk in stream(tiny, text, latents, STUDENT, Noise())], 1)


SINK = CacheCfg("static_sink", window=8, sink=2, rope="absolute")
CACHES = {
    "full": FULL,
    "window": WINDOW,
    "part of a chunk": CacheCfg("window", window=7, rope="absolute"),
    "sink": SINK,
    "relative sink": replace(SINK, rope="relative"),
    "EMA sink": CacheCfg("ema_sink", window=9, sink=3, alpha=0.9, fold_dtype="float32"),
}


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_at_a_switch_the_cached_frames_are_passed_again_with_the_new_text_and_the_sink_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a fresh cache that gets the old sink and then, chunk by chunk, the same frames with the new text."""
    tiny, cfg, frames = Tiny(), replace(STUDENT, steps=(1000, 500), cache=CACHES[name], context_noise=0.1), 12
    clean: list[Tensor] = []  # what clean passes saw
    used: list[KVCache] = []

    def record(x: Tensor, t: float, cache: KVCache, flow: Tensor) -> None:
        used.append(cache)
        if t == 0.0:
            clean.append(x)

    observe(monkeypatch, record)
    parts = stream(tiny, tiny.encode_text(PROMPTS), frames + 3, cfg, Noise(), switches=[(frames, PROMPT)])
    latents = torch.cat([next(parts).latent_BFCHW for _ in range(5)], 1)
    found, seen = used[-1], torch.cat(clean[:4], 1)
    assert distance(seen, latents[:, :frames]) > 1e-2  # context noise

    cache, zero = CACHES[name], torch.zeros(1, 1)
    old, wanted = (KVCache(cache, cache_shape(tiny, 2, frames + 3), dtype=torch.float32, device=torch.device("cpu")) for _ in range(2))
    for start in range(0, frames, 3):
        old.begin(3)
        tiny.denoiser(seen[:, start : start + 3], zero, tiny.encode_text(PROMPTS), cache=old)
    sink = cache.sink or 0
    if sink:
        wanted.begin(sink)
        for buffers in ("raw", "rotated", "values"):
            for new, before in zip(getattr(wanted, buffers), getattr(old, buffers), strict=True):
                new[:, : sink * 6] = before[:, : sink * 6]
    again = range(frames)[sink - (cache.window or frames) :]
    wanted.frames = again[0]
    for number in sorted({frame // 3 for frame in again}):
        group = [frame for frame in again if frame // 3 == number]
        wanted.begin(len(group))
        tiny.denoiser(seen[:, group], zero, PROMPT, cache=wanted)
    wanted.begin(3)
    kept = len(wanted.held) - 3
    assert found.numbers == wanted.numbers and kept > 0
    for buffers in ("raw", "rotated", "values"):
        for a, b in zip(getattr(found, buffers), getattr(wanted, buffers), strict=True):
            one, other = (x.unflatten(1, (-1, 6))[:, held.held[:kept]] for x, held in ((a, found), (b, wanted)))
            assert distance(one, other) < 1e-6


@torch.no_grad()
def test_prompts_switch_in_pixels_too_and_seconds_are_latent_frames() -> None:
    tiny, seeds = Tiny(), [1, 2]
    found = torch.cat(list(generate(tiny, PROMPTS, 9, STUDENT, seeds, switches=[(6, PROMPTS[::-1])])), 1)
    text, turned = tiny.encode_text(PROMPTS), tiny.encode_text(PROMPTS[::-1])
    parts = stream(tiny, text, 9, STUDENT, clip_noise(tiny, seeds), switches=[(6, turned)])
    assert torch.equal(found, tiny.decoder()(torch.cat([part.latent_BFCHW for part in parts], 1)))
    shown = [latent for latent in range(21) for _ in range(1 if latent == 0 else 4)]  # of each pixel frame
    assert [latent_at(frame / 16, 16) for frame in range(81)] == shown
    for switches in ([(6, text), (6, text)], [(6, text), (3, text)]):
        with pytest.raises(ValueError, match="in the order of their frames"):
            next(stream(tiny, text, 9, STUDENT, Noise(), switches=switches))
    with pytest.raises(ValueError, match="between chunks"):
        next(stream(tiny, text, 9, replace(TEACHER, guidance=1.0), Noise(), switches=[(3, text)]))


@pytest.mark.parametrize("latents", [3, 6, 12, 15, 18, 24])
@torch.no_grad()
def test_a_long_clip_of_rollouts_is_what_causvid_puts_together(latents: int) -> None:
    """Rollouts of 9, each but the first from the last 3 of the one before, whose pixels are cut off."""
    tiny, seeds, size, overlap = Tiny(), [1, 2], 9, 3
    cfg = replace(STUDENT, steps=(1000, 500), reroll=RerollCfg(latents=size, overlap=overlap))
    found = list(generate(tiny, PROMPTS, latents, cfg, seeds))
    assert max(part.shape[1] for part in found) <= 12
    noise, text, videos, start, left = clip_noise(tiny, seeds), tiny.encode_text(PROMPTS), list[Tensor](), None, latents
    while True:
        length = min(size, left)
        parts = stream(tiny, text, length, replace(cfg, reroll=None), noise, initial_BFCHW=start)
        made = torch.cat([part.latent_BFCHW for part in parts], 1)
        video = tiny.decoder()(made)
        left -= length
        if not left:
            break
        videos.append(video[:, : -(4 * (overlap - 1) + 1)])
        frame = video[:, -4 * (overlap - 1) - 1 : -4 * (overlap - 1)]
        start = torch.cat([tiny.encode_pixels(frame), made[:, -(overlap - 1) :]], 1)
        left += overlap
    assert torch.equal(torch.cat(found, 1), torch.cat([*videos, video], 1))
    assert sum(part.shape[1] for part in found) == pixel_frames(latents)


@torch.no_grad()
def test_a_prompt_switches_at_its_frame_of_the_clip_whatever_the_rollout() -> None:
    tiny, seeds, cfg = Tiny(), [1, 2], replace(STUDENT, steps=(1000, 500), reroll=RerollCfg(latents=9, overlap=3))
    still = torch.cat(list(generate(tiny, PROMPTS, 15, cfg, seeds)), 1)
    for frame in (3, 9, 12):
        turned = torch.cat(list(generate(tiny, PROMPTS, 15, cfg, seeds, switches=[(frame, PROMPTS[::-1])])), 1)
        differs = (turned != still).flatten(2).any(2).any(0)
        # frames of the second rollout's beginning come from the first rollout
        assert not differs[: pixel_frames(frame)].any() and differs[pixel_frames(frame) :].all()


@pytest.mark.parametrize(("latents", "overlap", "chunk"), [(20, 3, 3), (21, 2, 3), (21, 21, 3), (21, 3, None)])
def test_rollouts_that_are_not_whole_chunks_are_refused(latents: int, overlap: int, chunk: int | None) -> None:
    with pytest.raises(UserError, match="'reroll' needs whole chunks"):
        replace(STUDENT if chunk else replace(TEACHER, guidance=1.0), reroll=RerollCfg(latents, overlap))
