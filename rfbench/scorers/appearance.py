"""Whether a clip keeps the look that it began with: likeness to its first frame, and how far its colours wander. Ours.

Neither is good or bad by itself: motion lowers the likeness, a sunset changes colours. They are there to be compared between systems.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from rfbench.records import Clip, Score
from rfbench.scorers.base import Metric, Pixels, PixelScorer, segments
from rfbench.scorers.similarity import SIDE, ssim

EVERY = 4  # rows and columns of which one is looked at for colours
WHITE = np.array([0.95047, 1.0, 1.08883])  # D65
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])  # from linear sRGB
KINK = 6 / 29


def lab(rgb: Pixels) -> npt.NDArray[np.float64]:
    """CIELAB under D65 of sRGB bytes [..., 3]: lightness of 0 to 100, and two axes of colour in the same unit."""
    level = rgb / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    relative = linear @ TO_XYZ.T / WHITE
    x, y, z = np.moveaxis(np.where(relative > KINK**3, np.cbrt(relative), relative / (3 * KINK**2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def measure(clip: Clip, frames: Pixels) -> Iterator[Score]:
    """Rows of one clip; both also per segment of two seconds."""
    colours = np.stack([lab(frame[::EVERY, ::EVERY]).mean(axis=(0, 1)) for frame in frames])  # [T, 3]
    likeness = np.array([1.0, *(ssim(frames[0], frame) for frame in frames[1:])])
    pieces = segments(clip.frames, clip.fps)
    means = [colours[piece].mean(axis=0) for piece in pieces]
    away = [float(np.linalg.norm(mean - means[0])) for mean in means]
    yield Score(clip.id, "first_frame_similarity", 100 * float(likeness[1:].mean()))
    yield Score(clip.id, "colour_drift", away[-1])
    for k, piece in enumerate(pieces):
        yield Score(clip.id, "first_frame_similarity", 100 * float(likeness[piece].mean()), segment=k)
        yield Score(clip.id, "colour_drift", away[k], segment=k)


SCORER = PixelScorer(
    name="appearance",
    version="1",
    metrics={
        "first_frame_similarity": Metric(
            True, "%", "Structural similarity of the later frames to the first one, of their luma; motion lowers it too."
        ),
        "colour_drift": Metric(False, "dE", "Distance in CIELAB from the mean colour of the first two seconds to that of the last two."),
    },
    measure=measure,
    side=SIDE,
)
