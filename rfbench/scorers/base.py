"""What a scorer is: a program that reads the files of a run and answers for each clip. It never sees the model under test.

A metric is known outside as `<scorer>.<metric>`, e.g. `motion.dynamic_degree`. Shapes: T pixel frames, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from rfbench.errors import UserError
from rfbench.records import Clip, Score, sha256_of

Pixels = npt.NDArray[np.uint8]
SEGMENT_SECONDS = 2  # the paper's supplement S3 cuts long videos into 2 s clips

SCORERS = {
    "motion": "rfbench.scorers.motion:SCORER",
    "subject": "rfbench.scorers.subject:SCORER",
    "caption": "rfbench.scorers.caption:SCORER",
    "drift": "rfbench.scorers.drift:SCORER",
    "flicker": "rfbench.scorers.flicker:SCORER",
    "appearance": "rfbench.scorers.appearance:SCORER",
    "flow": "rfbench.scorers.flow:SCORER",
    "reference": "rfbench.scorers.reference:SCORER",
    "judge": "rfbench.scorers.judge:SCORER",
    "videoreward": "rfbench.scorers.videoreward:SCORER",
    "videoreward-as-released": "rfbench.scorers.videoreward:RELEASED",
    "vbench": "rfbench.scorers.vbench:SCORER",
    "vbench-quality": "rfbench.scorers.vbench:QUALITY",
    "vbench-drift": "rfbench.scorers.vbench:DRIFT_ALONE",
    "vbench-compat": "rfbench.scorers.vbench:COMPAT",
    "vbench-random": "rfbench.scorers.vbench:REHEARSAL",
    "vbench-long": "rfbench.scorers.vbench:LONG",
    "vbench-long-compat": "rfbench.scorers.vbench:LONG_COMPAT",
}
LIGHT = ("motion", "subject", "caption", "drift")  # run when none is named: they need no weights
DRAWN = frozenset({"vbench-random"})  # networks with drawn weights, to see without any download that everything runs: their numbers say nothing


@dataclass(frozen=True)
class Metric:
    """How to read one column of numbers."""

    higher_is_better: bool
    unit: str  # "%" is 0 to 100; "points" are differences of percentages
    text: str  # one sentence for people


@dataclass(frozen=True)
class Answer:
    """What a scorer says of one clip: its rows, all of them, or the reason for which it refuses the clip."""

    clip: str
    rows: tuple[Score, ...] = ()
    refused: str | None = None


class ClipError(UserError):
    """One clip cannot be judged, and the sentence says which and why; the others can."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, code=1)


class Scorer(Protocol):
    """Run directory in, answers out. `version` changes whenever a number could change."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def metrics(self) -> Mapping[str, Metric]: ...

    @property
    def weights(self) -> Mapping[str, str]:
        """Name -> sha256 of each file of weights; part of the record, and of `version`."""
        ...

    @property
    def together(self) -> bool:
        """A clip's rows depend on the clips beside it: then all are scored again when one is."""
        ...

    def score(self, clips: list[Clip], out: Path) -> Iterator[Answer]:
        """An answer for each of `clips`, whose files are relative to the run directory `out`; each is kept as soon as it is there.

        Raises:
            UserError: no clip at all can be judged: weights, a server or a setting are missing.
        """
        ...


@runtime_checkable
class Comparing(Protocol):
    """A scorer that compares a run with another one."""

    def beside(self, run: Path) -> Scorer:
        """The scorer that compares with this run."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """A scorer that can leave out metrics for which something is missing here, and says which."""

    def partly(self) -> Scorer:
        """The scorer that does (`eval --partial`)."""
        ...


@runtime_checkable
class Summarising(Protocol):
    """A scorer whose clips add up to more than means: what it says of all of them stands in the note."""

    @property
    def sparse(self) -> Set[str]:
        """Metrics that may say nothing of a clip although they do of another one of the same prompt."""
        ...

    def summary(self, clips: list[Clip], out: Path, *, partial: bool) -> dict[str, Any]:
        """What the kept answers say together; `partial` where clips are missing. `totals` in it, if there are any, become cells of a report.

        Raises:
            UserError: they say nothing together (code 1).
        """
        ...


def each(clips: Iterable[Clip], judge: Callable[[Clip], Iterable[Score]]) -> Iterator[Answer]:
    """Answers of a scorer that looks at one clip at a time; a clip of which `judge` raises ClipError is refused, and the next one follows."""
    for clip in clips:
        try:
            yield Answer(clip.id, tuple(judge(clip)))
        except ClipError as error:
            yield Answer(clip.id, refused=str(error))


@dataclass(frozen=True)
class PixelScorer:
    """A scorer that needs nothing but the frames of one clip at a time: two or more of them, no less than `side` pixels each way."""

    name: str
    version: str
    metrics: Mapping[str, Metric]
    measure: Callable[[Clip, Pixels], Iterable[Score]]
    side: int = 1
    weights: Mapping[str, str] = field(default_factory=dict)
    together: bool = False

    def score(self, clips: list[Clip], out: Path) -> Iterator[Answer]:
        """An answer for each clip; refused are videos that are missing, altered, broken, too short or too small."""
        return each(clips, lambda clip: self.measure(clip, self._seen(clip, out)))

    def _seen(self, clip: Clip, out: Path) -> Pixels:
        if clip.frames < 2 or min(clip.height, clip.width) < self.side:
            raise ClipError(
                f"clip {clip.id} is {clip.frames} frame(s) of {clip.width}x{clip.height}; "
                f"'{self.name}' needs 2 frames or more, of {self.side} pixels or more each way"
            )
        return read_video(out, clip)


def verify_video(run: Path, clip: Clip) -> Path:
    """The path of a clip's video, once its bytes are those that were recorded.

    Raises:
        ClipError: missing, truncated or altered.
    """
    path = run / clip.file
    again = "delete its line from clips.jsonl and generate it again"
    try:
        found = sha256_of(path)
    except OSError as error:
        raise ClipError(f"clip {clip.id}: {path} cannot be read ({error.strerror}); {again}") from None
    if found != clip.sha256:
        raise ClipError(f"clip {clip.id}: {path} is truncated or was altered (its sha256 is not the recorded one); {again}")
    return path


def check_pace(clip: Clip, path: Path) -> None:
    """That a video's frames come at the pace of its row, without decoding them; what cannot be opened is for the decoder to tell.

    Raises:
        ClipError: they do not, or not throughout.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            unit = float(stream.time_base or 0) * clip.fps
            times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
    except (av.error.FFmpegError, IndexError):
        return
    if any(abs((time - times[0]) * unit - count) > 0.5 for count, time in enumerate(times)):
        raise _unpaced(clip, path)


def _unpaced(clip: Clip, path: Path) -> ClipError:
    return ClipError(f"clip {clip.id}: {path} does not show {clip.fps} frames per second throughout, as its row says")


def read_video(run: Path, clip: Clip) -> Pixels:
    """A clip's frames as RGB: uint8 [T, H, W, 3], exactly as many and as large as its row says.

    Raises:
        ClipError: missing, altered, not decodable, or of another length, size or pace than recorded.
    """
    import av
    from av.video.reformatter import VideoReformatter

    path = verify_video(run, clip)
    frames = np.empty((clip.frames, clip.height, clip.width, 3), np.uint8)
    to_rgb = VideoReformatter()  # one for all frames: asking each frame for its pixels would set up a converter every time
    count, start = 0, 0.0
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                if count == 0:
                    start = frame.time or 0.0
                if (frame.height, frame.width) != (clip.height, clip.width):
                    raise ClipError(f"clip {clip.id}: {path} is {frame.width}x{frame.height}, its row says {clip.width}x{clip.height}")
                if frame.time is not None and abs((frame.time - start) * clip.fps - count) > 0.5:
                    raise _unpaced(clip, path)
                if count < clip.frames:
                    frames[count] = to_rgb.reformat(frame, format="rgb24").to_ndarray()
                count += 1
    except (av.error.FFmpegError, IndexError) as error:  # IndexError: the file has no video stream
        raise ClipError(f"clip {clip.id}: {path} is not a video that can be decoded ({error})") from None
    if count != clip.frames:
        raise ClipError(f"clip {clip.id}: {path} has {count} frames, its row says {clip.frames}")
    return frames


def segments(frames: int, fps: int) -> list[slice]:
    """A clip cut into pieces of two seconds, at least two of them.

    A tail of a second or more is a piece of its own, a shorter one belongs to the last piece; a clip too short for two
    pieces is halved, so that a spread over pieces is defined for every clip of two frames or more.
    """
    length = SEGMENT_SECONDS * fps
    count = max(2, (frames + length // 2) // length)
    cuts = [k * length for k in range(count)] if frames >= length + length // 2 else [0, frames // 2]
    return [slice(begin, end) for begin, end in zip(cuts, [*cuts[1:], frames], strict=True)]
