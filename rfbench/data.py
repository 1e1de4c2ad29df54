"""What training reads: clips of the toy world as latents, ODE pairs, and prompts.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, S steps of an ODE trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rfbench import world


class ClipDraws(Protocol):
    """Integers from each clip's own generator."""

    def integers(self, high: int) -> list[int]: ...


@dataclass(frozen=True)
class ClipStore:
    """Encoded clips of the toy world."""

    latent_NFCHW: Tensor
    captions: tuple[str, ...]

    def pick(self, draws: ClipDraws) -> tuple[Tensor, list[str]]:
        """One clip per generator: [B, F, C, H, W] and captions."""
        index = draws.integers(len(self.captions))
        return self.latent_NFCHW[index], [self.captions[i] for i in index]


def draw_clips(encode: Callable[[Tensor], Tensor], *, seed: int, count: int, frames: int, part: int = 32) -> ClipStore:
    """`count` clips of `frames` pixel frames, rendered and encoded `part` at a time."""
    rng = np.random.default_rng(seed)
    captions = [world.draw_caption(rng) for _ in range(count)]
    latents = []
    for start in range(0, count, part):
        _, pixels = world.draw_clips(int(rng.integers(2**62)), captions[start : start + part], frames)
        latents.append(encode(torch.from_numpy(pixels)))
    return ClipStore(torch.cat(latents), tuple(str(caption) for caption in captions))


def draw_prompts(seeds: Sequence[int]) -> list[str]:
    """One training caption per clip seed."""
    return [str(world.draw_caption(np.random.default_rng(seed))) for seed in seeds]


@dataclass(frozen=True)
class OdePairs:
    """Trajectories of the teacher's sampler at the student's timesteps, the clean latents last."""

    path_NSFCHW: Tensor
    captions: tuple[str, ...]
    timesteps: tuple[float, ...]  # of all entries but the last, noisiest first

    def pick(self, draws: ClipDraws) -> tuple[Tensor, list[str]]:
        """One trajectory per generator: [B, S, F, C, H, W] and captions."""
        index = draws.integers(len(self.captions))
        return self.path_NSFCHW[index], [self.captions[i] for i in index]
