"""What training reads: clips of the toy world as latents, ODE pairs, and prompts.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, S steps of an ODE trajectory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rfbench import world
from rfbench.errors import UserError


class ClipDraws(Protocol):
    """Integers from each clip's own generator."""

    def integers(self, high: int) -> list[int]: ...


Clips = Callable[[ClipDraws], tuple[Tensor, list[str]]]  # one clean clip per generator: latents [B, F, C, H, W] and captions


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


Prompts = Callable[[Sequence[int]], list[str]]  # one training prompt per clip seed


def draw_prompts(seeds: Sequence[int]) -> list[str]:
    """A sentence of the toy world per clip seed."""
    return [str(world.draw_caption(np.random.default_rng(seed))) for seed in seeds]


def prompts_of(file: Path | None) -> Prompts:
    """Where training prompts come from: a file's lines, each as likely as any other, or the toy world without one."""
    if file is None:
        return draw_prompts
    lines = read_prompts(file)
    return lambda seeds: [lines[int(np.random.default_rng(seed).integers(len(lines)))] for seed in seeds]


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a .txt or .jsonl file, one per line.

    Raises:
        UserError: it is neither, or a line holds no prompt.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: training prompts are a .txt or a .jsonl file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() if path.suffix == ".txt" else json.loads(line)["prompt"].strip() for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold one prompt per line ({str(error)[:120]})") from None
    if not all(prompts) or not prompts:
        raise UserError(f"{path}: line {prompts.index('') + 1 if prompts else 1} is empty; every line is a training prompt")
    return tuple(prompts)


class Pairs(Protocol):
    """Trajectories of the teacher's sampler at the student's timesteps, the clean latents last (`rfbench.pairs`)."""

    timesteps: tuple[float, ...]  # of all entries but the last, noisiest first

    def pick(self, draws: ClipDraws) -> tuple[Tensor, list[str]]:
        """One trajectory per generator: [B, S, F, C, H, W] and captions."""
