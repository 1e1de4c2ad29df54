"""Any metric of a scorer as a reward: `motion.speed` in a recipe is what `rfbench eval` would say of the same clips."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from rfbench import video
from rfbench.errors import UserError, did_you_mean
from rfbench.records import Clip, sha256_of
from rfbench.registry import pick
from rfbench.reward import Reward
from rfbench.scorers.base import SCORERS, Comparing, Scorer
from rfbench.suites import clip_id


def scorer_of(name: str) -> Scorer:
    """The scorer of a metric that is called `scorer.metric`.

    Raises:
        UserError: there is no such scorer or metric, or its numbers are not of a clip alone.
    """
    of, _, metric = name.partition(".")
    scorer: Scorer = pick(SCORERS, of, what="scorer")
    if metric not in scorer.metrics:
        raise UserError(f"reward '{name}': scorer '{of}' has no metric '{metric}'{did_you_mean(metric, scorer.metrics)}")
    if isinstance(scorer, Comparing) or scorer.together:
        raise UserError(f"reward '{name}': scorer '{of}' compares clips with others, and a reward is of one clip; take another")
    return scorer


def scored(name: str, fps: int) -> Reward:
    """A reward [B] by a scorer: clips are written as files, scored, and forgotten. What is better when lower counts negative.

    A metric of segments counts with the mean over a clip's. A scorer opens its network for every batch; `videoreward_mq` keeps its own.

    Raises:
        UserError: as of `scorer_of`; the reward, with code 1: the scorer refuses a clip or says nothing of it.
    """
    scorer, metric = scorer_of(name), name.partition(".")[2]
    sign = 1 if scorer.metrics[metric].higher_is_better else -1

    def reward(pixel_BTCHW: Tensor, prompts: list[str]) -> Tensor:
        with tempfile.TemporaryDirectory(prefix="rfbench-reward-") as folder:
            clips = [_written(Path(folder), number, frames, prompts[number], fps) for number, frames in enumerate(video.as_uint8(pixel_BTCHW))]
            values: dict[str, list[float]] = {clip.id: [] for clip in clips}
            for answer in scorer.score(clips, Path(folder)):
                if answer.refused is not None:
                    raise UserError(f"reward '{name}': {answer.refused}", code=1)
                values[answer.clip] += [row.value for row in answer.rows if row.metric == metric]
        if silent := [clip for clip, found in values.items() if not found]:
            raise UserError(f"reward '{name}': the scorer says nothing of clip {silent[0]}", code=1)
        return torch.tensor([sign * sum(found) / len(found) for found in values.values()], dtype=torch.float64)

    return reward


def _written(folder: Path, number: int, frame_THWC: Tensor, prompt: str, fps: int) -> Clip:
    """A clip as `generate` writes it; its frames are bytes."""
    frames, height, width, _ = frame_THWC.shape
    file = f"{number}.mp4"
    with video.writing(folder / file, fps=fps, height=height, width=width) as write:
        write(frame_THWC.cpu().numpy())
    return Clip(clip_id(number, 0), number, 0, prompt, prompt, 0, frames, fps, height, width, file, sha256_of(folder / file))
