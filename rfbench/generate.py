"""`rfbench generate`: every clip of a suite by a baseline; and `rfbench sample`, one clip of one prompt.

    runs/bench/<baseline>/<suite>/{run.json, clips.jsonl, videos/<clip id>.mp4}

A clip depends on its prompt and seed alone, so clips can be made in batches, in shards and in several sittings. A clip is
finished when its row is there; a video without a row is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rfbench import attention, baselines, config, external, fleet, provenance, records, sampler, strict, suites, video
from rfbench.backbones.base import TEMPORAL, Backbone, pixel_frames
from rfbench.backbones.wan.lean import LeanDiT, taken
from rfbench.baselines import Prepared
from rfbench.config import Baseline, External, SamplerCfg
from rfbench.errors import UserError
from rfbench.progress import Progress, say
from rfbench.records import RANDOM, Clip
from rfbench.settings import settings
from rfbench.suites import Prompt, Suite, clip_id, clip_seed
from rfbench.transfer import to_host

FRAMES = 81  # of a sample

Item = tuple[Prompt, int]  # a clip to make: its prompt and which sample of it


def generate(
    baseline: str,
    suite: str,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    limit: int | None = None,
    shard: str | None = None,
    random_weights: bool = False,
    engine: fleet.Engine = "here",
    workers: int | None = None,
    fresh: bool = False,
    dry_run: bool = False,
) -> Path:
    """Make the clips of a suite that are not there yet; with `shard` "I/N" only every N-th from the I-th on.

    A process that torchrun or `accelerate launch` started among others makes the shard of its rank. With engine "ray" the `workers` of
    a cluster make them, batch by batch (`rfbench.fleet`). The clips are the same.

    `random_weights` shows that everything runs without any file: by a network with random weights, small where the backbone has
    a small size. Its run is called `<name>-random`.

    Returns:
        the run directory; the run is done when the clips of all shards are there.

    Raises:
        UserError: the baseline, the suite or one of its prompts cannot be used; the directory holds another run; the disk
            is full (code 1).
    """
    shard = _rank(shard)
    maker = _maker(baseline, overrides, name, random_weights, engine, workers)
    asked = suites.load_suite(suite, limit)
    frames = maker.frames(asked)
    items = asked.items
    mine = items if shard is None else suites.shard(items, shard)
    directory = settings().runs / "bench" / maker.name / asked.name
    inputs = maker.inputs() | {"suite": suites.declared(asked) | {"sha256": suites.suite_sha256(asked)}}
    if dry_run:
        say(f"{len(mine)} clips of {frames} frames, {len(records.read_clips(directory))} rows are there")
        return directory
    if fresh or not _is_done(directory, inputs):
        maker.check(asked)  # what is wrong with a prompt must come out before there is a directory
    writer = shard.replace("/", "of") if shard else None
    rows = directory / (f"clips.{writer}.jsonl" if writer else "clips.jsonl")
    with provenance.session(directory, "generate", f"{maker.name}/{asked.name}", inputs, fresh=fresh, writer=writer) as run:
        if run.run.recorded.get("baseline") != (told := strict.as_plain(maker.cfg)):
            run.record(baseline=told)
        kept = _intact(directory, rows, alone=shard is None)
        if run.done and len(kept) < len(items):
            run.reopen()
        if not run.done:
            if random_weights:
                run.record(weights=RANDOM)
                say("weights: random; what is made of them means nothing")
            run.record(**maker.facts())
            todo = [(prompt, sample) for prompt, sample in mine if clip_id(prompt.id, sample) not in kept]
            with records.appending(rows) as append, Progress(run.run.name, len(mine), done=len(mine) - len(todo)) as progress:
                for tried, clips in maker.make(asked, todo, directory, writer or "alone"):
                    for clip in clips:
                        append(clip)
                    progress.advance(tried)
            made = _intact(directory, rows, alone=shard is None) if todo or shard else kept
            run.result |= maker.result(directory, writer or "alone", len(mine)) | {"clips": len(made)}
            run.complete = len(made) == len(items)
    return directory


def _rank(shard: str | None) -> str | None:
    """The shard of this process: the given one, or that of its rank among those that were launched together, each with a GPU of its own.

    Raises:
        UserError: both.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return shard
    if shard is not None:
        raise UserError(f"--shard {shard}: this is one of {ranks} processes that were launched together, whose ranks are their shards; leave it out")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"{int(os.environ['RANK']) + 1}/{ranks}"


class Maker(Protocol):
    """A baseline that is ready to make clips: one of ours, or one that its authors' code runs."""

    @property
    def name(self) -> str:
        """Of its runs."""

    @property
    def cfg(self) -> Baseline | External: ...

    def inputs(self) -> dict[str, Any]:
        """What its videos depend on."""

    def frames(self, asked: Suite) -> int:
        """Of a clip of the suite."""

    def check(self, asked: Suite) -> None:
        """Refuse what it cannot make, before anything is written."""

    def facts(self) -> dict[str, Any]:
        """What a run records of how its clips are made."""

    def make(self, asked: Suite, todo: Sequence[Item], directory: Path, writer: str) -> Iterator[tuple[int, Sequence[Clip]]]:
        """How many clips were tried, and the rows of those that are there, some at a time."""

    def result(self, directory: Path, writer: str, mine: int) -> dict[str, Any]:
        """Headlines once everything was tried; an error, if some of the writer's clips could not be made."""


def _maker(baseline: str, overrides: Sequence[str], name: str | None, random_weights: bool, engine: fleet.Engine, workers: int | None) -> Maker:
    """A baseline of either kind.

    Raises:
        UserError: it cannot be used, or not in this way.
    """
    if config.is_external(baseline):
        if random_weights or engine != "here":
            option = "--random-weights" if random_weights else f"--engine {engine}"
            raise UserError(f"{option}: '{baseline}' is run by its authors' code in a process of its own, by its own weights; leave it out")
        return external.prepare(baseline, overrides, name=name)
    ready = baselines.prepare(baseline, overrides, name=name, random_weights=random_weights, reduced=True)
    return Native(dataclasses.replace(ready, name=f"{ready.name}-{RANDOM}") if random_weights else ready, engine, workers)


@dataclass
class Native:
    """A baseline that runs here, or in the workers of a cluster; its model is opened when it is first needed."""

    ready: Prepared
    engine: fleet.Engine = "here"
    workers: int | None = None
    backbone: Backbone | None = None

    @property
    def name(self) -> str:
        return self.ready.name

    @property
    def cfg(self) -> Baseline:
        return self.ready.cfg

    def inputs(self) -> dict[str, Any]:
        return self.ready.inputs()

    def frames(self, asked: Suite) -> int:
        frames = asked.frames_at(self.ready.fps)
        self.ready.latents(frames, f"suite '{asked.name}'")
        return frames

    def check(self, asked: Suite) -> None:
        """Opens the model; on a cluster that is for its workers to do."""
        self.facts()  # so that what rfbench.toml asks for in vain comes out as well
        if self.engine == "here":
            self.backbone = _open(self.ready, asked)

    def facts(self) -> dict[str, Any]:
        device = baselines.device()
        return {
            "device": str(device),
            "threads": torch.get_num_threads(),
            "attention": attention.kernel(device),
            "shortcuts": self._shortcuts(device),
        }

    def _shortcuts(self, device: torch.device) -> list[str]:
        return taken(settings().fast.shortcuts, device) if sampler.is_lean(self.cfg.sampler) else []

    def make(self, asked: Suite, todo: Sequence[Item], directory: Path, writer: str) -> Iterator[tuple[int, Sequence[Clip]]]:
        latents = self.ready.latents(self.frames(asked), f"suite '{asked.name}'")
        batches = _batches(self.ready.blank, self.cfg.sampler, latents, todo)
        opener = functools.partial(_filming, self.ready, asked, latents, directory.resolve(), self.backbone)
        made = fleet.spread(opener, batches, self.workers) if self.engine == "ray" else map(opener(), batches)
        return ((len(clips), clips) for clips in made)

    def result(self, directory: Path, writer: str, mine: int) -> dict[str, Any]:
        return {}


def sample(
    baseline: str,
    prompt: str,
    overrides: Sequence[str] = (),
    *,
    then: Sequence[str] = (),
    given: Path | None = None,
    seed: int,
    frames: int | None = None,
    out: Path,
) -> Path:
    """Make one clip of `frames` pixel frames, or 81, as `out`, an .mp4 or a .gif; each `then`, "SECONDS=PROMPT", switches the prompt on the way.

    `given` is a video or an image that the clip goes on from: its last frames, as many as fill whole chunks, come first. A system that
    its authors' code runs makes a clip of its own length, see `external.sample`.

    Raises:
        UserError: the baseline, a prompt, a switch, what is given, the length or the kind of file cannot be used; the disk is full (code 1).
    """
    if config.is_external(baseline):
        if then or given is not None:
            option = "--then" if then else "--from"
            raise UserError(f"{option}: '{baseline}' is run by its authors' code, which makes a clip of one prompt alone; leave it out")
        return external.sample(external.prepare(baseline, overrides), prompt, seed=seed, frames=frames, out=out)
    ready, frames = baselines.prepare(baseline, overrides), frames or FRAMES
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
    _film(backbone, cfg, sampler.lean_of(backbone, cfg), [prompt], [seed], latents, frames, backbone.shape.fps, [out], turns, before)
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


def _is_done(directory: Path, inputs: dict[str, object]) -> bool:
    if not (directory / "run.json").exists():
        return False
    run = records.read_run(directory)
    return run.status == records.DONE and run.fingerprint == records.fingerprint(inputs)


def _open(ready: Prepared, asked: Suite) -> Backbone:
    """The model, once it is clear that it can make what the suite asks for."""
    backbone = ready.open()
    for prompt in asked.prompts:
        try:
            backbone.encode_text([_given(prompt)])
        except UserError as error:
            raise UserError(f"suite '{asked.name}', prompt {prompt.id}: {error}") from None
    return backbone


def _given(prompt: Prompt) -> str:
    return prompt.text if prompt.generate_from is None else prompt.generate_from


def _intact(directory: Path, own: Path, *, alone: bool) -> dict[str, Clip]:
    """The clips whose video is the one that its row tells of. Rows of others go from `own`, as do those that are out of order.

    A lone writer takes the rows of all files into its own; the writer of a shard leaves the others' alone.

    Raises:
        UserError: a video that another writer made is gone or altered (code 1).
    """
    files = records.clip_files(directory)
    rows = {path: records.read_rows(path, Clip) for path in files}
    whole = {path: records.intact(directory, clips) for path, clips in rows.items()}
    for path in files:
        if not alone and path != own and whole[path] != rows[path]:
            raise UserError(f"a video that {path} tells of is gone or was altered; run this again without --shard", code=1)
    mine = [path for path in files if alone or path == own]
    found = {clip.id: clip for path in files for clip in whole[path]}
    ordered = sorted({clip.id: clip for path in mine for clip in whole[path]}.values(), key=lambda clip: (clip.prompt_id, clip.sample))
    if ordered != rows.get(own, []):
        records.write_rows(own, ordered)
    for path in mine:
        if path != own:
            path.unlink()
    return found


def _batches(backbone: Backbone, cfg: SamplerCfg, latents: int, todo: Sequence[Item]) -> list[Sequence[Item]]:
    """Clips that are made together: as many as have `tokens` of rfbench.toml in a pass."""
    shape = sampler.cache_shape(backbone, 1, latents)
    size = max(1, settings().fast.tokens // ((cfg.chunk or latents) * shape.height * shape.width))
    return [todo[start : start + size] for start in range(0, len(todo), size)]


def _filming(ready: Prepared, asked: Suite, latents: int, directory: Path, backbone: Backbone | None) -> Callable[[Sequence[Item]], list[Clip]]:
    """The function that makes a batch of clips and returns their rows, once all their videos are there; without `backbone` it opens one."""
    model = _open(ready, asked) if backbone is None else backbone
    lean = sampler.lean_of(model, ready.cfg.sampler)
    shape, frames = model.shape, asked.frames_at(model.shape.fps)

    def make(batch: Sequence[Item]) -> list[Clip]:
        ids = [clip_id(prompt.id, sample) for prompt, sample in batch]
        seeds = [clip_seed(asked.seed, prompt.id, sample) for prompt, sample in batch]
        files = [f"videos/{clip}.mp4" for clip in ids]
        prompts, paths = [_given(prompt) for prompt, _ in batch], [directory / file for file in files]
        _film(model, ready.cfg.sampler, lean, prompts, seeds, latents, frames, shape.fps, paths)
        return [
            Clip(
                *(clip, prompt.id, sample, prompt.text, _given(prompt), seed),
                *(frames, shape.fps, shape.pixel_height, shape.pixel_width, file, records.sha256_of(directory / file)),
            )
            for (prompt, sample), clip, seed, file in zip(batch, ids, seeds, files, strict=True)
        ]

    return make


def _film(
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
