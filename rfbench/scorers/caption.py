"""Whether the clip shows what its caption says: colour, shape, direction, speed and the change after "then".

Each part is judged only where the caption fixes it, so a metric may have fewer rows than there are clips; `caption_agreement`
has one for every clip. Frames without a sprite agree with nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rfbench.records import Clip, Score
from rfbench.scorers.base import Metric
from rfbench.scorers.sprite import SpriteScorer, Track
from rfbench.world import CHANGE_FRAME, COLOURS, DIRECTIONS, SHAPES, SPEEDS, parse

STILL = 0.02  # pixels per frame below which a direction cannot be told: 1.6 pixels in a 5 s clip
TOLERANCE = 0.1  # the world's own spread of a named speed
FAR = SPEEDS["quickly"] / SPEEDS["slowly"]  # factor at which a speed agrees no longer


def direction_agreement(track: Track, frames: slice, direction: str) -> float:
    """Share of the way that is made in the asked direction, in [0, 1]; less where hardly any way is made at all."""
    along = track.path.velocity[frames] @ np.asarray(DIRECTIONS[direction])
    way = track.path.speed[frames]
    return float(np.maximum(along, 0).sum() / max(way.sum(), STILL * len(way)))


def speed_agreement(track: Track, frames: slice, speed: str) -> float:
    """1 within TOLERANCE of the named speed, falling with the logarithm of the ratio to 0 at a factor of FAR."""
    measured = max(float(track.path.speed[frames].mean()), 1e-6)
    off = abs(np.log(measured / SPEEDS[speed]))
    free = np.log(1 + TOLERANCE)
    return float(np.clip((np.log(FAR) - off) / (np.log(FAR) - free), 0, 1))


def agreements(track: Track, prompt: str) -> dict[str, float]:
    """Part -> agreement in [0, 1], for the parts that the caption fixes and that the clip is long enough to show.

    Raises:
        UserError: the prompt is not a sentence of the toy world.
    """
    caption = parse(prompt)
    whole, before, after = slice(0, None), slice(0, CHANGE_FRAME - 1), slice(CHANGE_FRAME, None)  # the frame between lies on both pieces
    parts = {
        "colour": float(np.mean(track.colour == list(COLOURS).index(caption.colour))),
        "shape": float(np.mean(track.shape == SHAPES.index(caption.shape))),
    }
    if caption.direction:
        parts["direction"] = direction_agreement(track, before if caption.then_direction else whole, caption.direction)
    if caption.speed:
        parts["speed"] = speed_agreement(track, before if caption.then_speed else whole, caption.speed)
    if len(track.colour) > CHANGE_FRAME:
        if caption.then_direction:
            parts["change"] = direction_agreement(track, after, caption.then_direction)
        if caption.then_speed:
            parts["change"] = speed_agreement(track, after, caption.then_speed)
    return parts


def measure(clip: Clip, track: Track) -> Iterator[Score]:
    """Rows of one clip: the parts, then their mean."""
    parts = agreements(track, clip.prompt)
    for part, value in parts.items():
        yield Score(clip.id, f"{part}_agreement", 100 * value)
    yield Score(clip.id, "caption_agreement", 100 * sum(parts.values()) / len(parts))


SCORER = SpriteScorer(
    name="caption",
    version="1",
    metrics={
        "caption_agreement": Metric(True, "%", "Mean of the agreements below over the parts that the caption fixes."),
        "colour_agreement": Metric(True, "%", "Frames in which the sprite's hue is nearest to the asked colour."),
        "shape_agreement": Metric(True, "%", "Frames in which the asked shape fits the sprite best."),
        "direction_agreement": Metric(True, "%", "Share of the way that is made in the asked direction (before a 'then')."),
        "speed_agreement": Metric(
            True, "%", "Nearness to the asked speed: 100 within a tenth of it, 0 where it is as far off as slow is from quick."
        ),
        "change_agreement": Metric(True, "%", "The same for the direction or speed asked after 'then'."),
    },
    measure=measure,
)
