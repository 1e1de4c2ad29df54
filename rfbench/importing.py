"""`rfbench import`: videos that were made elsewhere become the clips of a run, so that they are scored like any other.

Files are matched to prompts by VBench's official names, `{prompt}-{i}.mp4` with i from 0, letter by letter. What does not match
is told one by one with what it nearly matches, and nothing is imported: a wrong guess would score a clip against another's text.
"""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from rfbench import config, provenance, records, strict, suites
from rfbench.config import Baseline, License, SamplerCfg, WeightsCfg
from rfbench.errors import UserError, did_you_mean
from rfbench.progress import Progress, say
from rfbench.records import IMPORTED, Clip
from rfbench.settings import settings
from rfbench.suites import Suite, clip_id

UNKNOWN = -1  # seed of a clip that somebody else made


def import_videos(folder: Path, baseline: str, suite: str, *, limit: int | None = None, fresh: bool = False) -> Path:
    """Copy the videos of a folder into a run of `baseline` on `suite`; the run says that they were imported.

    `baseline` is a shipped or written one, whose marks (what it was trained on) then apply, or a new name.

    Returns:
        the run directory.

    Raises:
        UserError: the suite is unknown, files are missing, left over or not named as they should be (each is a line on
            stderr), or a video cannot be decoded (code 1).
    """
    name = config.name_of(baseline)
    records.run_name(name)
    asked = suites.load_suite(suite, limit)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of videos")
    found = matched(folder, asked)
    known = config.names_of(Baseline)
    cfg = config.load(Baseline, baseline) if baseline in known or Path(baseline).is_file() else _unknown(baseline)
    if name not in known:
        say(f"'{name}' is no baseline here (`rfbench list baselines`): nothing is known about what it was trained on")
    hashes = {clip: records.sha256_of(path) for clip, path in found.items()}
    inputs = {
        "baseline": {"title": cfg.title},
        "weights_sha256": IMPORTED,
        "videos_sha256": records.fingerprint(hashes),
        "suite": suites.declared(asked) | {"sha256": suites.suite_sha256(asked)},
    }
    directory = settings().runs / "bench" / name / asked.name
    with provenance.session(directory, "generate", f"{name}/{asked.name}", inputs, fresh=fresh) as run:
        if not run.done:
            run.record(baseline=strict.as_plain(cfg), weights=IMPORTED)
            (directory / "videos").mkdir(exist_ok=True)
            rows, rates = [], set()
            with Progress(run.run.name, len(found)) as progress:
                for prompt, sample in asked.items:
                    clip = clip_id(prompt.id, sample)
                    frames, rate, height, width = measured(found[clip])
                    file = f"videos/{clip}.mp4"
                    with records.atomic(directory / file) as temporary:
                        shutil.copyfile(found[clip], temporary)
                    given = prompt.given  # what the suite asks models to be given
                    video = frames, round(rate), height, width, file, hashes[clip]
                    rows.append(Clip(clip, prompt.id, sample, prompt.text, given, UNKNOWN, *video))
                    rates.add(str(rate))
                    progress.advance()
            records.write_rows(directory / "clips.jsonl", rows)
            run.record(rates=sorted(rates))
            run.result["clips"] = len(rows)
    return directory


def _unknown(name: str) -> Baseline:
    """A baseline of which nothing is known but what it is called."""
    return Baseline(name, IMPORTED, WeightsCfg(IMPORTED), SamplerCfg(1, 1.0, chunk=None), License("", ""))


def matched(folder: Path, asked: Suite) -> dict[str, Path]:
    """Clip id -> its video.

    Raises:
        UserError: not every clip has exactly its video, or there are others; each problem is a line on stderr.
    """
    wanted = {f"{prompt.text}-{sample}.mp4": clip_id(prompt.id, sample) for prompt, sample in asked.items}
    there = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
    problems = list(_problems(wanted, there))
    for problem in problems:
        say(problem)
    if problems:
        raise UserError(f"{folder}: {len(problems)} videos or names do not fit suite '{asked.name}': rename, add or remove what each line above says")
    return {clip: there[name] for name, clip in wanted.items()}


def _problems(wanted: Mapping[str, str], there: Mapping[str, Path]) -> Iterator[str]:
    """A sentence per name that is missing or left over, with what it may have been meant to be."""
    missing, left = [name for name in wanted if name not in there], dict.fromkeys(name for name in there if name not in wanted)
    for name in missing:
        near = [(other, how) for other in left if (how := nearly(name, other))]
        for other, _ in near:
            left.pop(other)
        if len(near) == 1:
            yield f"'{near[0][0]}' is not '{name}': {near[0][1]}; rename it if that is the one"
        elif near:
            yield f"'{name}' is missing, and several files nearly fit: {', '.join(repr(other) for other, _ in near)}"
        else:
            yield f"'{name}' is missing{did_you_mean(name, left)}"
    for other in left:
        yield f"'{other}' is no video of this suite; remove it"


def nearly(name: str, other: str) -> str:
    """How a file's name differs from an official one that may be meant, or nothing if it is another."""
    composed = unicodedata.normalize("NFC", name), unicodedata.normalize("NFC", other)
    if composed[0] == composed[1]:
        return f"its accents are {'composed' if other == composed[1] else 'decomposed'} (Unicode {'NFC' if other == composed[1] else 'NFD'})"
    if composed[0].casefold() == composed[1].casefold():
        return "it differs in upper and lower case"
    (stem, _, ending), (own, _, last) = composed[0].rpartition("-"), composed[1].rpartition("-")
    if ending == last and len(own) >= 8 and stem.casefold().startswith(own.casefold()):
        return f"it is cut off after {len(own)} of {len(stem)} characters"
    plain = ["".join(letter for letter in text.casefold() if letter.isalnum()) for text in composed]
    return "it differs in punctuation or spaces" if plain[0] == plain[1] else ""


def measured(path: Path) -> tuple[int, Fraction, int, int]:
    """Frames, frames per second, height and width of a video, by decoding it.

    Raises:
        UserError: it cannot be decoded (code 1).
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream: Any = container.streams.video[0]
            frames = sum(1 for _ in container.decode(video=0))
            rate = Fraction(stream.average_rate or 0)
            size = stream.height, stream.width
    except (av.error.FFmpegError, IndexError) as error:
        raise UserError(f"{path} is not a video that can be decoded ({error}); get it again", code=1) from None
    if not frames or rate <= 0:
        raise UserError(f"{path} has {frames} frames at {rate} per second; get it again", code=1)
    return frames, rate, *size
