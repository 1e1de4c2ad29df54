"""Re-DMD: distribution matching weighted by exp(reward / beta), per clip and without a gradient through the reward
(paper section 3.3). The paper's beta is the inverse of the released code's (D-8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rfbench.backbones.base import Backbone
from rfbench.config import Recipe
from rfbench.errors import UserError
from rfbench.methods.dmd import Dmd
from rfbench.phases import phase
from rfbench.reward import Reward, origin_of


class ReDmd(Dmd):
    """DMD whose clips pull in proportion to how well they move. `reward.normalise` is the trainer's: it knows the whole batch."""

    def __init__(self, recipe: Recipe, student: Backbone, teacher: Backbone, **more: Any) -> None:
        super().__init__(recipe, student, teacher, **more)
        assert recipe.reward is not None
        self.reward_cfg = recipe.reward
        self.reward: Reward = origin_of(recipe.reward).open(student.shape.fps)

    def weights(self, video_BFCHW: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        phase("decode")
        decode = self.student.decoder()
        pixels = torch.cat([decode(frame) for frame in video_BFCHW.split(1, dim=1)], 1)  # all at once takes more memory than all else in this phase
        phase("reward")
        reward_B = self.reward(pixels, prompts).to(video_BFCHW.device, torch.float64)
        if reward_B.shape != (len(prompts),):
            raise UserError(
                f"reward '{self.reward_cfg.name}' gave numbers of shape {list(reward_B.shape)} for {len(prompts)} clips; it takes one for each",
                code=1,
            )
        weight_B = (reward_B / self.reward_cfg.beta).exp()
        if self.reward_cfg.clip is not None:
            weight_B = weight_B.clamp(max=self.reward_cfg.clip)
        return weight_B, {"reward": reward_B, "weight": weight_B}


def effective_share(weight_B: Tensor) -> float:
    """Kish's effective sample size of the weights over their number: 1 when all are equal, 1 / B when one has it all."""
    return float(weight_B.sum() ** 2 / (len(weight_B) * weight_B.square().sum()))
