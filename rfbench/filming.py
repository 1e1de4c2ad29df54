"""Clips by our own sampler: batches of a suite's, or one of one prompt, streamed into video files."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfbench import attention, baselines, proof, records, sampler, video
from rfbench.backbones.base import TEMPORAL, Backbone, pixel_frames
from rfbench.backbones.wan.lean import LeanDiT, taken
from rfbench.baselines import Prepared
from rfbench.config import SamplerCfg
from rfbench.errors import UserError
from rfbench.progress import say
from rfbench.records import Clip
from rfbench.settings import settings
from rfbench.suites import Item, Suite, clip_id, clip_seed
from rfbench.transfer import to_host

Made = tuple[list[Clip], dict[str, str]]  # rows, and the shortcuts that did not prove themselves in the process that made the clips


def facts(ready: Prepared) -> dict[str, Any]:
    """What a run records of how its clips are made here.

    Raises:
        UserError: rfbench.toml asks for what this machine cannot do.
    """
    device = baselines.device()
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "attention": attention.kernel(device),
        "shortcuts": taken(settings().fast.shortcuts, device) if sampler.is_lean(ready.cfg.sampler) else [],
        **ready.origin,
    }


def open_model(ready: Prepared, asked: Suite) -> Backbone:
    """The model, once it is clear that it can make what the suite asks for."""
    backbone = ready.open()
    for prompt in asked.prompts:
        try:
            backbone.encode_text([prompt.given])
        except UserError as error:
            raise UserError(f"suite '{asked.name}', prompt {prompt.id}: {error}") from None
    return backbone


def batches(backbone: Backbone, cfg: SamplerCfg, latents: int, todo: Sequence[Item]) -> list[Sequence[Item]]:
    """Clips that are made together: as many as have `tokens` of rfbench.toml in a pass."""
    shape = sampler.cache_shape(backbone, 1, latents)
    size = max(1, settings().fast.tokens // ((cfg.chunk or latents) * shape.height * shape.width))
    return [todo[start : start + size] for start in range(0, len(todo), size)]


def filming(ready: Prepared, asked: Suite, latents: int, directory: Path, backbone: Backbone | None) -> Callable[[Sequence[Item]], Made]:
    """The function that makes a batch of clips and returns their rows, once all their videos are there; without `backbone` it opens one."""
    model = open_model(ready, asked) if backbone is None else backbone
    lean = sampler.lean_of(model, ready.cfg.sampler)
    shape, frames = model.shape, asked.frames_at(model.shape.fps)

    def make(batch: Sequence[Item]) -> Made:
        ids = [clip_id(prompt.id, sample) for prompt, sample in batch]
        seeds = [clip_seed(asked.seed, prompt.id, sample) for prompt, sample in batch]
        files = [f"videos/{clip}.mp4" for clip in ids]
        prompts, paths = [prompt.given for prompt, _ in batch], [directory / file for file in files]
        film(model, ready.cfg.sampler, lean, prompts, seeds, latents, frames, shape.fps, paths)
        clips = [
            Clip(
                *(clip, prompt.id, sample, prompt.text, prompt.given, seed),
                *(frames, shape.fps, shape.pixel_height, shape.pixel_width, file, records.sha256_of(directory / file)),
            )
            for (prompt, sample), clip, seed, file in zip(batch, ids, seeds, files, strict=True)
        ]
        return clips, dict(proof.left_out)

    return make


def film(
    backbone: Backbone,
    cfg: SamplerCfg,
    lean: LeanDiT | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    latents: int,
    frames: int,
    fps: int,
    paths: Sequence[Path],
    switches: Sequence[tuple[int, Sequence[str]]] = (),
    given_BTCHW: Tensor | None = None,
) -> None:
    """Stream a batch of clips into its video files; no more than two chunks of pixels are held.

    The frames of a chunk are written while the device makes the next one.

    Raises:
        UserError: the model's output is not finite, or the disk is full (code 1).
    """
    shape = backbone.shape
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(video.writing(path, fps=fps, height=shape.pixel_height, width=shape.pixel_width)) for path in paths]
        left, coming = frames, list[tuple[Callable[[], Tensor], Callable[[], Tensor]]]()

        def write_oldest() -> None:
            shown, finite = (there() for there in coming.pop(0))
            if not finite:
                raise UserError(f"{paths[0].name}: what the model made is not finite; its weights are not fit for use", code=1)
            for write, clip in zip(writers, shown.numpy(), strict=True):
                write(clip)

        for pixels in sampler.generate(backbone, prompts, latents, cfg, seeds, given_BTCHW=given_BTCHW, switches=switches, lean=lean):
            shown = video.as_uint8(pixels[:, :left])  # the last chunk may make more frames than were asked for
            coming.append((to_host(shown), to_host(torch.isfinite(pixels).all())))
            left -= shown.shape[1]
            if len(coming) > 1:
                write_oldest()
        while coming:
            write_oldest()


def sample(ready: Prepared, prompt: str, *, then: Sequence[str] = (), given: Path | None = None, seed: int, frames: int, out: Path) -> Path:
    """One clip of one prompt, or of several in turn; see `generate.sample`.

    Raises:
        UserError: a prompt, a switch, what is given, the length or the kind of file cannot be used; the disk is full (code 1).
    """
    latents = ready.latents(frames, "--frames")
    if then and not sampler.can_switch(ready.cfg.sampler):
        raise UserError(f"--then: the sampler of '{ready.name}' does not go chunk by chunk, so its prompt cannot switch on the way; leave it out")
    if given is not None and not sampler.can_continue(ready.cfg.sampler):
        raise UserError(
            f"--from: the sampler of '{ready.name}' does not go chunk by chunk, so its clips cannot go on from given frames; leave it out"
        )
    backbone = ready.open()
    before = None if given is None else _beginning(given, backbone, ready.cfg.sampler.chunk or 1, latents)
    turns = [_turn(text, backbone.shape.fps, frames) for text in then]
    if any(later <= earlier for (earlier, _), (later, _) in itertools.pairwise(turns)):
        raise UserError("--then is given several times: order the prompts by their time, a latent frame (4 pixel frames) or more apart")
    for text in (prompt, *(others[0] for _, others in turns)):
        backbone.encode_text([text])
    cfg = ready.cfg.sampler
    film(backbone, cfg, sampler.lean_of(backbone, cfg), [prompt], [seed], latents, frames, backbone.shape.fps, [out], turns, before)
    return out


def _beginning(path: Path, backbone: Backbone, chunk: int, latents: int) -> Tensor:
    """The last pixel frames of a video that are whole chunks, at most all chunks but one of a clip: [1, T, 3, H, W]."""
    found, fps = video.read(path)
    shape = backbone.shape
    wanted, size = (shape.pixel_width, shape.pixel_height), (found.shape[2], found.shape[1])
    if size != wanted or (len(found) > 1 and fps != shape.fps):
        raise UserError(
            f"--from {path}: it is {size[0]}x{size[1]} at {fps:g} frames per second, the model's are {wanted[0]}x{wanted[1]} at {shape.fps}; "
            f"convert it, for example by `ffmpeg -i IN -vf scale={wanted[0]}:{wanted[1]},fps={shape.fps} OUT`"
        )
    whole = min((1 + (len(found) - 1) // TEMPORAL) // chunk * chunk, latents - chunk)
    if whole <= 0:
        raise UserError(
            f"--from {path}: a chunk of the model is {pixel_frames(chunk)} frames, the file has {len(found)} and the clip {pixel_frames(latents)}; "
            "it needs one to begin with and another to make"
        )
    used = pixel_frames(whole)
    say(f"goes on from the last {used} of {len(found)} frames, which come first")
    return video.as_pixels(torch.from_numpy(found[None, -used:]))


def _turn(text: str, fps: int, frames: int) -> tuple[int, list[str]]:
    """The latent frame at which a prompt takes over, and the prompt, from "SECONDS=PROMPT"."""
    at, _, prompt = text.partition("=")
    try:
        seconds = float(at)
    except ValueError:
        seconds = -1.0
    if not prompt.strip() or not 0 < seconds * fps < frames:
        raise UserError(f"--then '{text}': write SECONDS=PROMPT, within the clip's {frames / fps:.1f} seconds, for example '2.5=a blue disc'")
    return sampler.latent_at(seconds, fps), [prompt]
