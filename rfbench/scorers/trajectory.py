"""Positions over time, read as a chain of straight pieces.

The world moves along straight lines and may change its velocity at once. So the velocity of a frame is the slope of that
straight line, among those fitted to the windows of one second around it, that fits best: a kink between
two pieces is followed exactly, while jitter and jumps are what no such line explains.

Shapes: T pixel frames. Units: pixels, pixels per frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

WINDOW = 16  # frames of one straight fit: one second
CROOKED = 2.5  # pixels of root mean square misfit from which a window is no straight piece but holds a jump


@dataclass(frozen=True)
class Trajectory:
    """How the sprite moved.

    visible   [T]       there is a sprite
    xy        [T, 2]    position without wrap-around; held where there is no sprite
    velocity  [T, 2]    of the straight piece that a frame lies on; 0 where it lies on none, by jumps or for want of a sprite
    """

    visible: Bools
    xy: Floats
    velocity: Floats

    @property
    def speed(self) -> Floats:
        """[T] in pixels per frame."""
        return np.hypot(self.velocity[:, 0], self.velocity[:, 1])

    def surprise(self, span: int) -> Floats:
        """How far each move over `span` frames is from what the velocities at its two ends allow, any mixture of both: [T - span].

        A move around a kink is such a mixture.
        """
        move = self.xy[span:] - self.xy[:-span]
        start, end = span * self.velocity[:-span], span * self.velocity[span:]
        turn = end - start
        share = ((move - start) * turn).sum(axis=1) / np.maximum((turn**2).sum(axis=1), 1e-12)
        off = move - start - np.clip(share, 0, 1)[:, None] * turn
        return np.hypot(off[:, 0], off[:, 1])

    def followed(self, span: int) -> Bools:
        """Whether there is a sprite in all frames of each such move: [T - span]."""
        return np.asarray(np.lib.stride_tricks.sliding_window_view(self.visible, span + 1).all(axis=1))


def straighten(centre: Floats, visible: Bools, size: tuple[int, int]) -> Trajectory:
    """The path through centres [T, 2] on a torus of `size` (W, H); a step is the shortest way round."""
    count = len(centre)
    latest = np.maximum.accumulate(np.where(visible, np.arange(count), -1))
    held = centre[np.where(latest < 0, np.argmax(visible), latest)]
    half = np.asarray(size) / 2
    step = (np.diff(held, axis=0) + half) % size - half
    xy = held[0] + np.concatenate([np.zeros((1, 2)), np.cumsum(step, axis=0)])

    length = min(WINDOW, count)
    windows = np.lib.stride_tricks.sliding_window_view(xy, length, axis=0)  # [T - length + 1, 2, length]
    clock = np.arange(length) - (length - 1) / 2
    deviation = windows - windows.mean(axis=2, keepdims=True)
    slope = deviation @ clock / (clock @ clock)
    misfit = ((deviation - slope[:, :, None] * clock) ** 2).sum(axis=(1, 2))
    whole = np.lib.stride_tricks.sliding_window_view(visible, length).all(axis=1)
    misfit[~whole | (misfit > length * CROOKED**2)] = np.inf
    edge = np.full(length - 1, np.inf)
    choices = np.lib.stride_tricks.sliding_window_view(np.concatenate([edge, misfit, edge]), length)  # [T, length]
    best = np.arange(count) - (length - 1) + choices.argmin(axis=1)
    known = np.isfinite(choices.min(axis=1))
    velocity = np.where(known[:, None], slope[np.clip(best, 0, len(slope) - 1)], 0.0)
    return Trajectory(visible=visible, xy=xy, velocity=velocity)
