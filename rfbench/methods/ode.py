"""ODE regression: the causal student learns where the teacher's trajectories end (CausVid; paper section 4).

Shapes: B batch, S trajectory entries, F latent frames, C channels, H and W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfbench.backbones.base import Backbone
from rfbench.backbones.wan.dit import WanDiT
from rfbench.config import Recipe, SamplerCfg
from rfbench.data import Pairs, Prompts, draw_prompts
from rfbench.errors import UserError
from rfbench.methods.base import Batch, Draws, chunk_steps, student_mask
from rfbench.phases import phase
from rfbench.sampler import stream, timesteps
from rfbench.schedule import Schedule, flow_to_x0


class OdeRegression:
    """One pass over the whole clip under a block-causal mask, every chunk at a timestep of its own."""

    def __init__(self, recipe: Recipe, backbone: Backbone, pairs: Pairs) -> None:
        assert isinstance(backbone, nn.Module) and recipe.sampler.chunk is not None
        self.backbone, self.pairs, self.chunk = backbone, pairs, recipe.sampler.chunk
        self.modules: dict[str, nn.Module] = {"generator": backbone.denoiser}
        self.mask_SS = student_mask(recipe, backbone)
        self.frozen: dict[str, WanDiT] = {}
        self.timesteps = torch.tensor([*pairs.timesteps, 0.0], dtype=torch.float64)
        self.schedule = Schedule(recipe.sampler.shift)

    def turns(self, step: int) -> tuple[str, ...]:
        return ("generator",)

    def losses(self, batch: Batch, turns: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        draws = Draws(self.backbone.shape, batch.seeds)
        path, captions = self.pairs.pick(draws)
        index_BF = chunk_steps(draws, path.shape[2], self.chunk, len(self.timesteps) - 1)
        phase("forward")
        text = self.backbone.encode_text(captions).detach()
        path, index_BF, steps = (tensor.to(text.device) for tensor in (path, index_BF, self.timesteps))
        loss, x0 = regression(self.backbone, path, index_BF, text, steps, self.schedule, self.mask_SS)
        return {"generator": loss}, {"loss": (x0 - path[:, -1]).square().flatten(1).mean(1).detach()}


def regression(
    backbone: Backbone, path_BSFCHW: Tensor, index_BF: Tensor, text_BLE: Tensor, timesteps_S: Tensor, schedule: Schedule, mask_SS: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean squared error to the trajectory's end over the frames that are not already there, and the predicted x0."""
    pick = index_BF[:, None, :, None, None, None].expand(-1, 1, -1, *path_BSFCHW.shape[3:])
    noisy = path_BSFCHW.gather(1, pick)[:, 0]
    t_BF = timesteps_S[index_BF]
    flow = backbone.denoiser(noisy, t_BF, text_BLE, mask_SS=mask_SS)
    x0 = flow_to_x0(flow, noisy, schedule.sigma(t_BF))
    wanted = t_BF != 0
    return (x0[wanted] - path_BSFCHW[:, -1][wanted]).square().mean(), x0


def solve(
    teacher: Backbone, student: SamplerCfg, solver: SamplerCfg, *, latents: int, seeds: Sequence[int], prompts: Prompts = draw_prompts
) -> tuple[Tensor, list[str]]:
    """Run the teacher's many-step sampler from one noise per seed and keep what it passes at the student's timesteps.

    Returns:
        trajectories [B, S, F, C, H, W], the clean latents last, and their captions.

    Raises:
        UserError: the solver does not pass a timestep of the student.
    """
    passed, kept = timesteps(solver), timesteps(student)
    numbers = [min(range(len(passed)), key=lambda i: abs(passed[i] - t)) for t in kept]
    if any(abs(passed[number] - t) > 1e-6 * t for number, t in zip(numbers, kept, strict=True)):
        raise UserError(
            f"the ODE solver passes the timesteps {', '.join(f'{t:g}' for t in passed)}, but not all of the student's "
            f"{', '.join(f'{t:g}' for t in kept)}; give 'data.pair_sampler' steps that do"
        )
    captions, seen = prompts(seeds), list[Tensor]()
    with torch.no_grad():
        text = teacher.encode_text(captions)
        null = teacher.encode_text([solver.negative] * len(captions)) if solver.guidance != 1.0 else None
        draws = Draws(teacher.shape, seeds, like=text)
        (chunk,) = stream(teacher, text, latents, solver, draws, null_BLE=null, watch=seen.append)
    return torch.stack([*(seen[number] for number in numbers), chunk.latent_BFCHW], dim=1), captions
