"""VBench-Long: a long video is cut into clips, the clips are scored as VBench scores videos, and a video is the mean of its clips.

Source: Vchitect/VBench@45e79ec vbench2_beta_long. Two things are a choice there and have a name here. *How long a clip is*: in its
standard mode each prompt has the longest clip of its dimensions, 10 s for three of them and so for aesthetic and imaging quality
beside them; for videos of one's own it is always 2 s. *Between clips*: with its `--dev_flag`, consistency is half that within clips
and half that of the clips' first frames, by other networks and mapped to the same scale; without, only that within clips.
"""

from __future__ import annotations

import bisect
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rfbench.errors import UserError
from rfbench.vbench.prompts import SAMPLES, Entry

Cut = Literal["longest", "2s"]
SECONDS = {"human_action": 10, "temporal_style": 10, "overall_consistency": 10}  # all others 2
WITHIN = BETWEEN = 0.5  # weights with --dev_flag


def seconds(entry: Entry, known: Iterable[Entry], cut: Cut) -> int:
    """Length of the clips that a video is cut into.

    "longest" looks at every entry with the same text, as VBench-Long does: two prompts of appearance style are there for overall
    consistency too, and are cut into 10 s.
    """
    if cut == "2s":
        return 2
    alike = {name for other in known if other.text == entry.text for name in other.dimensions}
    return max(SECONDS.get(name, 2) for name in alike | set(entry.dimensions))


def segments(frames: int, fps: int, length: int) -> list[tuple[int, int]]:
    """The clips of a video as [begin, end), `fps * length` frames each; a shorter tail takes frames before it, a shorter video is one clip."""
    size = fps * length
    if frames < size:
        return [(0, frames)]
    whole = [(begin, begin + size) for begin in range(0, frames - size + 1, size)]
    return whole if frames % size == 0 else [*whole, (frames - size, frames)]


def mean_of_videos(values: Mapping[str, Sequence[float | None]]) -> tuple[float, int]:
    """A dimension, and how many videos count: the mean over videos of the mean over their clips; clips without a value do not count.

    Raises:
        UserError: no clip of any video has a value (code 1).
    """
    means = [math.fsum(there) / len(there) for one in values.values() if (there := [value for value in one if value is not None])]
    if not means:
        raise UserError(f"none of {len(values)} long videos has a value", code=1)
    return math.fsum(means) / len(means), len(means)


def drift(quality: Sequence[float]) -> float:
    """Sample standard deviation of imaging quality over the M >= 2 clips of a video: sqrt(sum (s - mean)^2 / (M - 1)).

    The paper's supplement S3 prints it without the square, which is zero for every video; its text says standard deviation.
    The drift of a system is the mean over its videos.
    """
    mean = math.fsum(quality) / len(quality)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in quality) / (len(quality) - 1))


def fused(within: float, between: float | None, dimension: str) -> float:
    """Consistency of a video with `--dev_flag`: half that within its clips, half that of their first frames on the scale of the former.

    A video of one clip has nothing between clips. Neither has, in VBench-Long, one whose value maps to 0, and so here.
    """
    there = 0.0 if between is None else mapped(between, dimension)
    return within if there == 0.0 else WITHIN * within + BETWEEN * there


def mapped(between: float, dimension: str) -> float:
    """A similarity of first frames as the similarity within clips that is as frequent: linear between the 101 points of a table."""
    table = _tables()[dimension]
    grid = [index / 100 for index in range(len(table))]
    right = bisect.bisect_left(grid, between)
    if right in (0, len(grid)):
        return table[min(right, len(grid) - 1)]
    share = (between - grid[right - 1]) / (grid[right] - grid[right - 1])
    return table[right - 1] + (table[right] - table[right - 1]) * share


def first_static(clips: Mapping[tuple[int, int, int], bool]) -> set[tuple[int, int, int]]:
    """The clips that temporal flickering is measured on, as (prompt, sample, clip): of each prompt the first five static ones.

    In VBench-Long these are clips of any of the prompt's videos, first by their paths: all of sample 0, of 1, of 10, ...
    """
    kept: dict[int, list[tuple[int, int, int]]] = {}
    for key in sorted(clips, key=lambda key: (key[0], f"{key[1]}/", key[2])):
        several = kept.setdefault(key[0], [])
        if clips[key] and len(several) < SAMPLES:
            several.append(key)
    return {key for several in kept.values() for key in several}


@functools.cache
def _tables() -> dict[str, list[float]]:
    found = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return {name: found[name] for name in ("subject_consistency", "background_consistency")}
