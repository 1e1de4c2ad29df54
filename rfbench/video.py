"""Frames to video files, as a stream: the same frames give the same bytes; and back.

Shapes: B batch, T pixel frames, H rows, W columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rfbench.errors import UserError, did_you_mean
from rfbench.records import atomic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rfbench.proof import Kernel, Pair

Frames = npt.NDArray[np.uint8]
Write = Callable[[Frames], None]

CRF = 10  # near lossless: the codec must not hide what a model does


def as_uint8(pixel_BTCHW: Tensor) -> Tensor:
    """Pixels of [-1, 1] as the bytes that a video takes: uint8 [B, T, H, W, 3], on the same device; on the host where `bytes` is switched off."""
    from rfbench import proof
    from rfbench.hardware import kernels, shortcuts

    if shortcuts().bytes is False:
        pixel_BTCHW = pixel_BTCHW.float().cpu()
    pixel_BTHWC = pixel_BTCHW.permute(0, 1, 3, 4, 2)
    device, dtype = pixel_BTCHW.device, pixel_BTCHW.dtype
    if (kernel := proof.kernel("as_uint8", kernels(device), device, dtype, lambda kernel: _trial(kernel, device, dtype))) is not None:
        frames_BTHWC: Tensor = kernel(pixel_BTHWC.contiguous())
        return frames_BTHWC
    return _rounded(pixel_BTHWC)


def _rounded(x: Tensor) -> Tensor:
    return (x * 127.5 + 127.5).round().clamp(0, 255).byte().contiguous()


def _trial(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> Iterator[Pair]:
    from rfbench import proof

    x = proof.drawn(2, 999, seed=0, device=device, dtype=dtype)
    found: Tensor = kernel(x)
    yield found, _rounded(x), found.dtype


def as_pixels(frames_BTHWC: Tensor) -> Tensor:
    """The bytes of a video as pixels in [-1, 1]: float32 [B, T, 3, H, W]."""
    return frames_BTHWC.permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def read(path: Path) -> tuple[Frames, float]:
    """All frames [T, H, W, 3] of a video or an image, and how many are shown per second; an image is one frame.

    Raises:
        UserError: missing, or not a video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            rate = container.streams.video[0].average_rate
    except (av.error.FFmpegError, OSError, IndexError) as error:  # IndexError: no video stream
        raise UserError(f"{path} is not a video or an image that can be read ({error})") from None
    if not frames:
        raise UserError(f"{path} has no frames")
    return np.stack(frames), float(rate or 1)


@contextlib.contextmanager
def writing(path: Path, *, fps: int, height: int, width: int) -> Iterator[Write]:
    """A function that appends frames [T, H, W, 3] to a video, which gets its name only when the block ends well.

    Raises:
        UserError: an ending that is not one of WRITERS, an odd size, or a disk that is full or not writable (code 1).
    """
    if path.suffix not in WRITERS:
        raise UserError(f"{path}: a video cannot be written as '{path.suffix}'{did_you_mean(path.suffix, WRITERS)}")
    if height % 2 or width % 2:
        raise UserError(f"{path}: {width}x{height} pixels cannot be encoded, both must be even")
    with atomic(path) as temporary, WRITERS[path.suffix](temporary, fps, height, width) as write:
        yield write


@contextlib.contextmanager
def _mp4(path: Path, fps: int, height: int, width: int) -> Iterator[Write]:
    """H.264 on one thread and without version strings, because bytes are compared; 4:2:0, because every player shows it.

    No macroblock tree: of small frames it reads memory that nobody wrote, so that now and then a clip comes out as another file.
    """
    import av

    options = {"crf": str(CRF), "preset": "veryfast", "threads": "1", "flags": "+bitexact", "x264-params": "mbtree=0"}
    with av.open(str(path), "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.time_base = Fraction(1, fps)

        def write(frames_THWC: Frames) -> None:
            for pixels in frames_THWC:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))

        yield write
        container.mux(stream.encode())


@contextlib.contextmanager
def _gif(path: Path, fps: int, height: int, width: int) -> Iterator[Write]:
    """An endless animation; its format counts hundredths of a second, so 16 frames per second come out as 16.7."""
    from PIL import Image

    pictures: list[Any] = []
    yield lambda frames_THWC: pictures.extend(Image.fromarray(pixels) for pixels in frames_THWC)
    duration = round(100 / fps) * 10
    pictures[0].save(path, format="gif", save_all=True, append_images=pictures[1:], duration=duration, loop=0)


WRITERS: dict[str, Callable[[Path, int, int, int], contextlib.AbstractContextManager[Write]]] = {".mp4": _mp4, ".gif": _gif}
