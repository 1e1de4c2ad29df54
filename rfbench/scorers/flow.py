"""How pictures move, by OpenCV's dense optical flow (DIS): a motion measure for any video, without weights. Ours.

VBench's dynamic degree asks RAFT instead, and whether the fastest twentieth of a picture passes a threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rfbench.errors import UserError
from rfbench.records import Clip, Score
from rfbench.scorers.base import Answer, Metric, Pixels, PixelScorer, segments

Floats = npt.NDArray[np.float32]

FASTEST = 0.05  # of a picture's pixels
SIDE = 16  # pixels: the flow is found in patches of 8


def flow_of(before: Pixels, after: Pixels) -> Floats:
    """Where each pixel of a grey picture [H, W] has gone in the next: [H, W, 2] as (x, y) in pixels."""
    import cv2

    still = np.zeros((*before.shape, 2), np.float32)
    return np.asarray(cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(before, after, still))


def unexplained(before: Pixels, after: Pixels, flow: Floats) -> float:
    """Mean absolute difference of two pictures [H, W, 3] once the second is taken back along the flow, where it comes from inside: of 255."""
    import cv2

    rows, columns = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    x, y = columns + flow[..., 0], rows + flow[..., 1]
    inside = (x >= 0) & (x <= columns[0, -1]) & (y >= 0) & (y <= rows[-1, 0])
    if not inside.any():
        return 255.0
    back = cv2.remap(after, x, y, cv2.INTER_LINEAR)
    return float(np.abs(back[inside].astype(np.float32) - before[inside]).mean())


def measure(clip: Clip, frames: Pixels) -> Iterator[Score]:
    """Rows of one clip; `flow` also per segment of two seconds."""
    import cv2

    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    mean, fast, left = [], [], []
    for t in range(len(frames) - 1):
        flow = flow_of(grey[t], grey[t + 1])
        length = np.hypot(flow[..., 0], flow[..., 1]).ravel()
        top = max(1, int(FASTEST * length.size))
        mean.append(float(length.mean()))
        fast.append(float(np.partition(length, -top)[-top:].mean()))
        left.append(unexplained(frames[t], frames[t + 1], flow))
    yield Score(clip.id, "flow", float(np.mean(mean)))
    yield Score(clip.id, "fastest_flow", float(np.mean(fast)))
    yield Score(clip.id, "warping_error", 100 * float(np.mean(left)) / 255)
    steps = np.array([mean[0], *mean])  # of each frame, from the one before
    for k, piece in enumerate(segments(clip.frames, clip.fps)):
        yield Score(clip.id, "flow", float(steps[piece].mean()), segment=k)


METRICS = {
    "flow": Metric(True, "px/frame", "Mean length of OpenCV's DIS optical flow over all pixels and pairs of frames."),
    "fastest_flow": Metric(True, "px/frame", "The same over the fastest twentieth of each picture."),
    "warping_error": Metric(
        False, "%", "What is left of the difference of two frames once the flow is undone; flicker, noise and sudden changes raise it."
    ),
}


@dataclass(frozen=True)
class FlowScorer:
    """Judges each clip alone, by the OpenCV that is installed."""

    name: str = "flow"
    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)
    weights: Mapping[str, str] = field(default_factory=dict)
    together: bool = False

    @property
    def version(self) -> str:
        """With that of OpenCV, whose flow it is.

        Raises:
            UserError: there is none.
        """
        try:
            import cv2
        except ImportError as error:
            raise UserError(f"scorer 'flow' needs OpenCV ({error}): pip install -c constraints.txt opencv-python-headless") from None
        return f"1-opencv-{cv2.__version__}"

    def score(self, clips: list[Clip], out: Path) -> Iterator[Answer]:
        """An answer for each clip; refused are videos that are missing, altered, broken, too short or too small."""
        return PixelScorer(self.name, self.version, METRICS, measure, SIDE).score(clips, out)


SCORER = FlowScorer()
