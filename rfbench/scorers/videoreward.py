"""VideoReward's verdict on each clip: visual quality, motion quality and text alignment, as the public code gives them for a file.

It sees 2 frames per second and was trained on clips of a few seconds. Re-DMD optimises its motion quality: baselines that saw it say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rfbench.errors import UserError
from rfbench.records import Clip, Score
from rfbench.scorers.base import Answer, ClipError, Metric, read_video
from rfbench.videoreward import model
from rfbench.videoreward.frames import PAIR, as_file, as_released, token_count
from rfbench.weight_files import sha256_of

TOKENS = 16384  # of video in a batch, padding included: about a dozen clips of 5 s


METRICS = {
    "VQ": Metric(True, "sd", "VideoReward's visual quality; 0 is the mean and 1 the spread on the data that it was trained with."),
    "MQ": Metric(True, "sd", "VideoReward's motion quality, on the same scale."),
    "TA": Metric(True, "sd", "VideoReward's alignment of video and prompt, on the same scale."),
    "overall": Metric(True, "sd", "Sum of the three."),
    "VQ_raw": Metric(True, "", "VideoReward's visual quality as its head gives it."),
    "MQ_raw": Metric(True, "", "VideoReward's motion quality as its head gives it."),
    "TA_raw": Metric(True, "", "VideoReward's alignment of video and prompt as its head gives it."),
}


@dataclass(frozen=True)
class VideoRewardScorer:
    """The published model from the weights directory, on a GPU if there is one, and a way to show it a clip."""

    name: str
    show: Callable[[Tensor, int, model.About], Tensor]  # bytes [T, 3, H, W], frames per second -> float [t, 3, h, w] of 0 to 255
    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)
    together: bool = False

    @property
    def version(self) -> str:
        """With the sha256 of the weights: other weights are another judge.

        Raises:
            UserError: they are missing.
        """
        files = [path for name, path in model.files().items() if name not in (model.ABOUT, model.TOKENIZER)]
        return f"2-{sha256_of(files)[:12]}"

    @property
    def weights(self) -> Mapping[str, str]:
        """Its files; raises UserError if one is missing."""
        return {name: sha256_of([path]) for name, path in model.files().items()}

    def score(self, clips: list[Clip], out: Path) -> Iterator[Answer]:
        """Seven rows for every clip; refused is one whose video is missing, altered, broken or of an impossible shape, or has a
        single frame, or whose prompt has one of the model's special tokens.

        Raises:
            UserError: the model's files are missing or not its own.
        """
        judge = model.load(device="cuda" if torch.cuda.is_available() else "cpu")
        refused: list[Answer] = []

        def shown() -> Iterator[tuple[Clip, Tensor]]:
            for clip in clips:
                try:
                    judge.ids(clip.prompt, 1)
                    yield clip, self.show(torch.from_numpy(read_video(out, clip)).permute(0, 3, 1, 2), clip.fps, judge.about)
                except ClipError as error:
                    refused.append(Answer(clip.id, refused=str(error)))
                except UserError as error:
                    refused.append(Answer(clip.id, refused=f"clip {clip.id}: {error}"))

        for batch in batches(shown()):
            raw_B3 = judge.raw([frame_TCHW for _, frame_TCHW in batch], [clip.prompt for clip, _ in batch])
            for (clip, _), values, raw in zip(batch, judge.normalised(raw_B3).tolist(), raw_B3.tolist(), strict=True):
                named = zip(METRICS, (*values, sum(values), *raw), strict=True)
                yield Answer(clip.id, tuple(Score(clip.id, metric, value) for metric, value in named))
        yield from refused


def native(frame_TCHW: Tensor, video_fps: int, about: model.About) -> Tensor:
    """As the public code reads a file: 2 frames per second, at the clip's own shape."""
    return as_file(frame_TCHW, video_fps=video_fps, fps=about.fps, most=about.max_pixels)


def released(frame_TCHW: Tensor, video_fps: int, about: model.About) -> Tensor:
    """As Reward-Forcing's training shows it: all frames at 336x588, in the range of -255 to 255.

    Raises:
        UserError: the clip has one frame only (code 1).
    """
    if len(frame_TCHW) < PAIR:
        raise UserError(f"VideoReward needs clips of at least {PAIR} frames and this one has {len(frame_TCHW)}; leave it out", code=1)
    return as_released(frame_TCHW / 127.5 - 1)


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


SCORER = VideoRewardScorer("videoreward", native)
RELEASED = VideoRewardScorer("videoreward-as-released", released)
