"""`rfbench generate`: every clip of a suite by a baseline; and `rfbench sample`, one clip of one prompt.

    runs/bench/<baseline>/<suite>/{run.json, clips.jsonl, videos/<clip id>.mp4}

A clip depends on its prompt and seed alone, so clips can be made in batches, in shards and in several sittings. A clip is
finished when its row is there; a video without a row is made again. Whether something is left to make is found out without torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rfbench import baselines, config, fleet, provenance, records, strict, suites
from rfbench.baselines import Prepared
from rfbench.config import Baseline, External
from rfbench.errors import UserError
from rfbench.launched import place
from rfbench.progress import Progress, say
from rfbench.records import RANDOM, Clip
from rfbench.settings import settings
from rfbench.suites import Item, Suite, clip_id

if TYPE_CHECKING:
    from rfbench.backbones.base import Backbone

FRAMES = 81  # of a sample


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
    begun = not fresh and (directory / "run.json").exists()  # the session refuses it if it is of other inputs
    if not begun:
        maker.check(asked)  # what is wrong with a prompt must come out before there is a directory
    writer = shard.replace("/", "of") if shard else None
    rows = directory / (f"clips.{writer}.jsonl" if writer else "clips.jsonl")
    with provenance.session(directory, "generate", f"{maker.name}/{asked.name}", inputs, fresh=fresh, writer=writer, begin=not begun) as run:
        if run.run.recorded.get("baseline") != (told := strict.as_plain(maker.cfg)):
            run.record(baseline=told)
        kept = _intact(directory, rows, alone=shard is None)
        if run.done and len(kept) < len(items):
            run.reopen()
        todo = [(prompt, sample) for prompt, sample in mine if clip_id(prompt.id, sample) not in kept]
        if todo:
            if begun:
                maker.check(asked)
                run.begin()
            if random_weights:
                run.record(weights=RANDOM)
                say("weights: random; what is made of them means nothing")
            run.record(**(facts := maker.facts()))
            with records.appending(rows) as append, Progress(run.run.name, len(mine), done=len(mine) - len(todo)) as progress:
                for tried, clips in maker.make(asked, todo, directory, writer or "alone"):
                    if (now := maker.facts()) != facts:  # a shortcut did not prove itself
                        run.record(**(facts := now))
                    for clip in clips:
                        append(clip)
                    progress.advance(tried)
        if not run.done:
            made = _intact(directory, rows, alone=shard is None) if todo or shard else kept
            run.result |= maker.result(directory, writer or "alone", len(mine)) | {"clips": len(made)}
            run.complete = len(made) == len(items)
    return directory


def _rank(shard: str | None) -> str | None:
    """The shard of this process: the given one, or that of its rank among those that were launched together, each with a GPU of its own.

    Raises:
        UserError: both.
    """
    here = place()
    if here.size == 1:
        return shard
    if shard is not None:
        raise UserError(
            f"--shard {shard}: this is one of {here.size} processes that were launched together, whose ranks are their shards; leave it out"
        )
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(here.local_rank)
    return f"{here.rank + 1}/{here.size}"


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
            option, instead = ("--random-weights", "leave it out") if random_weights else (f"--engine {engine}", "spread it with --shard I/N")
            raise UserError(f"{option}: '{baseline}' is run by its authors' code in a process of its own, by its own weights; {instead}")
        from rfbench import external

        return external.prepare(baseline, overrides, name=name)
    ready = baselines.prepare(baseline, overrides, name=name, random_weights=random_weights, reduced=True)
    return Native(dataclasses.replace(ready, name=f"{ready.name}-{RANDOM}") if random_weights else ready, engine, workers)


@dataclass
class Native:
    """A baseline that runs here, or in the workers of a cluster; its model is opened when it is first needed, and torch imported."""

    ready: Prepared
    engine: fleet.Engine = "here"
    workers: int | None = None
    backbone: Backbone | None = None
    left_out: dict[str, str] = field(default_factory=dict)  # shortcuts that did not prove themselves where clips were made

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
        from rfbench import filming

        self.facts()  # so that what rfbench.toml asks for in vain comes out as well
        if self.engine == "here":
            self.backbone = filming.open_model(self.ready, asked)

    def facts(self) -> dict[str, Any]:
        from rfbench import filming

        found = filming.facts(self.ready)
        found["shortcuts"] = [name for name in found["shortcuts"] if name not in self.left_out]
        return found | ({"left_out": dict(self.left_out)} if self.left_out else {})

    def make(self, asked: Suite, todo: Sequence[Item], directory: Path, writer: str) -> Iterator[tuple[int, Sequence[Clip]]]:
        from rfbench import filming

        latents = self.ready.latents(self.frames(asked), f"suite '{asked.name}'")
        batches = filming.batches(self.ready.blank, self.cfg.sampler, latents, todo)
        opener = functools.partial(filming.filming, self.ready, asked, latents, directory.resolve(), self.backbone)
        made = fleet.spread(opener, batches, self.workers) if self.engine == "ray" else map(opener(), batches)
        for clips, left_out in made:
            self.left_out |= left_out
            yield len(clips), clips

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
    records.refuse_unwritable(out, f"--out {out}")
    if config.is_external(baseline):
        from rfbench import external

        if then or given is not None:
            option = "--then" if then else "--from"
            raise UserError(f"{option}: '{baseline}' is run by its authors' code, which makes a clip of one prompt alone; leave it out")
        return external.sample(external.prepare(baseline, overrides), prompt, seed=seed, frames=frames, out=out)
    from rfbench import filming

    ready = baselines.prepare(baseline, overrides)
    return filming.sample(ready, prompt, then=then, given=given, seed=seed, frames=frames or FRAMES, out=out)


def _intact(directory: Path, own: Path, *, alone: bool) -> set[str]:
    """The ids of the clips whose video is the one that its row tells of. Rows of others go from `own`, as do those that are out of order.

    A lone writer takes the rows of all files into its own; the writer of a shard leaves the others' alone. No row is held in
    memory, unless some have to be written anew.

    Raises:
        UserError: a video that another writer made is gone or altered (code 1).
    """
    files = records.clip_files(directory)
    mine = [path for path in files if alone or path == own]
    tidy, found = mine in ([], [own]), set[str]()
    with records.checking(directory) as is_whole:
        for path in files:
            is_own, last = path == own, (-1, -1)
            for clip in records.each_row(path, Clip):
                at = (clip.prompt_id, clip.sample)
                if is_whole(clip):
                    found.add(clip.id)
                    tidy, last = tidy and (last < at or not is_own), at
                elif is_own or alone:
                    tidy = False
                else:
                    raise UserError(f"a video that {path} tells of is gone or was altered; run this again without --shard", code=1)
    if not tidy:
        rows = {clip.id: clip for path in mine for clip in records.intact(directory, records.each_row(path, Clip))}
        records.write_rows(own, sorted(rows.values(), key=lambda clip: (clip.prompt_id, clip.sample)))
        for path in mine:
            if path != own:
                path.unlink()
    return found
