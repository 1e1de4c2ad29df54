"""Clips that break scorers: each a file as somebody might hand it in, and the row that tells of it, its hash taken of what is there."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from rfbench import world
from rfbench.records import Clip, sha256_of
from tests.filming import pixels, scene_of

FPS = 16
UNREADABLE = ("truncated", "not a video", "empty", "sound", "paced unevenly", "30 frames per second")
READABLE = ("frozen", "black", "one frame", "1x1", "odd", "\u732b na\u00efve clip")
NAMES = (*READABLE, *UNREADABLE)


def encode(path: Path, frames: np.ndarray, *, fps: int = FPS, times: Sequence[int] | None = None) -> None:
    """Lossless, in any size; `times` are those of the frames, in thirds of one."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        stream.codec_context.time_base = Fraction(1, 3 * fps)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = 3 * number if times is None else times[number], Fraction(1, 3 * fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write(run: Path, name: str, number: int) -> Clip:
    """The clip of this name, called `<number>-0`, under `videos/` of a run."""
    path = run / "videos" / f"{name}.mkv"
    moving = pixels(world.render(scene_of("a red disc", seed=number), 33))
    frames = {
        "frozen": np.repeat(moving[:1], 33, axis=0),
        "black": np.zeros_like(moving),
        "one frame": moving[:1],
        "1x1": moving[:, 20:21, 20:21],
        "odd": np.random.default_rng(number).integers(0, 256, (33, 49, 65, 3), np.uint8),
    }.get(name, moving)
    match name:
        case "not a video":
            path.write_text("This is a text.")
        case "empty":
            path.touch()
        case "sound":
            with av.open(str(path), "w", format="matroska") as container:
                stream = container.add_stream("pcm_s16le", rate=8000)
                sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
                sound.sample_rate = 8000
                container.mux(stream.encode(sound))
        case "paced unevenly":
            encode(path, frames, times=[3 * t + 3 * (t > 16) for t in range(33)])
        case "30 frames per second":
            encode(path, frames, fps=30)
        case _:
            encode(path, frames)
    if name == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    count, height, width = frames.shape[:3]
    return Clip(f"{number:04}-0", number, 0, "a red disc", "a red disc", 0, count, FPS, height, width, f"videos/{path.name}", sha256_of(path))
