"""Imaging quality over time in the toy world: how clean the pictures are, and how far that wanders from one two-second piece to the next.

The paper (supplement S3) takes the spread of VBench's imaging quality over 2 s clips, as `vbench-drift` does. Its printed formula lacks the square
and is identically zero; its text says standard deviation, so this is the sample standard deviation with M - 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from rfbench.records import Clip, Score
from rfbench.scorers.base import Metric, segments
from rfbench.scorers.sprite import SpriteScorer, Track

END_SECONDS = 5  # beginning and end that are compared; the paper's judge looks at the last 5 s
WORST = 100.0  # a clip without any sprite has a steady quality of 0, which must not pass for a clip without drift


def spread(values: npt.ArrayLike) -> float:
    """Sample standard deviation of M >= 2 values: sqrt(sum (s - mean)^2 / (M - 1))."""
    return float(np.std(np.asarray(values, dtype=np.float64), ddof=1))


def measure(clip: Clip, track: Track) -> Iterator[Score]:
    """Rows of one clip; `imaging_quality` also per segment of two seconds."""
    quality = 100 * track.fidelity.astype(np.float64)
    pieces = [float(quality[piece].mean()) for piece in segments(clip.frames, clip.fps)]
    end = min(END_SECONDS * clip.fps, clip.frames // 2)
    seen = bool(track.path.visible.any())
    yield Score(clip.id, "imaging_quality", float(quality.mean()))
    yield Score(clip.id, "drift", spread(pieces) if seen else WORST)
    yield Score(clip.id, "quality_change", float(quality[-end:].mean() - quality[:end].mean()) if seen else -WORST)
    for k, value in enumerate(pieces):
        yield Score(clip.id, "imaging_quality", value, segment=k)


SCORER = SpriteScorer(
    name="drift",
    version="1",
    metrics={
        "imaging_quality": Metric(True, "%", "Nearness to one clean sprite on a clean background; blur, ghosts, noise and fading lower it."),
        "drift": Metric(False, "points", "Standard deviation of imaging quality over the clip's two-second pieces."),
        "quality_change": Metric(True, "points", "Imaging quality of the last five seconds less that of the first five."),
    },
    measure=measure,
    elsewhere="vbench-drift",
)
