"""Re-DMD: distribution matching weighted by exp(reward / beta), per clip and without a gradient through the reward
(paper section 3.3). The paper's beta is the inverse of the released code's (D-8)."""

from __future__ import annotations

from torch import Tensor

from rfbench.backbones.base import Backbone
from rfbench.config import Recipe
from rfbench.methods.dmd import Dmd
from rfbench.reward import Reward, reward_of


class ReDmd(Dmd):
    """DMD whose clips pull in proportion to how well they move."""

    def __init__(self, recipe: Recipe, student: Backbone, teacher: Backbone) -> None:
        super().__init__(recipe, student, teacher)
        assert recipe.reward is not None
        self.reward_cfg = recipe.reward
        self.reward: Reward = reward_of(recipe.reward, student.shape.fps)

    def weights(self, video_BFCHW: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        reward_B = self.reward(self.student.decoder()(video_BFCHW), prompts).double()
        weight_B = (reward_B / self.reward_cfg.beta).exp()
        if self.reward_cfg.clip is not None:
            weight_B = weight_B.clamp(max=self.reward_cfg.clip)
        return weight_B, {"reward": reward_B, "weight": weight_B}


def effective_share(weight_B: Tensor) -> float:
    """Kish's effective sample size of the weights over their number: 1 when all are equal, 1 / B when one has it all."""
    return float(weight_B.sum() ** 2 / (len(weight_B) * weight_B.square().sum()))
