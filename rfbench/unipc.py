"""UniPC of second order for flow matching: the multistep solver that Wan's own teachers are sampled with.

Each step corrects the state that the step before predicted, now that the network was asked there, and predicts the next one.
Both updates integrate the data prediction x0 over the logarithm of the signal-to-noise ratio (Zhao et al. 2023,
arXiv:2302.04867, variant bh2); the first and the last prediction are of first order. This is what Wan-Video/Wan2.1's
FlowUniPCMultistepScheduler does with its defaults; its timesteps are `rfbench.schedule.wan_grid`.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def log_snr(sigma: float) -> float:
    """log((1 - sigma) / sigma); infinite where there is no noise left."""
    return math.log((1 - sigma) / sigma) if sigma else math.inf


class UniPC:
    """The states of one chunk on its way from the first to the last of `sigmas`, and on to 0. The first sigma is below 1."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = [*sigmas, 0.0]
        self.snr = [log_snr(sigma) for sigma in self.sigmas]
        self.steps = 0  # that were taken
        self.x0: tuple[Tensor, ...] = ()  # the network's last two data predictions, the latest last
        self.before: Tensor | None = None  # the state that the latest one belongs to, corrected

    def step(self, x_BFCHW: Tensor, flow_BFCHW: Tensor) -> Tensor:
        """From the state that the network saw and the flow that it predicted to the next state; after the last step, the data."""
        x0, now = x_BFCHW - self.sigmas[self.steps] * flow_BFCHW, self.steps
        if self.before is not None:
            x_BFCHW = self._update(self.before, now - 1, order=min(now, 2), arrived=x0)
        self.x0 = (*self.x0[-1:], x0)
        self.before = x_BFCHW
        self.steps += 1
        return self._update(x_BFCHW, now, order=min(now + 1, 2, len(self.sigmas) - 1 - now))

    def _update(self, x_BFCHW: Tensor, start: int, *, order: int, arrived: Tensor | None = None) -> Tensor:
        """From the state at sigma number `start` to the next, with the data prediction made there (the corrector) or without."""
        sigma, following, h = self.sigmas[start], self.sigmas[start + 1], self.snr[start + 1] - self.snr[start]
        growth = -math.expm1(-h)  # 1 - e^-h
        x0 = self.x0[-1]
        ratio = (self.snr[start - 1] - self.snr[start]) / h if order == 2 else 0.0
        past = (self.x0[-2] - x0) / ratio if order == 2 else None
        if arrived is None:
            slope = x0 if past is None else x0 + 0.5 * past
        elif past is None:
            slope = x0 + 0.5 * (arrived - x0)
        else:  # the weights of both differences sum to `first`, and weighted by their distances (in units of h) to `second`
            first = 1 / growth - 1 / h
            second = 1 / growth - 2 * first / h
            weight = (second - first) / (ratio - 1)
            slope = x0 + weight * past + (first - weight) * (arrived - x0)
        return following / sigma * x_BFCHW + (1 - following) * growth * slope
