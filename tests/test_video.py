"""Video files against what went in, read back with another library; the same bytes for the same frames."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import imageio.v3
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from rfbench import video, world
from rfbench.errors import UserError

CAPTION = world.Caption("red", "disc", "left", "quickly")


@pytest.fixture(scope="module")
def frames() -> video.Frames:
    """A clip of the toy world: [33, 48, 64, 3]."""
    _, pixels = world.draw_clips(0, [CAPTION], 33)
    return video.as_uint8(torch.from_numpy(pixels))[0].numpy()


def write(path: Path, *parts: video.Frames, fps: int = 16) -> bytes:
    height, width = parts[0].shape[1:3]
    with video.writing(path, fps=fps, height=height, width=width) as append:
        for part in parts:
            append(part)
    return path.read_bytes()


def test_the_same_frames_give_the_same_bytes_whatever_lies_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    _, drawn = world.draw_clips(0, [world.draw_caption(rng) for _ in range(12)], 81)
    clips = ((drawn + 1) * 127.5 + rng.normal(0, 6, drawn.shape)).clip(0, 255).astype(np.uint8).transpose(0, 1, 3, 4, 2)

    def written() -> list[bytes]:
        paths = [tmp_path / f"{number}.mp4" for number in range(len(clips))]
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(video.writing(path, fps=16, height=48, width=64)) for path in paths]
            for frames in np.moveaxis(clips, 1, 0):
                litter = [rng.bytes(int(rng.integers(2000, 9000))) for _ in range(20)]
                for write, pixels in zip(writers, frames, strict=True):
                    write(pixels[None])
                del litter
        return [path.read_bytes() for path in paths]

    first = written()
    for _ in range(5):
        assert written() == first


def test_bytes_are_the_nearest_to_the_pixels():
    pixels = torch.linspace(-1.3, 1.3, 2 * 3 * 3 * 4 * 5).view(2, 3, 3, 4, 5)
    wanted = np.clip(np.rint((pixels.numpy().astype(np.float64) + 1) / 2 * 255), 0, 255).astype(np.uint8)
    found = video.as_uint8(pixels).numpy()
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.moveaxis(wanted, 2, -1)).max() <= 1
    assert (found == np.moveaxis(wanted, 2, -1)).mean() > 0.99


def test_an_mp4_shows_the_frames_that_went_in(frames, tmp_path):
    write(tmp_path / "clip.mp4", frames)
    shown = imageio.v3.imread(tmp_path / "clip.mp4", plugin="pyav")
    assert shown.shape == frames.shape
    assert np.abs(shown.astype(int) - frames).mean() < 2.0
    assert imageio.v3.immeta(tmp_path / "clip.mp4", plugin="pyav")["fps"] == 16


def test_the_same_frames_are_the_same_bytes_in_whatever_pieces(frames, tmp_path):
    whole = write(tmp_path / "whole.mp4", frames)
    assert write(tmp_path / "pieces.mp4", frames[:9], frames[9:21], frames[21:21], frames[21:]) == whole
    assert write(tmp_path / "again.mp4", frames) == whole
    assert write(tmp_path / "other.mp4", frames[::-1]) != whole


def test_a_gif_has_every_frame_and_about_the_right_pace(frames, tmp_path):
    write(tmp_path / "clip.gif", frames[:20])
    with Image.open(tmp_path / "clip.gif") as picture:
        assert picture.info["duration"] == 60
        assert picture.info["loop"] == 0
        assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - frames[0]).mean() < 3
        assert len(list(ImageSequence.Iterator(picture))) == 20


@pytest.mark.parametrize(
    ("name", "height", "sentence"), [("clip.avi", 48, "be written as '.avi'"), ("clip.mp4", 47, "64x47 pixels cannot be encoded")]
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, name, height, sentence):
    with pytest.raises(UserError, match=sentence), video.writing(tmp_path / name, fps=16, height=height, width=64):
        pytest.fail("the block must not be entered")
    assert not list(tmp_path.iterdir())


def test_a_block_that_fails_leaves_the_old_file(frames, tmp_path):
    path = tmp_path / "clip.mp4"
    before = write(path, frames)
    with pytest.raises(RuntimeError), video.writing(path, fps=16, height=48, width=64) as append:
        append(frames[:5])
        raise RuntimeError
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the full disk: the system call fails in the same place."""
    noise = np.random.default_rng(0).integers(0, 256, (33, 48, 64, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"could not write .*clip\.mp4: File too large; free space") as caught:
            write(tmp_path / "clip.mp4", noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == 1
    assert not list(tmp_path.iterdir())
