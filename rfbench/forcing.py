"""Diffusion forcing: all latent frames of a clip are in work at once, each at a noise level of its own.

Without chunks all frames go in step. With chunks each one runs some steps behind the one before it, so that it is made from
what is already less noisy, and it leaves as soon as it is clean. Given frames that a clip goes on from are in every pass too,
with a little fresh noise each time, and the network is told how much. There is no cache: every pass is over all frames.
Source of the semantics: SkyReels-V2 (arXiv:2504.13074), SkyworkAI/SkyReels-V2@abed76f, re-implemented. As released, chunks see
each other both ways; in diffusers a chunk sees none after it (`causal`). In both the solver remembers the state that a frame's
first step starts from as a view of the latents, which that step then overwrites; so the first correction starts from the state
that it is to correct (`first_state: overwritten`). Later steps remember corrected states, which are tensors of their own.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rfbench.backbones.wan.dit import TextKV, WanDiT, block_causal_mask
from rfbench.config import SamplerCfg
from rfbench.schedule import TABLE, add_noise
from rfbench.transfer import to_device
from rfbench.unipc import UniPC

WAITING = 999.0  # what the network is told of a chunk that has not begun, whatever its first timestep will be


def passes(chunks: int, steps: int, lag: int) -> list[tuple[int, ...]]:
    """The number of the step that each chunk takes in each pass: -1 before it begins, `steps` once it is clean.

    A chunk begins `lag` passes after the one before it, or when that one is clean if it is sooner.
    """
    behind = min(lag, steps)
    turns = steps + (chunks - 1) * behind
    return [tuple(min(max(turn - chunk * behind, -1), steps) for chunk in range(chunks)) for turn in range(turns)]


@torch.no_grad()
def force(
    model: WanDiT,
    texts: Sequence[TextKV],
    latents: int,
    cfg: SamplerCfg,
    noise: Callable[[int], Tensor],
    steps: Sequence[float],
    sigmas: Sequence[float],
    given_BFCHW: Tensor | None,
    tell: Callable[[str], None],
) -> Iterator[Tensor]:
    """The clean chunks of a clip of `latents` frames in order, given ones first: [B, F, C, H, W].

    Args:
        texts: of the prompts, and with guidance also of the unconditional one.
        noise: called once for all frames that are made, then, if `cfg.context_noise` is not 0, for the given ones before every pass.
        given_BFCHW: frames that the clip begins with, whole chunks and not all of it.
        tell: hears "begin", "denoised" and "cached" of each chunk; there is no clean pass, so "cached" takes no time.
    """
    given = [] if given_BFCHW is None else list(given_BFCHW.split(cfg.chunk or given_BFCHW.shape[1], 1))
    held = sum(chunk.shape[1] for chunk in given)
    length = cfg.chunk or latents - held
    work = list(noise(latents - held).split(length, 1))
    solvers, device = [UniPC(sigmas) for _ in work], work[0].device
    timesteps = [*steps, 0.0, WAITING]  # the last one for step -1
    height, width = work[0].shape[-2] // model.cfg.patch[1], work[0].shape[-1] // model.cfg.patch[2]
    mask_SS = block_causal_mask(latents, height * width, length, None, device) if cfg.causal else None
    level = torch.full((1, 1), cfg.context_noise, dtype=torch.float64, device=device)

    tell("begin")
    for chunk in given:
        tell("denoised")
        yield chunk
        tell("cached")
        tell("begin")
    for numbers in passes(len(work), len(steps), cfg.lag or 0):
        seen = given if not cfg.context_noise or given_BFCHW is None else [add_noise(given_BFCHW, noise(held), level)]
        told = [TABLE * cfg.context_noise] * held + [timesteps[number] for number in numbers for _ in range(length)]
        t_BF = to_device(torch.tensor([told], dtype=torch.float64), device)
        flows = [model(torch.cat([*seen, *work], 1), t_BF, text, mask_SS=mask_SS) for text in texts]
        flow = flows[0] if len(flows) == 1 else flows[1] + cfg.guidance * (flows[0] - flows[1])
        for place, (number, part) in enumerate(zip(numbers, flow[:, held:].split(length, 1), strict=True)):
            if not 0 <= number < len(steps):
                continue
            work[place] = solvers[place].step(work[place], part)
            if number == 0 and cfg.first_state == "overwritten":
                solvers[place].before = work[place]
            if number == len(steps) - 1:
                tell("denoised")
                yield work[place]
                if place + 1 < len(work):
                    tell("cached")
                    tell("begin")
