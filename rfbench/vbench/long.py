"""VBench-Long: a long video is cut into clips, the clips are scored as VBench scores videos, and a video is the mean of its clips.

Source: Vchitect/VBench@45e79ec vbench2_beta_long. Two things are a choice there and have a name here. *How long a clip is*: in its
standard mode each prompt has the longest clip of its dimensions, 10 s for three of them and so for aesthetic and imaging quality
beside them; for videos of one's own it is always 2 s. *Between clips*: with its `--dev_flag`, consistency is half that within clips
and half that of the clips' first frames, mapped to the same scale; without, only that within clips. The first frames are looked at by
DINO and CLIP, as there with `--sb_clip2clip_feat_extractor dino --bg_clip2clip_feat_extractor clip`; DINOv2 and DreamSim, its defaults,
are not part of the package `vbench`.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rfbench.errors import UserError
from rfbench.records import atomic
from rfbench.vbench import rows
from rfbench.vbench.prompts import SAMPLES, Entry
from rfbench.vbench.rows import BETWEEN, STATIC, Asked, Row

Cut = Literal["longest", "2s"]
SECONDS = {"human_action": 10, "temporal_style": 10, "overall_consistency": 10}  # all others 2
Groups = dict[tuple[str, int | None], list[float | None]]  # values of clips by the video, or the clip of it, that they belong to
HALF = 0.5  # weight of either with --dev_flag


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


def mean_of_videos(values: Mapping[Any, Sequence[float | None]]) -> tuple[float, int]:
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
    return within if there == 0.0 else HALF * within + HALF * there


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


def dimension(
    name: str,
    asked: Mapping[str, Sequence[Asked]],
    there: Iterable[Row],
    versions: Mapping[str, str],
    *,
    partial: bool = False,
    compat: bool = False,
) -> dict[str, Any]:
    """A dimension of all videos, as a note tells it: the mean over videos of the mean over their clips, in percent.

    The consistencies have `within`, `between` and `fused` beside it. With `compat` they are fused, and a dimension is the mean over all
    clips: there, what a clip belongs to is called by the clip's own path, but for what the static filter lets through.

    Raises:
        UserError: a clip has no row and `partial` was not asked for, or none counts (code 1).
    """
    there = list(there)
    questions = [one for one in asked[name] if one.begin is not None]
    mine = rows.of_version(there, name, versions[name])
    rows.value(name, questions, mine, partial=partial)  # refuses what is missing
    filtered = name == "temporal_flickering" and STATIC in asked
    if filtered:
        verdicts = rows.of_version(there, STATIC, versions[STATIC])
        still = {(one.prompt, one.sample, one.begin or 0): verdicts[one.question].value == 1 for one in asked[STATIC] if one.question in verdicts}
        kept = first_static(still)
        questions = [one for one in questions if (one.prompt, one.sample, one.begin or 0) in kept]
    groups: Groups = {}  # by video, and with `compat` by clip
    for one in questions:
        if one.question in mine:
            groups.setdefault((one.clip, one.begin if compat and not filtered else None), []).append(mine[one.question].value)
    value, _ = mean_of_videos(groups)
    counted = {video for (video, _), values in groups.items() if any(value is not None for value in values)}
    found = {"value": 100 * value, "clips": len(counted), "asked": len({one.clip for one in asked[name]})}
    between = next((key for key, of in BETWEEN.items() if of == name), "")
    if between in asked:
        found |= _fused(name, groups, asked[between], rows.of_version(there, between, versions[between]), partial)
        found["value"] = found["fused" if compat else "within"]
    return found | ({"partial": True} if partial else {})


def _fused(name: str, groups: Groups, asked: Sequence[Asked], there: Mapping[rows.Question, Row], partial: bool) -> dict[str, float]:
    """Consistency within clips, between them and both together, in percent; a video of one clip has nothing between."""
    rows.value(name, asked, there, partial=partial)  # refuses what is missing
    between = {one.clip: there[one.question].value for one in asked if one.question in there}
    silent = {one.clip for one in asked} - between.keys()
    both = [fused(mean_of_videos({key: values})[0], between.get(key[0]), name) for key, values in groups.items() if key[0] not in silent]
    found = {"within": mean_of_videos(groups)[0], "between": _mean([value or 0.0 for value in between.values()]), "fused": _mean(both)}
    return {key: 100 * value for key, value in found.items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def write_part(source: Path, target: Path, begin: int, end: int, fps: int) -> None:
    """Frames [begin, end) of a video as a video of their own, as torchvision's write_video makes it: libx264 at its defaults, 4:2:0."""
    import av

    if not target.exists():
        with av.open(str(source)) as video:
            _write(itertools.islice(video.decode(video=0), begin, end), target, fps)


def write_first_frames(parts: Sequence[Path], target: Path, fps: int) -> Path:
    """The first frame of each video as a video, written likewise; returns `target`."""
    import av

    def first(part: Path) -> Any:
        with av.open(str(part)) as video:
            return next(video.decode(video=0))

    _write(map(first, parts), target, fps)
    return target


def _write(frames: Iterable[Any], target: Path, fps: int) -> None:
    import av

    with atomic(target) as temporary, av.open(str(temporary), "w", format="mp4") as written:
        stream: Any = written.add_stream("libx264", rate=fps)
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            if number == 0:
                stream.width, stream.height = frame.width, frame.height
            written.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")))
        written.mux(stream.encode())


@functools.cache
def _tables() -> dict[str, list[float]]:
    found = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return {name: found[name] for name in ("subject_consistency", "background_consistency")}
