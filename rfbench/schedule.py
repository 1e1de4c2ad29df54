"""Flow matching time: x_t = (1 - sigma) x0 + sigma noise, and the network predicts flow = noise - x0.

A timestep t runs from 1000 (noise) to 0 (data). The table of `Schedule(shift)` has u = 1, 0.999, ..., 0.001 and
sigma = shift u / (1 + (shift - 1) u), timestep = 1000 sigma; a timestep that is not in the table takes its nearest
entry's sigma (Wan2.1's FlowMatchScheduler as the Self Forcing family uses it).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TABLE = 1000


def shifted(u: Tensor, shift: float) -> Tensor:
    """The noise shift of the paper (supplement): k u / (1 + (k - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class Schedule:
    """Sigmas, timesteps and training weights of one shift."""

    shift: float

    @cached_property
    def sigmas(self) -> Tensor:
        """[1000], from 1 downwards, float64."""
        return shifted(torch.linspace(1, 0, TABLE + 1, dtype=torch.float64)[:-1], self.shift)

    @cached_property
    def timesteps(self) -> Tensor:
        """[1000], 1000 sigma."""
        return self.sigmas * TABLE

    @cached_property
    def training_weights(self) -> Tensor:
        """[1000], a bell around t = 500 with minimum 0 and sum 1000."""
        bell = torch.exp(-2 * ((self.timesteps - TABLE / 2) / TABLE) ** 2)
        bell = bell - bell.min()
        return bell * (TABLE / bell.sum())

    def index(self, t: Tensor) -> Tensor:
        """Table index of the entry nearest to each timestep, of t's shape."""
        return (self.timesteps.to(t.device) - t.double().unsqueeze(-1)).abs().argmin(-1)

    def sigma(self, t: Tensor) -> Tensor:
        """Sigma of the table entry nearest to each timestep: float64, of t's shape."""
        return self.sigmas.to(t.device)[self.index(t)]

    def warp(self, steps: tuple[int, ...]) -> tuple[float, ...]:
        """Timesteps of a step list: step s is entry 1000 - s of the table, 0 is 0."""
        table = [*self.timesteps.tolist(), 0.0]
        return tuple(table[TABLE - step] for step in steps)

    def spaced(self, count: int) -> tuple[float, ...]:
        """`count` timesteps from 1000 downwards, evenly spaced before the shift."""
        u = torch.linspace(1, 0, count + 1, dtype=torch.float64)[:-1]
        return tuple((shifted(u, self.shift) * TABLE).tolist())


def wan_grid(count: int, shift: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`count` timesteps and sigmas, noisiest first, as Wan's teachers are sampled: the sigmas begin at the shifted 0.999 and not at
    1, and the network is told their thousandfold with the fraction cut off (Wan-Video/Wan2.1 wan/utils/fm_solvers_unipc.py)."""
    first = torch.tensor(1 - 1 / TABLE, dtype=torch.float32).item()  # as rounded there
    sigmas = shifted(torch.linspace(first, 0, count + 1, dtype=torch.float64)[:-1], shift).tolist()
    return tuple(float(int(sigma * TABLE)) for sigma in sigmas), tuple(sigmas)


def add_noise(x0_BFCHW: Tensor, noise_BFCHW: Tensor, sigma_BF: Tensor | float) -> Tensor:
    """(1 - sigma) x0 + sigma noise, in float64, returned in x0's dtype; one sigma for everything is one operation in float32."""
    if isinstance(sigma_BF, float):
        return torch.lerp(x0_BFCHW, noise_BFCHW, sigma_BF)
    sigma = sigma_BF.double()[..., None, None, None]
    return ((1 - sigma) * x0_BFCHW.double() + sigma * noise_BFCHW.double()).to(x0_BFCHW.dtype)


def flow_to_x0(flow_BFCHW: Tensor, xt_BFCHW: Tensor, sigma_BF: Tensor | float) -> Tensor:
    """x_t - sigma flow, as `add_noise` computes."""
    if isinstance(sigma_BF, float):
        return torch.sub(xt_BFCHW, flow_BFCHW, alpha=sigma_BF)
    return (xt_BFCHW.double() - sigma_BF.double()[..., None, None, None] * flow_BFCHW.double()).to(flow_BFCHW.dtype)


def x0_to_flow(x0_BFCHW: Tensor, xt_BFCHW: Tensor, sigma_BF: Tensor) -> Tensor:
    """(x_t - x0) / sigma."""
    return ((xt_BFCHW.double() - x0_BFCHW.double()) / sigma_BF.double()[..., None, None, None]).to(x0_BFCHW.dtype)
