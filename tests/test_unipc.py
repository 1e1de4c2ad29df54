"""The second-order solver against diffusers' UniPCMultistepScheduler, against an ODE that is solved in closed form, and in the sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rfbench.config import CacheCfg, SamplerCfg
from rfbench.sampler import noise_levels, stream, timesteps
from rfbench.schedule import wan_grid
from rfbench.unipc import UniPC
from tests.tiny import Tiny, distance, normal


def library(sigmas: tuple[float, ...]) -> Any:
    """diffusers' scheduler on a grid of ours."""
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    scheduler.set_timesteps(sigmas=np.array(sigmas))
    return scheduler


def curved(x: Tensor, sigma: float) -> Tensor:
    """A flow without any closed form."""
    return (3 * x).tanh() + torch.sin(7 * x + 5 * sigma)


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 5.0), (3, 3.0), (4, 5.0), (10, 8.0), (50, 5.0)])
def test_a_trajectory_is_that_of_the_library(steps: int, shift: float) -> None:
    _, sigmas = wan_grid(steps, shift)
    solver, theirs, x = UniPC(sigmas), library(sigmas), normal(2, 3, 4, 5, 6)
    y = x
    for sigma, t in zip(sigmas, theirs.timesteps, strict=True):
        x, y = solver.step(x, curved(x, sigma)), theirs.step(curved(y, sigma), t, y, return_dict=False)[0]
        assert distance(x, y) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_the_grid_is_wans(shift: float) -> None:
    """As its scheduler makes it: 1000 alphas, the largest sigma in float32, shifted, timesteps as integers."""
    largest = (1.0 - np.linspace(1, 1 / 1000, 1000)[::-1].copy()).astype(np.float32)[0].item()
    wanted = np.linspace(largest, 0, 51)[:-1]
    wanted = shift * wanted / (1 + (shift - 1) * wanted)
    grid, sigmas = wan_grid(50, shift)
    assert sigmas == pytest.approx(wanted, rel=1e-12)
    assert grid == tuple((wanted * 1000).astype(np.int64))
    assert sigmas[0] < 1


def final(solver: str, steps: int) -> float:
    """Where a step size takes noise of 1 to, if the data are normal with deviation 0.3.

    Such data have the flow (sigma - (1 - sigma) 0.09) x / s(sigma)^2 with s^2 = (1 - sigma)^2 0.09 + sigma^2, and x / s stays as it is.
    """
    _, sigmas = wan_grid(steps, 3.0)
    multistep, x = UniPC(sigmas), torch.ones(1, dtype=torch.float64)
    variances = [((1 - sigma) * 0.3) ** 2 + sigma**2 for sigma in sigmas]
    for sigma, following, variance in zip(sigmas, [*sigmas[1:], 0.0], variances, strict=True):
        flow = (sigma - (1 - sigma) * 0.09) / variance * x
        x = multistep.step(x, flow) if solver == "unipc" else x + (following - sigma) * flow
    return abs(float(x) - 0.3 / variances[0] ** 0.5)


def test_the_error_falls_faster_than_with_the_square_of_the_step() -> None:
    assert final("unipc", 40) < final("unipc", 20) / 4
    assert final("euler", 40) > final("euler", 20) / 3


@pytest.mark.parametrize("chunk", [None, 3])
@torch.no_grad()
def test_the_sampler_guides_it_and_starts_it_anew_for_every_chunk(chunk: int | None) -> None:
    cfg = SamplerCfg(4, 5.0, chunk=chunk, solver="unipc", guidance=3.0, cache=None if chunk is None else CacheCfg("full", rope="absolute"))
    tiny, frames = Tiny(), 6
    text, null = tiny.encode_text(["a red disc"]), tiny.encode_text(["worst quality"])
    draws = [normal(1, chunk or frames, 3, 4, 6, seed=i) for i in range(2)]
    supply = iter(draws)
    found = [part.latent_BFCHW for part in stream(tiny, text, frames, cfg, lambda _: next(supply), null_BLE=null)]
    assert timesteps(cfg) == wan_grid(4, 5.0)[0] and noise_levels(cfg) == list(wan_grid(4, 5.0)[1])
    done = torch.zeros(1, 0, 3, 4, 6)
    for x, wanted in zip(draws, found, strict=False):
        theirs = library(wan_grid(4, 5.0)[1])
        for t, at in zip(timesteps(cfg), theirs.timesteps, strict=True):
            times = torch.cat([torch.zeros(1, done.shape[1]), torch.full((1, x.shape[1]), t)], 1)
            mask = None if chunk is None else blocks(done.shape[1] + x.shape[1], chunk)
            now = torch.cat([done, x], 1)
            flows = [tiny.denoiser(now, times, given, mask_SS=mask)[:, done.shape[1] :] for given in (text, null)]
            x = theirs.step(flows[1] + 3.0 * (flows[0] - flows[1]), at, x, return_dict=False)[0]
        assert distance(wanted, x) < 1e-5
        done = torch.cat([done, wanted], 1)
    assert done.shape[1] == frames


def blocks(frames: int, chunk: int) -> Tensor:
    number = torch.arange(frames).repeat_interleave(6) // chunk
    return number[None, :] <= number[:, None]
