"""Contenders that their authors' code runs: clips through a runner file in another interpreter, held to what they say of themselves.

    <run>/work/<writer>/{job.json, log.txt}    see rfbench.processes
    <run>/times.<writer>.jsonl                 a ClipTime per clip
    <run>/failed.<writer>.jsonl                a Failed for each time that a clip could not be made; the last one counts, until the clip is made

A runner hands over raw frames, so every system's videos are encoded alike; only frames of the right number and size become one.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from rfbench import baselines, config, envs, processes, provenance, records, strict, timing, video
from rfbench.config import External
from rfbench.errors import AGAIN, UserError
from rfbench.processes import Outcome, Program
from rfbench.progress import say
from rfbench.records import Clip
from rfbench.suites import Item, Prompt, Suite, clip_id, clip_seed
from rfbench.weight_files import commits, identity, resolve

Pixels = npt.NDArray[np.uint8]
RUNNERS = Path(__file__).parent / "runners"
SHORT_S = 81 / 16  # the short class of clips, to which every system brings its own length
TOLD = (
    "title",
    "weights",
    "parts",
    "license",
    "paper",
    "code",
    "saw",
    "startup_s",
    "clip_s",
    "takes_s",
    "takes_by",
)  # of a baseline, what no video depends on


@dataclass(frozen=True)
class ClipTime:
    """How long a clip took over there, once the model was in memory."""

    clip: str
    frames: int
    seconds: float  # from the prompt to the last frame on the host
    stamps: tuple[tuple[float, int], ...]  # seconds at which so many further frames were on the host; one stamp: only the whole clip could be timed
    peak_bytes: int | None  # most memory that was allocated on the GPU


@dataclass(frozen=True)
class Failed:
    """A clip that could not be made."""

    clip: str
    error: str
    log: str  # the last lines that were printed meanwhile
    at: str


@dataclass(frozen=True)
class Ready:
    """An external contender whose environment is built and whose weights were found."""

    name: str
    cfg: External
    program: Program
    sha256: dict[str, str]  # of the weights, by role
    environment: str  # its definition
    origin: Mapping[str, Any] = field(default_factory=dict)  # `weight_files.commits` of the weights, for the record

    @property
    def fps(self) -> int:
        """Frames per second of what it makes."""
        return self.cfg.fps

    def frames(self, asked: Suite) -> int:
        """Of a clip of the suite, see `frames_of`."""
        return frames_of(self.cfg, asked, self.name)

    def check(self, asked: Suite) -> None:
        """Its authors' code takes any prompt. torch is there from now on, so that the run's record has the GPU of this machine."""
        baselines.device()

    def facts(self) -> dict[str, Any]:
        """What a run records: the environment that is there, the protocol that is the system's own, the commits of the weights."""
        return {"environment": strict.as_plain(envs.found(self.cfg.env)), "protocol": self.cfg.protocol, **self.origin}

    def make(self, asked: Suite, todo: Sequence[Item], directory: Path, writer: str) -> Iterator[tuple[int, list[Clip]]]:
        """One clip at a time, or none where it failed, see `make`."""
        return ((1, clips) for clips in make(self, asked, todo, directory, writer))

    def result(self, directory: Path, writer: str, mine: int) -> dict[str, Any]:
        """How long clips took.

        Raises:
            UserError: some failed, though everything was tried: a table over the others would be about another suite (code 1).
        """
        failed = failures(directory, writer)
        records.write_rows(directory / f"failed.{writer}.jsonl", failed)
        if failed:
            raise UserError(
                f"{len(failed)} of {mine} clips failed (first {failed[0].clip}: {failed[0].error}); their logs are in "
                f"{directory / f'failed.{writer}.jsonl'}{AGAIN}",
                code=1,
            )
        from rfbench import hardware

        rows = times(directory)
        return {"times": summary(rows) | {"hardware": hardware.name(baselines.device())}} if rows else {}

    def inputs(self) -> dict[str, Any]:
        """What of it is a declared input of a run."""
        plain = {key: value for key, value in strict.as_plain(self.cfg).items() if key not in TOLD}
        weights = {"weights_sha256": self.sha256["weights"], "parts": {role: value for role, value in self.sha256.items() if role != "weights"}}
        return {"baseline": plain, **weights, "environment": self.environment, "runner_sha256": records.sha256_of(self.program.runner)}


def prepare(baseline: str, overrides: Sequence[str] = (), *, name: str | None = None) -> Ready:
    """Read an external contender by name or path, find its environment and its weights.

    Raises:
        UserError: a key is wrong, the runner is none, the environment is not built, or weights are missing or altered.
    """
    baseline = config.whole_name(External, baseline)
    path = config.find(External, baseline)
    cfg: External = strict.build(External, strict.load_plain(path, list(overrides), External), where=baseline)
    runner = RUNNERS / f"{cfg.runner}.py"
    if not runner.is_file():
        raise UserError(f"{baseline}: there is no runner '{cfg.runner}' in {RUNNERS}")
    python = envs.python(cfg.env)
    wanted = {"weights": cfg.weights, **cfg.parts}
    found = {role: resolve(part, path) for role, part in wanted.items()}
    settings: dict[str, Any] = {role: str(place.parent if place.name == "**" else place) for role, place in found.items()}
    settings |= {"source": str(envs.home(cfg.env) / "src"), "steps": list(cfg.steps), "height": cfg.height, "width": cfg.width, "fps": cfg.fps}
    program = Program(python, runner, settings | cfg.settings, cfg.startup_s, cfg.clip_s)
    hashes = {role: identity(place, wanted[role]) for role, place in found.items()}
    origin = commits({role: (wanted[role], place) for role, place in found.items()})
    return Ready(name or config.name_of(baseline), cfg, program, hashes, envs.load(cfg.env)[1], origin)


def frames_of(cfg: External, asked: Suite, name: str) -> int:
    """Frames of a clip for a suite: of the system's own length for a short one, of as many as last as long for a longer one.

    Raises:
        UserError: it makes none that long.
    """
    wanted, seconds = asked.frames_at(cfg.fps), (asked.frames - 1) / asked.fps
    if wanted <= cfg.frames or seconds <= SHORT_S:
        return cfg.frames
    longer = cfg.frames + -(-(wanted - cfg.frames) // cfg.longer) * cfg.longer if cfg.longer else wanted
    if longer > (cfg.most or cfg.frames):
        raise UserError(f"baseline '{name}' makes clips of at most {cfg.most or cfg.frames} frames, but suite '{asked.name}' asks for {wanted}")
    return longer


def sample(ready: Ready, prompt: str, *, seed: int, frames: int | None, out: Path) -> Path:
    """Make one clip as `out`, an .mp4: of the system's own length, or where `frames` ask for more and it can, of theirs.

    Raises:
        UserError: it makes none that long; another kind of file; with code 1: the clip failed.
    """
    if out.suffix != ".mp4":
        raise UserError(f"--out {out}: clips of '{ready.name}' are .mp4 files")
    only = Prompt(0, prompt)
    with tempfile.TemporaryDirectory(prefix="rfbench-") as name:
        folder = Path(name)
        asked = Suite("--frames", frames or ready.cfg.frames, ready.fps, seed, 1, (only,))
        for clips in make(ready, asked, [(only, 0)], folder, "alone", lambda *_: seed, lambda _: None):
            for clip in clips:
                with records.atomic(out) as temporary:
                    shutil.copyfile(folder / clip.file, temporary)
        for failed in failures(folder):
            raise UserError(f"the clip failed: {failed.error}; the last that was printed: {' '.join(failed.log.split())[-300:] or 'nothing'}", code=1)
    return out


def make(
    ready: Ready,
    asked: Suite,
    todo: Sequence[Item],
    directory: Path,
    writer: str,
    seed_of: Callable[[int, int, int], int] = clip_seed,
    tell: Callable[[str], None] = say,
) -> Iterator[list[Clip]]:
    """Make the clips that are to do: for each of them its row, or none if it failed; who failed is told, and is in `failed.<writer>.jsonl`.

    They come in order, but that those which failed when they were last tried come last, so that everything gets its turn.

    Raises:
        UserError: the runner does not start, or fails time after time (code 1); the disk is full (code 1).
    """
    frames = frames_of(ready.cfg, asked, ready.name)
    failed = failures(directory, writer)
    before = {row.clip for row in failed}
    todo = sorted(todo, key=lambda item: clip_id(item[0].id, item[1]) in before)
    if before:
        tell(f"clips that failed before and come last: {len(before)}")
    work = directory / "work" / writer
    items, what = [], {}
    for prompt, sample in todo:
        name = clip_id(prompt.id, sample)
        seed = seed_of(asked.seed, prompt.id, sample)
        items.append({"id": name, "prompt": prompt.given, "seed": seed, "frames": frames, "out": str(work / f".{name}.tmp.npy")})
        size = (frames, ready.fps, ready.cfg.height, ready.cfg.width)
        what[name] = Clip(name, prompt.id, sample, prompt.text, prompt.given, seed, *size, f"videos/{name}.mp4", "")
    records.write_rows(directory / f"failed.{writer}.jsonl", failed)
    with (
        records.appending(directory / f"failed.{writer}.jsonl") as fail,
        records.appending(directory / f"times.{writer}.jsonl") as clock,
    ):
        for outcome in processes.work(ready.program, items, work):
            clip, raw = what[outcome.id], work / f".{outcome.id}.tmp.npy"
            try:
                if outcome.error is not None:
                    raise _NotMadeError(outcome.error)
                pixels = _frames(raw, clip)
                time = _time(outcome, frames)
                _encode(pixels, clip, directory)
            except _NotMadeError as error:
                fail(Failed(outcome.id, str(error), outcome.log, provenance.now()))
                tell(f"clip {outcome.id} failed: {error}")
                yield []
            else:
                clock(time)
                yield [dataclasses.replace(clip, sha256=records.sha256_of(directory / clip.file))]
            finally:
                raw.unlink(missing_ok=True)


class _NotMadeError(Exception):
    """Why a clip is not one."""


def _time(outcome: Outcome, frames: int) -> ClipTime:
    """The row of a clip, as a runner gives it.

    Raises:
        _NotMadeError: it is not of that form.
    """
    row = outcome.row
    try:
        stamps = tuple((float(second), int(count)) for second, count in row["stamps"])
        peak = None if row["peak_bytes"] is None else int(row["peak_bytes"])
    except (TypeError, KeyError, ValueError):
        raise _NotMadeError(f"the runner's row is not one: {str(row)[:100]}") from None
    if sum(count for _, count in stamps) != frames or sorted(stamps) != list(stamps):
        raise _NotMadeError(f"the runner stamped {sum(count for _, count in stamps)} frames of {frames}, or not in order")
    return ClipTime(outcome.id, frames, stamps[-1][0], stamps, peak)


def _frames(raw: Path, clip: Clip) -> Pixels:
    """What a runner left, [T, H, W, 3].

    Raises:
        _NotMadeError: there is nothing, or it is of another number, size or type.
    """
    try:
        frames: Pixels = np.load(raw, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _NotMadeError(f"the runner left no frames ({error})") from None
    wanted = (clip.frames, clip.height, clip.width, 3)
    if frames.shape != wanted or frames.dtype != np.uint8:
        found = f"{frames.shape} of {frames.dtype}"
        raise _NotMadeError(f"the runner made frames {found}, not {wanted} of uint8")
    return frames


def _encode(frames: Pixels, clip: Clip, directory: Path) -> None:
    with video.writing(directory / clip.file, fps=clip.fps, height=clip.height, width=clip.width) as write:
        for first in range(0, clip.frames, 16):
            write(np.asarray(frames[first : first + 16]))


def failures(directory: Path, writer: str = "*") -> list[Failed]:
    """The clips of a run that could not be made when they were last tried; those of one writer, or all."""
    made = {clip.id for clip in records.read_clips(directory)}
    rows = {row.clip: row for path in sorted(directory.glob(f"failed.{writer}.jsonl")) for row in records.read_rows(path, Failed)}
    return [row for row in rows.values() if row.clip not in made]


def times(directory: Path) -> list[ClipTime]:
    """How long the clips of a run took, the latest row of each."""
    rows = [row for path in sorted(directory.glob("times.*.jsonl")) for row in records.read_rows(path, _clip_time)]
    return list({row.clip: row for row in rows}.values())


def _clip_time(**fields: Any) -> ClipTime:
    return ClipTime(**fields | {"stamps": tuple((second, count) for second, count in fields["stamps"])})


def summary(rows: Sequence[ClipTime]) -> dict[str, Any]:
    """Medians over clips, as `rfbench.timing` defines them, but that a clip has the system's own length.

    Where frames were stamped as they came there is the time to the first, and of clips of enough chunks their pace.
    """
    if not rows:
        return {}
    found: dict[str, Any] = {"timed": "whole clips", "clip_fps": median(row.frames / row.seconds for row in rows)}
    if all(len(row.stamps) > 1 for row in rows):
        found |= {"timed": "frames as they come", "ttff_s": median(row.stamps[0][0] for row in rows)}
        paces = [pace for row in rows if (pace := timing.TIMINGS["e2e_fps"].of(_turn(row))) is not None]
        found |= {"e2e_fps": median(paces)} if len(paces) == len(rows) else {}
    peaks = [row.peak_bytes for row in rows if row.peak_bytes is not None]
    return found | ({"peak_memory_bytes": max(peaks)} if peaks else {})


def _turn(row: ClipTime) -> timing.Turn:
    """A clip whose frames were stamped as they came, as a stream of chunks."""
    begun = [0.0, *(second for second, _ in row.stamps)]
    chunks = tuple(timing.Chunk(i, count, begun[i], second, second, None) for i, (second, count) in enumerate(row.stamps))
    return timing.Turn("", 1, (), chunks, None, 0, None, None, None)
