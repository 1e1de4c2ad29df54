"""Metrics as rewards: what a scorer says of the file of a clip is what the clip is rewarded with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rfbench import video, world
from rfbench.errors import UserError
from rfbench.learning import RewardCfg
from rfbench.reward import origin_of, scored, scorer_of
from tests.filming import draw, pixels, rows_of, save, scene_of

PROMPTS = ["a red triangle moves left quickly", "a blue disc moves down slowly"]


def films(frames: int = 41) -> list[np.ndarray]:
    scenes = [scene_of(prompt) for prompt in PROMPTS]
    return [pixels(draw(scene, scene.positions(frames))) for scene in scenes]


def rewarded(name: str, clips: list[np.ndarray]) -> list[float]:
    shown = torch.from_numpy(np.stack(clips))
    return scored(name, world.FPS)(video.as_pixels(shown), PROMPTS).tolist()


@pytest.mark.parametrize("name", ["motion.speed", "caption.caption_agreement", "drift.imaging_quality"])
def test_a_reward_is_what_the_scorer_says_of_the_file(tmp_path: Path, name: str) -> None:
    clips = films()
    wanted = []
    for number, (clip, prompt) in enumerate(zip(clips, PROMPTS, strict=True)):
        values = [value for metric, _, value in rows_of(save(clip, tmp_path, prompt, name=f"{number:04}-0"), tmp_path) if metric == name]
        wanted.append(sum(values) / len(values))
    assert rewarded(name, clips) == pytest.approx(wanted, rel=1e-12)
    assert wanted[0] != wanted[1] or name != "motion.speed"


def test_the_quicker_clip_is_rewarded_more_and_what_is_better_lower_counts_negative() -> None:
    quick, slow = rewarded("motion.speed", films())
    assert quick > slow
    steady = films(65)
    fading = [np.concatenate([clip[:32], clip[32:] // 2]) for clip in steady]
    for one, other in zip(rewarded("drift.drift", fading), rewarded("drift.drift", steady), strict=True):
        assert one < other <= 0


def test_what_is_no_reward_is_refused() -> None:
    for name, problem in (
        ("motoin.speed", "there is no scorer 'motoin'; did you mean 'motion'"),
        ("motion.sped", "has no metric 'sped'"),
        ("reference.psnr", "compares clips with others"),
    ):
        with pytest.raises(UserError, match=problem):
            scorer_of(name)
    with pytest.raises(UserError, match=r"reward 'motion.speed': clip 0000-0 is 1 frame") as raised:
        rewarded("motion.speed", [clip[:1] for clip in films()])
    assert raised.value.code == 1


def test_who_was_trained_on_a_metric_is_marked_with_what_judges_the_same() -> None:
    for name, marked in (
        ("caption.caption_agreement", ("caption.caption_agreement",)),
        ("motion.speed", ("motion.speed", "motion.dynamic_degree", "motion.motion_smoothness")),
        ("toy_motion", ("reward.toy_motion", "motion.speed", "motion.dynamic_degree", "motion.motion_smoothness")),
        ("own:reward", ("reward.own:reward",)),
    ):
        assert origin_of(RewardCfg(name, beta=0.5)).marked == marked
