"""Rewards: one number per clip from its pixels, higher is better. Re-DMD weights a clip by exp(reward / beta).

A recipe names one of `REWARDS`, any metric of a scorer as `scorer.metric`, or a function of one's own as `module:function`:
`origin_of` is where the three are told apart. Shapes: B batch, T pixel frames, H and W pixel rows and columns.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rfbench import video, world
from rfbench.config import RewardCfg
from rfbench.errors import UserError, did_you_mean
from rfbench.records import Clip, sha256_of
from rfbench.registry import pick
from rfbench.scorers.base import SCORERS, Comparing, Scorer
from rfbench.suites import clip_id

if TYPE_CHECKING:
    from rfbench.videoreward.model import VideoReward

Reward = Callable[[Tensor, list[str]], Tensor]  # pixels [B, T, 3, H, W] in [-1, 1], prompts -> [B]
REWARDS: dict[str, str] = {"toy_motion": "rfbench.reward:toy_motion", "videoreward_mq": "rfbench.reward:videoreward_mq"}
# Metrics of the scorers that judge what a reward judges: whoever was trained on it saw them, and their cells are marked.
JUDGED: dict[str, tuple[str, ...]] = {
    "toy_motion": ("motion.speed", "motion.dynamic_degree", "motion.motion_smoothness"),
    "videoreward_mq": ("videoreward.MQ", "videoreward.MQ_raw", "videoreward.overall"),
}
SPEED_UNIT = 0.25  # px per frame that are worth one point: about the mean and the spread of open speeds
JITTER_UNIT = 0.2  # px of mean second difference that cost one point
SPAN = 8  # frames that speed is measured over: what trembles gets nowhere in half a second


@dataclass(frozen=True)
class Origin:
    """What a reward's name stands for."""

    open: Callable[[int], Reward]  # for clips of so many frames per second; a network that it needs is loaded here
    marked: tuple[str, ...]  # metrics whose cells are marked for whoever was trained on it: what judges the same thing is among them
    version: Callable[[], str | None] = lambda: None  # of code that is not in the recipe, which makes it another training
    file: Callable[[], Path] | None = None  # what it reads


def origin_of(cfg: RewardCfg) -> Origin:
    """Tell the three kinds of names apart; nothing is loaded or imported from elsewhere yet.

    Raises:
        UserError: there is no such reward, scorer or metric.
    """
    name = cfg.name
    if ":" in name:
        return Origin(lambda fps: own(name), (f"reward.{name}",), functools.partial(_code_sha256, name))
    if "." in name:
        scorer = scorer_of(name)
        marked = next((metrics for metrics in JUDGED.values() if name in metrics), (name,))
        return Origin(functools.partial(scored, name), marked, lambda: scorer.version)
    found: Reward = pick(REWARDS, name, what="reward")
    marked = (f"reward.{name}", *JUDGED.get(name, ()))
    if name != "videoreward_mq":
        return Origin(lambda fps: found, marked)
    return Origin(functools.partial(_videoreward, cfg), marked, file=_videoreward_file)


def own(name: str) -> Reward:
    """The function that `module:function` names.

    Raises:
        UserError: there is no such module, or no such function in it.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward '{name}' can't be imported ({error}); its folder has to be on PYTHONPATH") from None
    if not callable(found):
        raise UserError(f"reward '{name}' is not a function")
    return found


def _code_sha256(name: str) -> str:
    """Of the file of a `module:function`."""
    own(name)
    spec = importlib.util.find_spec(name.partition(":")[0])
    assert spec is not None and spec.origin is not None
    return sha256_of(Path(spec.origin))


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
    """A scorer's metric as a reward [B], which `rfbench eval` would say of the same clips: they are written as files, scored, and forgotten.

    What is better when lower counts negative. A metric of segments counts with the mean over a clip's. A scorer opens its network
    for every batch; `videoreward_mq` keeps its own.

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


def _videoreward(cfg: RewardCfg, video_fps: int) -> Reward:
    from rfbench.videoreward.model import load

    return functools.partial(videoreward_mq, judge=load(), video_fps=video_fps, input=cfg.input or "correct", fps=cfg.fps)


def _videoreward_file() -> Path:
    from rfbench.videoreward.model import ABOUT, files

    return files()[ABOUT]


def videoreward_mq(
    pixel_BTCHW: Tensor, prompts: list[str], *, judge: VideoReward, video_fps: float, input: Literal["correct", "as_released"], fps: float | None
) -> Tensor:
    """VideoReward's motion quality [B], normalised: mean 0 and spread 1 on the data that it was trained with (paper section 3.3).

    `correct` is what the scorer would say of a file without losses: pixels as bytes, `fps` frames per second, by default VideoReward's
    own 2, at the clip's own shape. `as_released` is what the released training has: pixels of -255 to 255 (D-5), all frames at 336x588
    (D-6), and the first clip's reward for the whole batch (D-7).
    """
    from rfbench.videoreward.frames import as_file, as_released

    judge.network.to(pixel_BTCHW.device)
    if input == "as_released":
        return judge.score([as_released(pixel_BTCHW[0])], prompts[:1])[:, 1].expand(len(prompts))
    bytes_BTCHW = (255 * (pixel_BTCHW.float() + 1) / 2).round().clamp(0, 255).byte()
    rate, most = fps or judge.about.fps, judge.about.max_pixels
    return judge.score([as_file(clip, video_fps=video_fps, fps=rate, most=most) for clip in bytes_BTCHW], prompts)[:, 1]


def centres(pixel_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sprite is and how much of it there is, frame by frame.

    The centre on a torus is the phase of the first Fourier coefficient of what differs from the background.

    Returns:
        [B, T, 2] as (x, y) in pixels, wrapped; [B, T] area in pixels.
    """
    difference = (pixel_BTCHW - (2 * world.BACKGROUND - 1)).abs().amax(2) / 2
    weight = (difference - 0.15).clamp(min=0)  # below: autoencoder residue
    height, width = weight.shape[-2:]
    phases = []
    for marginal, size in ((weight.sum(2), width), (weight.sum(3), height)):
        angle = 2 * math.pi * torch.arange(size, dtype=weight.dtype, device=weight.device) / size
        phases.append(torch.atan2((marginal * angle.sin()).sum(-1), (marginal * angle.cos()).sum(-1)) * size / (2 * math.pi))
    return torch.stack(phases, -1), weight.sum((2, 3)) / 0.6


def toy_motion(pixel_BTCHW: Tensor, prompts: list[str]) -> Tensor:
    """Motion quality in the toy world: fast is good, jitter and a sprite that fades or splits are bad: [B] in [-3, 2].

    Mean speed in units of 0.25 px per frame, up to 3 at any time; less mean second difference of the path in units of 0.2 px,
    up to 1; less twice the relative spread of the area, up to 1; less 1. Speed is the way gained in half a second, times
    its share of the way gone, so that neither trembling nor a jump counts as motion. The limits keep one broken clip from
    having no weight at all, as the published reward's range of about -2 to 2 does. The prompt does not matter, as with its
    motion quality.
    """
    xy, area = centres(pixel_BTCHW.float())
    size = torch.tensor([pixel_BTCHW.shape[-1], pixel_BTCHW.shape[-2]], dtype=xy.dtype, device=xy.device)
    step = torch.remainder(xy.diff(dim=1) + size / 2, size) - size / 2
    spans = step.unfold(1, min(SPAN, step.shape[1]), 1)  # [B, spans, 2, SPAN]
    gained, gone = spans.mean(-1).norm(dim=-1), spans.norm(dim=2).mean(-1)
    speed = (gained.square() / gone.clamp(min=1e-6) / SPEED_UNIT).clamp(max=3).mean(1)
    jitter = step.diff(dim=1).norm(dim=-1).mean(1) / JITTER_UNIT
    unsteady = 2 * area.std(1) / area.mean(1).clamp(min=1.0)
    return speed - jitter.clamp(max=1) - unsteady.clamp(max=1) - 1
