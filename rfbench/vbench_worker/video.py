"""Frames of a clip, read once by each of VBench's two readers.

VBench reads some dimensions with OpenCV and others with decord. For plain files the two give the same pixels; for files that
are tagged as BT.709 or have ten bits they do not, so that neither stands in for the other. Legend: T frames, H rows, W columns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]


class UnreadableError(Exception):
    """A clip that cannot be scored, in words."""


class Footage:
    """A clip, the frames [begin, end) of one or some (`at`); a reader decodes when it is first asked for, and all dimensions share the result.

    Raises (all methods):
        UnreadableError: not an mp4 file, empty, truncated, or not of the length that was expected.
    """

    def __init__(self, path: Path, begin: int = 0, end: int | None = None, frames: int | None = None, at: Sequence[int] | None = None) -> None:
        self.path, self.begin, self.end, self.expected, self.at = path, begin, end, frames, at
        self.shared: dict[str, Any] = {}  # what dimensions computed from these frames and others may use
        if path.suffix != ".mp4":
            raise UnreadableError(f"{path.name} is not an .mp4 file, which is all that VBench reads")
        if not path.is_file():
            raise UnreadableError(f"{path.name} does not exist")
        if path.stat().st_size == 0:
            raise UnreadableError(f"{path.name} has 0 bytes")

    @functools.cached_property
    def _opencv(self) -> tuple[float, Frames]:
        import cv2

        video = cv2.VideoCapture(str(self.path))
        fps, promised = video.get(cv2.CAP_PROP_FPS), int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        found = []
        while video.isOpened():
            good, frame = video.read()
            if not good:
                break
            found.append(frame)
        video.release()
        if not found:
            raise UnreadableError(f"{self.path.name} is not a video that OpenCV can decode")
        if len({frame.shape for frame in found}) > 1:
            raise UnreadableError(f"{self.path.name} changes its size on the way")
        self._check_length(len(found), promised)
        return fps, np.stack([found[k] for k in self._wanted(len(found))])

    @property
    def fps(self) -> float:
        """Frames per second as the container says, which decides what dynamic degree looks at."""
        return self._opencv[0]

    @property
    def bgr(self) -> Frames:
        """OpenCV's frames as it gives them: [T, H, W, 3]."""
        return self._opencv[1]

    @functools.cached_property
    def rgb(self) -> Frames:
        """OpenCV's frames in the order that networks want."""
        return np.ascontiguousarray(self.bgr[..., ::-1])

    @functools.cached_property
    def decord(self) -> Frames:
        """decord's frames, RGB: [T, H, W, 3]."""
        return self._decord()

    @functools.cached_property
    def decord_384(self) -> Frames:
        """The middle frames of 16 parts as decord scales them to 384 x 384 while it decodes."""
        from rfbench.vbench_worker.rules import middle_frames

        return self._decord(picked=lambda length: middle_frames(length, 16), width=384, height=384)

    def _decord(self, picked: Any = range, **size: int) -> Frames:
        import decord

        try:
            decord.bridge.set_bridge("native")
            reader = decord.VideoReader(str(self.path), num_threads=1, **size)
            inside = self._wanted(len(reader))
            self._check_length(len(reader), len(reader))
            return np.asarray(reader.get_batch([inside[k] for k in picked(len(inside))]).asnumpy())
        except (decord.DECORDError, RuntimeError) as error:
            last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise UnreadableError(f"{self.path.name} is not a video that decord can decode ({last})") from None

    def _wanted(self, length: int) -> Sequence[int]:
        return range(length)[self.begin : self.end] if self.at is None else self.at

    def _check_length(self, length: int, promised: int) -> None:
        wanted = promised if self.expected is None else self.expected
        if length < wanted:
            raise UnreadableError(f"{self.path.name} is truncated: {length} of {wanted} frames can be decoded")
        if length > wanted > 0:
            raise UnreadableError(f"{self.path.name} has {length} frames, {wanted} were expected")
        last = length if self.end is None else self.end
        if not 0 <= self.begin < last <= length:
            raise UnreadableError(f"{self.path.name} has {length} frames, so that there is no segment from {self.begin} to {last}")
