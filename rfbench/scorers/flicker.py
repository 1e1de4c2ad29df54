"""Flicker exactly as VBench's temporal_flickering has it: how little each frame differs from the one before.

VBench means it for videos that should be static (it filters them first): motion lowers it as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rfbench.records import Clip, Score
from rfbench.scorers.base import Metric, Pixels, PixelScorer


def stillness(frames: Pixels) -> float:
    """(255 - mean absolute difference of neighbours) / 255 of uint8 [T, H, W, 3], T >= 2 (vbench 0.1.5, temporal_flickering.py).

    Equal to the last bit: means are taken in float32 and over blue, green, red, as OpenCV hands them out, because the order of a
    float32 sum shows in its last digits.
    """
    steps = np.empty(len(frames) - 1, np.float32)
    before = np.ascontiguousarray(frames[0, ..., ::-1], np.float32)
    for t, frame in enumerate(frames[1:]):
        after = np.ascontiguousarray(frame[..., ::-1], np.float32)
        steps[t] = np.mean(np.abs(before - after))
        before = after
    return (255.0 - float(np.mean(steps))) / 255.0


def measure(clip: Clip, frames: Pixels) -> Iterator[Score]:
    """The one row of a clip."""
    yield Score(clip.id, "temporal_flickering", 100 * stillness(frames))


SCORER = PixelScorer(
    name="flicker",
    version="1",
    metrics={"temporal_flickering": Metric(True, "%", "Sameness of each frame and the next, exactly as VBench defines it; motion lowers it too.")},
    measure=measure,
)
