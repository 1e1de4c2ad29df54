"""Whether the sprite stays what it was, and whether the clip falls back to its first frame.

The first is VBench's subject consistency with pixels for features. The second is what the paper calls first-frame copying
and does not measure: the first frame's picture comes back where the motion up to then has carried the sprite away.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from rfbench.records import Clip, Score
from rfbench.scorers.base import Metric
from rfbench.scorers.sprite import SpriteScorer, Track

JUMP = 4.0  # pixels by which a step must surprise to be a jump: less leaves the sprite where it was for the most part
UNUSUAL = 4.0  # and how many times more than the clip's median step does: jitter is no jumping
TRACE = 0.1  # share of the first frame's sprite that may be seen in place without being a copy


def consistency(track: Track) -> float:
    """Likeness of each later frame's sprite to that of the first frame and of the frame before, averaged: [0, 1]."""
    return float(np.mean((track.like_first[1:] + track.like_last[1:]) / 2))


def copying(track: Track) -> npt.NDArray[np.float64]:
    """How much of the first frame is seen in place beyond what the motion explains: [T] in [0, 1].

    Where the sprite should be is reckoned from its steps, with its own velocity in place of each jump, until the first
    frame's place is empty again. A sprite that comes round the torus to where it began is where it should be.
    """
    path = track.path
    if not path.visible.any():
        return np.ones(len(path.visible))
    surprise = path.surprise(1)
    jumps = surprise >= max(JUMP, UNUSUAL * float(np.median(surprise)))
    leaps = np.where(jumps[:, None], np.diff(path.xy, axis=0) - path.velocity[:-1], 0.0)
    astray = np.zeros_like(path.xy)
    for t in range(1, len(astray)):
        if track.first_seen[t] >= TRACE:
            astray[t] = astray[t - 1] + leaps[t - 1]
    first = int(np.argmax(path.visible))
    explained = _lookup(track.first_overlap, path.xy - astray - path.xy[first])
    return np.clip((track.first_seen - explained - TRACE) / (1 - TRACE), 0, 1)


def _lookup(table: npt.NDArray[np.float32], shift_xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Bilinear values of a table [H, W] that repeats in both directions at [T, 2] positions (x, y)."""
    low = np.floor(shift_xy).astype(np.int64)
    (fx, fy) = (shift_xy - low).T
    rows, columns = table.shape
    x, y = low.T
    above = table[y % rows, x % columns] * (1 - fx) + table[y % rows, (x + 1) % columns] * fx
    below = table[(y + 1) % rows, x % columns] * (1 - fx) + table[(y + 1) % rows, (x + 1) % columns] * fx
    return above * (1 - fy) + below * fy


def measure(clip: Clip, track: Track) -> Iterator[Score]:
    """Rows of one clip; without any visible sprite consistency is 0 and copying 100, the worst there is."""
    yield Score(clip.id, "subject_consistency", 100 * consistency(track))
    yield Score(clip.id, "first_frame_copying", 100 * float(copying(track).mean()))


SCORER = SpriteScorer(
    name="subject",
    version="1",
    metrics={
        "subject_consistency": Metric(True, "%", "Likeness of the sprite's size, colour and shape to its first frame and to the frame before."),
        "first_frame_copying": Metric(False, "%", "How much of the first frame is seen again, in place, where the motion up to then says otherwise."),
    },
    measure=measure,
)
