"""How much the sprite moves, and how smoothly: the pixel counterparts of VBench's dynamic degree and motion smoothness.

A frozen clip is perfectly smooth and not dynamic at all; a jittering or jumping one is neither smooth nor, for that, dynamic.
Frames in which no sprite can be followed count as still, steps from or to a frame without one as not smooth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from rfbench.records import Clip, Score
from rfbench.scorers.base import Metric, segments
from rfbench.scorers.sprite import SpriteScorer, Track
from rfbench.scorers.trajectory import Trajectory
from rfbench.world import SPEEDS

DYNAMIC_SHARE = 0.25  # of the clip's frames must be fast; VBench asks for 4 in 16
DYNAMIC_SPEED = math.sqrt(SPEEDS["slowly"] * SPEEDS["quickly"])  # pixels per frame: clearly faster than slow, as the world says it
LATENT_FRAMES = 4  # the toy autoencoder makes all motion stutter with this period, the faster the more; moves over it are free of that
HALF_SMOOTH = 0.5  # pixels by which a move may be off before it counts as half smooth


def smoothness(path: Trajectory) -> float:
    """Mean of 1 / (1 + (surprise / scale)^4) over moves of one latent's span, times the same over single steps: [0, 1].

    Single steps are there for what the longer moves cannot see, such as a sprite that flips between two places; they may be
    off by twice the sprite's own step. A clean change of direction costs nothing, a move without a sprite all it has.
    """
    span = min(LATENT_FRAMES, len(path.xy) - 1)
    twice = path.speed[1:] + path.speed[:-1]
    moves = path.followed(span) / (1 + (path.surprise(span) / HALF_SMOOTH) ** 4)
    steps = path.followed(1) / (1 + (path.surprise(1) / np.hypot(HALF_SMOOTH, twice)) ** 4)
    return float(moves.mean() * steps.mean())


def measure(clip: Clip, track: Track) -> Iterator[Score]:
    """Rows of one clip; `speed` also per segment of two seconds."""
    speed = track.path.speed
    fast = np.mean(speed >= DYNAMIC_SPEED)
    yield Score(clip.id, "dynamic_degree", 100.0 if fast >= DYNAMIC_SHARE else 0.0)
    yield Score(clip.id, "speed", float(speed.mean()))
    yield Score(clip.id, "motion_smoothness", 100 * smoothness(track.path))
    for k, piece in enumerate(segments(clip.frames, clip.fps)):
        yield Score(clip.id, "speed", float(speed[piece].mean()), segment=k)


SCORER = SpriteScorer(
    name="motion",
    version="1",
    metrics={
        "dynamic_degree": Metric(True, "%", "Clips that are clearly faster than slow in a quarter of their frames or more."),
        "speed": Metric(True, "px/frame", "Mean speed of the sprite along its path; jitter and jumps do not count."),
        "motion_smoothness": Metric(True, "%", "Steps that follow the sprite's own velocity; a frozen clip has 100."),
    },
    measure=measure,
)
