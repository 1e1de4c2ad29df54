"""What a study will cost, told before anything is there: clips, hours, downloads, disk, and what this machine lacks.

Hours are those of making clips, frames over frames per second: as measured by `rfbench profile` or by earlier clips of the
same contender, else as a system's own file has it for its own size (`takes_s`), else as somebody printed it, and each row says which
and on what device. Training, scoring and timing are not in them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from rfbench import baselines, config, external, fetch, hardware, profiling, published, records, strict, studies, suites, timing
from rfbench.baselines import Prepared
from rfbench.config import Baseline, External, Recipe
from rfbench.errors import UserError
from rfbench.items import Item, items_of, items_of_recipe, items_of_scorer, items_of_suite
from rfbench.records import Clip
from rfbench.report import evidence
from rfbench.settings import settings
from rfbench.studies import Member, Plan, Training

BELIEVED = ("own", "independent", "competitor")  # whose printed speed comes first
TIME = re.compile(r"([\d.]+) (minute|GPU hour)s?")  # in what a recipe says that it needs
BITS_PER_PIXEL = 1.0  # of a video, while none of the contender's own is there to go by: near lossless, at the sizes of the table


@dataclass(frozen=True)
class Speed:
    """Frames per second of one device, from the prompt to the last frame, and who says so."""

    fps: float
    device: str
    source: str


@dataclass(frozen=True)
class Cost:
    """One contender on one suite; what is left to do of it."""

    contender: str
    suite: str
    clips: int
    there: int
    frames: int  # of a clip
    fps: float | None  # None: nobody says
    device: str  # that has this speed: as it is called here, or as far as it was printed
    source: str  # of `fps`
    hours: float | None  # of one device
    wall_hours: float | None  # on all devices that were asked about, each with whole clips
    disk_bytes: int
    disk_measured: bool  # from its own clips, not from BITS_PER_PIXEL


@dataclass(frozen=True)
class Download:
    """Files that are not here."""

    repo: str
    file: str
    bytes: int | None  # None: the hub knows
    for_: tuple[str, ...]  # contenders and scorers
    command: str


@dataclass(frozen=True)
class Work:
    """A training that is to do."""

    name: str
    recipe: str
    steps: int
    of: int  # steps of the recipe as it is
    needs: str  # as the recipe says it, but for the time, which is that of the steps


@dataclass(frozen=True)
class Budget:
    """What a study will cost."""

    study: str
    needs: str  # as the study says it
    device: str  # of this machine
    gpus: int
    costs: tuple[Cost, ...]
    trainings: tuple[Work, ...]
    downloads: tuple[Download, ...]
    lacking: tuple[str, ...]  # on this machine, besides the downloads: a sentence each with what to do

    @property
    def hours(self) -> float:
        """Device-hours of what has a speed."""
        return math.fsum(cost.hours or 0.0 for cost in self.costs)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Contenders that are to make clips at a speed that nobody says."""
        return tuple(dict.fromkeys(cost.contender for cost in self.costs if cost.hours is None))

    @property
    def unit(self) -> str:
        """What works for these hours: a GPU, unless all speeds are those of a CPU."""
        known = {cost.device for cost in self.costs if cost.fps is not None}
        return "CPU" if known == {settings().hardware_name("cpu")} else "GPU"

    @property
    def by_contender(self) -> dict[str, float]:
        """Hours on all devices that were asked about, one contender after another; the slowest first."""
        found: dict[str, float] = {}
        for cost in self.costs:
            if cost.wall_hours is not None:
                found[cost.contender] = found.get(cost.contender, 0.0) + cost.wall_hours
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def download_bytes(self) -> int:
        """Of the files whose size is known."""
        return sum(one.bytes or 0 for one in self.downloads)

    def document(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        totals = {"hours": self.hours, "unknown": self.unknown, "wall_hours": self.by_contender, "download_bytes": self.download_bytes}
        totals |= {"disk_bytes": sum(cost.disk_bytes for cost in self.costs)}
        found: dict[str, Any] = strict.as_plain(self) | {"totals": totals}
        return found


def estimate(plan: Plan, gpus: int = 1) -> Budget:
    """What is left to do of a plan, and what that takes on `gpus` devices.

    Raises:
        UserError: a file of this machine that the estimate reads is damaged.
    """
    speeds = _measured()
    systems = {member.name: member.system for member in plan.members}
    costs = tuple(
        _cost(member, (member.system, systems.get(member.timed_as or "")), suite, speeds, gpus) for member in plan.members for suite in member.suites
    )
    runs = settings().runs / "train"
    trainings = tuple(
        _work(training)
        for training in plan.trainings
        if not (runs / training.name / "run.json").exists() or records.read_run(runs / training.name).status != records.DONE
    )
    device = hardware.name(baselines.device())
    return Budget(plan.name, plan.study.needs, device, gpus, costs, trainings, tuple(_downloads(plan)), tuple(studies.lacking(plan, fetched=True)))


def _work(training: Training) -> Work:
    whole, steps = config.load(Recipe, training.recipe).steps, training.cfg.steps

    def shorter(found: re.Match[str]) -> str:
        amount = float(found[1]) * steps / whole
        return f"{amount:.3g} GPU hours" if found[2] == "GPU hour" else lasting(amount / 60)

    needs = training.cfg.needs if steps == whole else TIME.sub(shorter, training.cfg.needs)
    return Work(training.name, training.recipe, steps, whole, needs)


def _cost(member: Member, systems: Sequence[str | None], spelled: str, measured: dict[str, Speed], gpus: int) -> Cost:
    suite, frames = member.suites[spelled], member.frames[spelled]
    directory = settings().runs / "bench" / member.name / suite.name
    clips, there = len(suite.items), records.read_clips(directory)
    left = max(0, clips - len(there))
    speed = _speed(member, systems, frames, directory, measured)
    seconds = frames / speed.fps if speed else None
    size = _size(directory, there)
    height, width = _shape(member)
    each = size if size is not None else frames * height * width * BITS_PER_PIXEL / 8
    return Cost(
        contender=member.name.partition("/")[2] or member.name,
        suite=suite.name,
        clips=clips,
        there=len(there),
        frames=frames,
        fps=speed.fps if speed else None,
        device=speed.device if speed else "",
        source=speed.source if speed else "nobody says",
        hours=0.0 if not left else None if seconds is None else left * seconds / 3600,
        wall_hours=0.0 if not left else None if seconds is None else -(-left // gpus) * seconds / 3600,
        disk_bytes=round(left * each),
        disk_measured=size is not None,
    )


def _shape(member: Member) -> tuple[int, int]:
    """Height and width of a contender's frames."""
    if isinstance(member.cfg, External):
        return member.cfg.height, member.cfg.width
    shape = Prepared(member.name, member.cfg, None).blank.shape
    return shape.pixel_height, shape.pixel_width


def _size(directory: Path, there: Sequence[Clip]) -> float | None:
    """Mean bytes of the clips that are there."""
    sizes = [path.stat().st_size for clip in there if (path := directory / clip.file).is_file()]
    return sum(sizes) / len(sizes) if sizes else None


def _speed(member: Member, systems: Sequence[str | None], frames: int, directory: Path, measured: dict[str, Speed]) -> Speed | None:
    """Measured, here first; else as printed about the first of the systems that something is printed about."""
    if isinstance(member.cfg, External):
        if times := external.times(directory):
            return Speed(external.summary(times)["clip_fps"], hardware.name(baselines.device()), f"measured over {len(times)} clips of this run")
        if seconds := member.cfg.takes_s:
            own = f"{seconds:g} s for its {member.cfg.frames} frames of {member.cfg.width}x{member.cfg.height}"
            return Speed(member.cfg.frames / seconds, _named_device(member.cfg.takes_by), f"{own}, says {member.cfg.takes_by}")
    else:
        metric = "e2e_fps" if frames > timing.CLIP else "clip_fps"  # a long clip is a stream for the most part
        for name in (metric, "clip_fps"):
            if found := measured.get(f"{name} {profiling.same_speed(member.cfg)}"):
                return found
    rows = [row for system in systems for row in sorted(published.about(system), key=lambda row: BELIEVED.index(row.whose)) if row.metric == "fps"]
    size = f"; whether at its own {member.cfg.width}x{member.cfg.height} is not known" if isinstance(member.cfg, External) else ""
    return next((Speed(row.value, _named_device(row.protocol), f"printed by {row.by} ({row.where}); {row.whose}{size}") for row in rows), None)


def _named_device(told: str) -> str:
    """What a speed of somebody else's was measured on, as far as it is told."""
    named = re.search(r"\bone ([A-Z]+\d+)\b", told)
    return named[1] if named else "a GPU"


def _measured() -> dict[str, Speed]:
    """Metric and settings -> speed in a profile that is here or kept as a record: of this machine rather than another, then the latest."""
    own = [path.parent for path in sorted((settings().runs / "profile").rglob("run.json"))]
    kept = sorted((settings().reports / "records" / "profile").rglob("*.json"))
    here = hardware.name(baselines.device())
    found: list[tuple[tuple[bool, str], str, Speed]] = []
    for source in (*own, *kept):
        run = evidence.run_of(source)
        if run.status != records.DONE:
            continue
        machine = run.name.rpartition("/")[2]
        for timed in evidence.read_timings(source).values():
            plain = {"title": "", "weights": {"file": ""}, "license": {"code": "", "weights": ""}} | run.inputs["contenders"][timed.contender][
                "baseline"
            ]
            try:
                cfg: Baseline = strict.build(Baseline, plain, where=str(source))
            except UserError:  # of settings that there are no longer
                continue
            for metric in ("clip_fps", "e2e_fps"):
                if column := timed.columns.get(f"profile.{metric}"):
                    speed = Speed(timing.spread(column).median, machine, "measured by rfbench profile")
                    found.append(((machine == here, run.ended or ""), f"{metric} {profiling.same_speed(cfg)}", speed))
    return {key: speed for _, key, speed in sorted(found, key=lambda entry: entry[0])}


def _downloads(plan: Plan) -> Iterator[Download]:
    """The files that are not in their place, each once."""
    wanted: dict[Item, tuple[dict[str, None], str]] = {}

    def want(items: Sequence[Item], who: str, command: str) -> None:
        for item in items:
            wanted.setdefault(item, ({}, command))[0][who] = None

    for member in plan.members:
        if member.training is None:
            want(items_of(member.cfg), member.name.partition("/")[2], f"rfbench fetch {member.baseline}")
    for training in plan.trainings:
        for item in items_of_recipe(training.cfg):
            which = f"--include '{item.file}'" if item.several else item.file
            want([item], training.name.partition("/")[2], f"hf download {item.repo} {which} --local-dir {settings().weights / item.repo}")
    for suite in dict.fromkeys(name for member in plan.members for name in member.suites):
        want(items_of_suite(suite), suite, f"rfbench fetch {suites.split(suite)[0]}")
    for scorer in plan.study.scorers:
        want(items_of_scorer(scorer), scorer, f"rfbench fetch {scorer}")
    for item, (who, command) in wanted.items():
        if not fetch.right(settings().weights / item.repo, item):
            yield Download(item.repo, item.file, item.bytes, tuple(who), command)


def show(budget: Budget) -> None:
    """The estimate as tables on stderr."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 200)
    table = Table(title=f"what is left of {budget.study}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    several = budget.gpus > 1
    for column in (
        "",
        "suite",
        "clips",
        "there",
        "frames",
        "FPS",
        "time",
        *([f"on {budget.gpus}"] if several else []),
        "disk",
        "FPS is of",
        "says who",
    ):
        table.add_column(column, justify="left" if column in ("", "suite", "FPS is of", "says who") else "right", overflow="fold")
    for cost in budget.costs:
        disk = ("" if cost.disk_measured else "about ") + decimal(cost.disk_bytes)
        numbers = (str(cost.clips), str(cost.there), str(cost.frames), "?" if cost.fps is None else f"{cost.fps:.4g}", lasting(cost.hours))
        wall = [lasting(cost.wall_hours)] if several else []
        table.add_row(cost.contender, cost.suite, *numbers, *wall, disk, cost.device, cost.source)
    console.print(table)
    for line in sentences(budget):
        console.print(line, soft_wrap=True, markup=False)


def sentences(budget: Budget) -> list[str]:
    """What an estimate adds up to."""
    disk, least = decimal(sum(cost.disk_bytes for cost in budget.costs)), "at least " if budget.unknown else ""
    found = [f"making clips takes one {budget.unit} {least}{lasting(budget.hours)}, and {disk} of disk; training, scoring and timing are not in this"]
    if budget.unknown:
        found.append(f"nobody says how fast {', '.join(budget.unknown)} {'is' if len(budget.unknown) == 1 else 'are'}: profile it, or make a clip")
    slowest = budget.by_contender
    if slowest and budget.hours:
        name, hours = next(iter(slowest.items()))
        total = sum(slowest.values())
        on = f"on {budget.gpus} {budget.unit}s (--shard, torchrun or --engine ray)" if budget.gpus > 1 else f"on one {budget.unit}"
        known = " of those whose speed is known" if budget.unknown else ""
        found.append(
            f"{on}, one contender after another: {lasting(total)}; the bottleneck{known} is {name} with {lasting(hours)} ({hours / total:.0%})"
        )
    for one in dict.fromkeys(dataclasses.replace(work, name="") for work in budget.trainings):
        names = [work.name for work in budget.trainings if dataclasses.replace(work, name="") == one]
        steps = f"{one.steps}{'' if one.steps == one.of else f' of {one.of}'} steps of {one.recipe}{', each' if len(names) > 1 else ''}"
        found.append(f"to train: {', '.join(names)}: {steps}: {one.needs or 'what it needs is not stated'}")
    for command in dict.fromkeys(one.command for one in budget.downloads):
        files = [one for one in budget.downloads if one.command == command]
        sizes = ", ".join(f"{one.file} {'of unknown size' if one.bytes is None else decimal(one.bytes)}" for one in files)
        found.append(f"to fetch: {command} ({sizes})")
    if budget.downloads:
        unsized = sum(one.bytes is None for one in budget.downloads)
        found.append(f"to fetch in all: {decimal(budget.download_bytes)}{f' and {unsized} files of unknown size' if unsized else ''}")
    found.append(f"the study needs {budget.needs or 'what it does not state'}; this machine has {_here(budget.device)}")
    return found + [f"missing here: {sentence}" for sentence in budget.lacking]


def _here(device: str) -> str:
    """This machine in words."""
    cores = f"{os.cpu_count()} cores"
    return f"{cores}, no GPU" if device == settings().hardware_name("cpu") else f"{cores}, {device}"


def lasting(hours: float | None) -> str:
    """A time in the unit that people would say it in."""
    if hours is None:
        return "?"
    amount, unit = (hours, "h") if hours >= 1 else (60 * hours, "min") if hours >= 1 / 60 else (3600 * hours, "s")
    return f"{amount:,.0f} {unit}" if amount >= 100 or amount == round(amount) else f"{amount:.2g} {unit}" if amount < 10 else f"{amount:.1f} {unit}"
