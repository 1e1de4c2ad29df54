"""From a clip's pixels to what VideoReward sees: frames sampled, resized, normalised and cut into patches.

The arithmetic is that of the public code (KwaiVGI/VideoAlign, vision_process.py) and of transformers' Qwen2-VL processors, without
torchvision. Shapes: T frames, H and W rows and columns, N patches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from rfbench.errors import UserError

PATCH = 14  # rows and columns
PAIR = 2  # frames of a patch
CELL = 2  # patches that the network merges into one token, each way
GRAIN = PATCH * CELL  # rows and columns of a token
MIN_PIXELS = 128 * GRAIN**2  # of a frame
MAX_PIXELS = 256 * GRAIN**2  # of a frame, as the published model_config.json says
FEWEST, MOST = 4, 768  # frames
RELEASED_SIZE = (336, 588)  # Reward-Forcing's training resizes every clip to it (D-6)
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)


def sampled_frames(total: int, video_fps: float, fps: float) -> list[int]:
    """Which frames of a clip are looked at: about `fps` per second, an even number, evenly spread from the first to the last.

    Raises:
        UserError: the clip has one frame only.
    """
    if total < PAIR:
        raise UserError(f"VideoReward needs clips of at least {PAIR} frames and this one has {total}; leave it out", code=1)
    most = PAIR * (min(MOST, total) // PAIR)
    count = PAIR * round(min(max(total / video_fps * fps, FEWEST), most) / PAIR)
    frames: list[int] = torch.linspace(0, total - 1, count).round().long().tolist()
    return frames


def fitted_size(height: int, width: int, *, least: int = MIN_PIXELS, most: int = MAX_PIXELS) -> tuple[int, int]:
    """Rows and columns in whole tokens, nearest to the frame's own shape, with `least` to `most` pixels.

    Raises:
        UserError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise UserError(f"VideoReward takes frames whose sides differ by at most 200 times, not {width}x{height}; leave the clip out", code=1)
    rows, columns = (max(GRAIN, GRAIN * round(side / GRAIN)) for side in (height, width))
    if rows * columns > most:
        factor = math.sqrt(height * width / most)
        return GRAIN * math.floor(height / factor / GRAIN), GRAIN * math.floor(width / factor / GRAIN)
    if rows * columns < least:
        factor = math.sqrt(least / (height * width))
        return GRAIN * math.ceil(height * factor / GRAIN), GRAIN * math.ceil(width * factor / GRAIN)
    return rows, columns


def resized(frame_TCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialiasing: float32 [T, 3, *size]. Bytes stay whole numbers of 0 to 255, floats may overshoot their range."""
    found = functional.interpolate(frame_TCHW.float(), size, mode="bicubic", antialias=True)
    return found if frame_TCHW.is_floating_point() else found.clamp(0, 255).round()


def as_file(frame_TCHW: Tensor, *, video_fps: float, fps: float, most: int = MAX_PIXELS) -> Tensor:
    """Frames as the public code reads them from a video file: bytes [T, 3, H, W] -> float32 [t, 3, h, w] of 0 to 255.

    Raises:
        UserError: too few frames, or of an impossible shape (code 1).
    """
    return resized(frame_TCHW[sampled_frames(len(frame_TCHW), video_fps, fps)], fitted_size(*frame_TCHW.shape[-2:], most=most))


def as_released(pixel_TCHW: Tensor) -> Tensor:
    """Frames as Reward-Forcing's training gives them: all of them, at one size, decoded [-1, 1] times 255 (D-5, D-6)."""
    return resized(255 * pixel_TCHW.float(), RELEASED_SIZE)


def token_count(frames: int, channels: int, height: int, width: int) -> int:
    """Tokens that the network makes of so many frames whose sides are whole tokens."""
    return math.ceil(frames / PAIR) * (height // GRAIN) * (width // GRAIN)


def patches(frame_TCHW: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalised patches of frames of 0 to 255 whose sides are whole tokens: [N, 1176], and the grid of frame pairs, rows and columns.

    Patches come in the order pair, row and column of the token, row and column in the token; a patch is channel, frame, row, column.
    Of an odd number of frames the last counts twice.
    """
    mean, std = (torch.tensor(values, device=frame_TCHW.device).view(3, 1, 1) for values in (MEAN, STD))
    frame_TCHW = (frame_TCHW / 255 - mean) / std
    if len(frame_TCHW) % PAIR:
        frame_TCHW = torch.cat([frame_TCHW, frame_TCHW[-1:]])
    grid = (len(frame_TCHW) // PAIR, frame_TCHW.shape[-2] // PATCH, frame_TCHW.shape[-1] // PATCH)
    split = frame_TCHW.unflatten(3, (-1, CELL, PATCH)).unflatten(2, (-1, CELL, PATCH)).unflatten(0, (-1, PAIR))
    pair, frame, channel, row, cell_row, y, column, cell_column, x = range(9)
    ordered = split.permute(pair, row, column, cell_row, cell_column, channel, frame, y, x)
    return ordered.reshape(math.prod(grid), -1), grid
