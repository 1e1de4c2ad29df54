"""Score identity distillation (SiD, arXiv:2404.04057) of a streaming student, as Self Forcing has it (guandeh17/Self-Forcing@33593df model/sid.py).

Where DMD moves a clip along the difference of two scores, SiD makes the difference itself small: its gradient goes through both score models.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfbench.methods.dmd import Dmd


class Sid(Dmd):
    """DMD's student, critic and teacher under another loss of the student."""

    def student_loss(
        self, video_BFCHW: Tensor, noise_BFCHW: Tensor, t_B: Tensor, text_BLE: Tensor, mask_BF: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of (real - fake) ((real - video) - alpha (real - fake)) over the mean of |video - real|, of each clip: [B]."""
        assert self.cfg.sid_alpha is not None
        leaf = video_BFCHW.detach().requires_grad_()
        # its own turn is its own loss: nothing of this one may reach its weights, nor may blocks be recomputed later
        self.critic.requires_grad_(False)
        real, fake = self.scores(leaf, noise_BFCHW, t_B, text_BLE)
        error = identity_error(leaf.double(), real.double(), fake.double(), self.cfg.sid_alpha).mean((2, 3, 4))
        loss_B = error.mean(1) if mask_BF is None else (error * mask_BF).sum(1) / mask_BF.sum(1)
        (gradient,) = torch.autograd.grad(loss_B.sum(), leaf)
        self.critic.requires_grad_(True)
        linear_B = ((video_BFCHW - leaf.detach()) * gradient).sum((1, 2, 3, 4))  # 0, with the loss's derivative
        return loss_B.detach() + linear_B, {"score_difference": (real - fake).detach().abs().mean((1, 2, 3, 4))}


def identity_error(video_BFCHW: Tensor, real_BFCHW: Tensor, fake_BFCHW: Tensor, alpha: float) -> Tensor:
    """What SiD makes small, element by element; its scale is a number to autograd."""
    difference = real_BFCHW - fake_BFCHW
    scale = (video_BFCHW - real_BFCHW).detach().abs().mean((1, 2, 3, 4), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return difference * ((real_BFCHW - video_BFCHW) - alpha * difference) / scale
