"""VideoReward's verdict on each clip: visual quality, motion quality and text alignment, as the public code gives them for a file.

It sees 2 frames per second and was trained on clips of a few seconds. Re-DMD optimises its motion quality: baselines that saw it say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rfbench.errors import UserError
from rfbench.records import Clip, Score
from rfbench.scorers.base import Metric, read_video
from rfbench.videoreward import model
from rfbench.videoreward.frames import as_file, token_count
from rfbench.weights import sha256_of

TOKENS = 16384  # of video in a batch, padding included: about a dozen clips of 5 s


class VideoRewardScorer:
    """The published model from the weights directory, on a GPU if there is one."""

    name = "videoreward"
    metrics: Mapping[str, Metric] = {
        "VQ": Metric(True, "sd", "VideoReward's visual quality; 0 is the mean and 1 the spread on the data that it was trained with."),
        "MQ": Metric(True, "sd", "VideoReward's motion quality, on the same scale."),
        "TA": Metric(True, "sd", "VideoReward's alignment of video and prompt, on the same scale."),
        "overall": Metric(True, "sd", "Sum of the three."),
    }

    @property
    def version(self) -> str:
        """With the sha256 of the weights: other weights are another judge.

        Raises:
            UserError: they are missing.
        """
        _, weights, _ = model.files()
        return f"1-{sha256_of([weights])[:12]}"

    def score(self, clips: list[Clip], out: Path) -> Iterator[Score]:
        """Four rows for every clip.

        Raises:
            UserError: the model's files are missing or not its own; a prompt has one of its special tokens. With code 1: a video is
                missing, altered or cannot be decoded, or has a single frame or an impossible shape.
        """
        judge = model.load(device="cuda" if torch.cuda.is_available() else "cpu")
        for batch in batches((clip, shown(clip, out, judge.about)) for clip in clips):
            scores_B3 = judge.score([frame_TCHW for _, frame_TCHW in batch], [clip.prompt for clip, _ in batch])
            for (clip, _), values in zip(batch, scores_B3.tolist(), strict=True):
                yield from (Score(clip.id, axis, value) for axis, value in zip(model.AXES, values, strict=True))
                yield Score(clip.id, "overall", sum(values))


def shown(clip: Clip, out: Path, about: model.About) -> Tensor:
    """The frames of a clip that the model is shown: float [T, 3, H, W] of 0 to 255."""
    pixels = read_video(out, clip)
    try:
        return as_file(torch.from_numpy(pixels).permute(0, 3, 1, 2), video_fps=clip.fps, fps=about.fps, most=about.max_pixels)
    except UserError as error:
        raise UserError(f"clip {clip.id}: {error}", code=error.code) from None


def batches(clips: Iterable[tuple[Clip, Tensor]]) -> Iterator[list[tuple[Clip, Tensor]]]:
    """Clips in their order, as many at a time as TOKENS has room for; a longer one is alone."""
    batch: list[tuple[Clip, Tensor]] = []
    longest = 0
    for clip, frame_TCHW in clips:
        longest = max(longest, token_count(*frame_TCHW.shape))
        if batch and longest * (len(batch) + 1) > TOKENS:
            yield batch
            batch, longest = [], token_count(*frame_TCHW.shape)
        batch.append((clip, frame_TCHW))
    if batch:
        yield batch


SCORER = VideoRewardScorer()
