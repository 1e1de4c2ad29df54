"""What a training objective is to the trainer, and where a batch's randomness comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rfbench.backbones.base import Backbone, VideoShape
from rfbench.backbones.wan.dit import WanDiT, block_causal_mask
from rfbench.config import Recipe
from rfbench.sampler import cache_shape

METHODS: dict[str, str] = {
    "flow": "rfbench.methods.flow:FlowMatching",
    "ode": "rfbench.methods.ode:OdeRegression",
    "dmd": "rfbench.methods.dmd:Dmd",
    "redmd": "rfbench.methods.redmd:ReDmd",
    "sid": "rfbench.methods.sid:Sid",
}


@dataclass(frozen=True)
class Batch:
    """A batch is its clips' seeds: everything random about a clip comes from its own generator.

    So a batch split into micro-batches gives the same gradient as the whole one. `shared` seeds what all clips of an
    optimiser step have in common (the exit step of a rollout).
    """

    seeds: tuple[int, ...]
    shared: int

    def other(self) -> Batch:
        """A batch of as many other clips."""
        return Batch(tuple(seed + 1 for seed in self.seeds), self.shared + 1)

    def split(self, parts: int) -> list[Batch]:
        """`parts` micro-batches of equal size."""
        size = len(self.seeds) // parts
        return [Batch(self.seeds[i * size : (i + 1) * size], self.shared) for i in range(parts)]


class Draws:
    """One CPU generator per clip. Called with a number of latent frames it is a sampler's noise source, of `like`'s device and dtype."""

    def __init__(self, shape: VideoShape, seeds: Sequence[int], *, like: Tensor | None = None) -> None:
        self.size = (shape.channels, shape.height, shape.width)
        self.like = torch.empty(0) if like is None else like
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, frames: int) -> Tensor:
        """Standard normal [B, F, C, H, W]."""
        return torch.stack([torch.randn(frames, *self.size, generator=rng) for rng in self.generators]).to(self.like)

    def uniform(self) -> Tensor:
        """[B] in [0, 1), float64."""
        return torch.cat([torch.rand(1, generator=rng, dtype=torch.float64) for rng in self.generators]).to(self.like.device)

    def integers(self, high: int) -> list[int]:
        """One integer below `high` per clip."""
        return [int(torch.randint(high, (1,), generator=rng)) for rng in self.generators]


def chunk_steps(draws: Draws, frames: int, chunk: int, steps: int) -> Tensor:
    """A step of its own below `steps` for every chunk of every clip, the same for all frames of a chunk: [B, F]."""
    return torch.tensor([draws.integers(steps) for _ in range(frames // chunk)]).T.repeat_interleave(chunk, 1)


def student_mask(recipe: Recipe, backbone: Backbone) -> Tensor:
    """Which token of a clip may attend to which when the streaming student takes all its chunks in one pass: [S, S], where the student is."""
    assert recipe.sampler.chunk is not None and recipe.sampler.cache is not None
    shape = cache_shape(backbone, 1, recipe.latents)
    device = next(backbone.denoiser.parameters()).device
    return block_causal_mask(recipe.latents, shape.height * shape.width, recipe.sampler.chunk, recipe.sampler.cache.window, device)


class Method(Protocol):
    """A training objective. `modules` are trained, each with its own optimiser; "generator" is what comes out. `frozen` are only asked."""

    modules: dict[str, nn.Module]
    frozen: dict[str, WanDiT]

    def turns(self, step: int) -> tuple[str, ...]:
        """Which modules this optimiser step updates."""

    def losses(self, batch: Batch, turns: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of each module in `turns`, mean over the batch, and per-clip statistics [B] to log."""
