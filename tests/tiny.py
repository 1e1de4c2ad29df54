"""A backbone of a few thousand weights for tests, made of the real network, and how far two tensors are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rfbench.backbones.base import TEMPORAL, Decoder, VideoShape
from rfbench.backbones.wan import graphs
from rfbench.backbones.wan.dit import DiTCfg, WanDiT
from rfbench.backbones.wan.lean import SHORTCUTS, LeanDiT, Shortcuts
from rfbench.cache import KVCache
from rfbench.config import WeightsCfg
from rfbench.weights import load_into

CFG = DiTCfg(dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_dim=8, text_len=4, in_dim=3, out_dim=3, freq_dim=16)


class Tiny(nn.Module):
    """A network with random weights; a prompt's embedding is noise that the prompt seeds; latents are pixels, shrunk and thinned out."""

    def __init__(self, cfg: DiTCfg = CFG, *, height: int = 4, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        self.shape = VideoShape(cfg.in_dim, height, width, height, width, 16)
        self.denoiser = WanDiT(cfg)
        self.fresh(seed)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        size = (self.denoiser.cfg.text_len, self.denoiser.cfg.text_dim)
        return torch.stack([normal(*size, seed=sum(prompt.encode())) for prompt in prompts])

    def remember(self, prompts: Sequence[str]) -> None:
        """Nothing: an embedding is drawn."""

    def encode_pixels(self, pixel_BTCHW: Tensor) -> Tensor:
        return torch.stack(
            [functional.adaptive_avg_pool2d(frame, (self.shape.height, self.shape.width)) for frame in pixel_BTCHW[:, ::TEMPORAL].unbind(1)], 1
        )

    def decoder(self) -> Decoder:
        return TinyDecoder()

    def parts(self) -> dict[str, WeightsCfg]:
        return {}

    def load(self, tensors: Mapping[str, Tensor], where: Any, parts: Mapping[str, Path]) -> None:
        load_into(self, tensors, where=where)

    def fresh(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.denoiser.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))


class TinyDecoder:
    """Every latent frame four times over, the first one once."""

    def __init__(self) -> None:
        self.begun = False

    def __call__(self, latent_BFCHW: Tensor) -> Tensor:
        pixels = latent_BFCHW.repeat_interleave(TEMPORAL, 1)[:, 0 if self.begun else TEMPORAL - 1 :]
        self.begun = True
        return pixels.clamp(-1, 1)


def normal(*size: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that depend on size and seed alone."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance; infinite when shapes differ or anything is not finite."""
    if found.shape != wanted.shape:
        return float("inf")
    gap, size = (found.double() - wanted.double()).norm(), wanted.double().norm()
    result = float(gap / size) if size else float(gap)
    return result if result == result else float("inf")


def observe(monkeypatch: pytest.MonkeyPatch, told: Callable[[Tensor, float, KVCache, Tensor], None]) -> None:
    """Hear of every pass of a stream without gradients, once it is over: its frames, timestep, cache and flow; a clean pass gives none.

    Clean passes are passes of their own while somebody listens.
    """
    make, call, fill = LeanDiT.__init__, LeanDiT.__call__, LeanDiT.fill

    def made(lean: LeanDiT, model: WanDiT, shortcuts: Shortcuts = SHORTCUTS) -> None:
        make(lean, model, dataclasses.replace(shortcuts, joint=False))

    def noisy(lean: LeanDiT, x: Tensor, t: float, text: Any, cache: KVCache, *, kept: bool = False) -> Tensor:
        flow = call(lean, x, t, text, cache, kept=kept)
        told(x, t, cache, flow)
        return flow

    def clean(lean: LeanDiT, x: Tensor, text: Any, cache: KVCache) -> None:
        fill(lean, x, text, cache)
        told(x, 0.0, cache, x[:0])

    monkeypatch.setattr(LeanDiT, "__init__", made)
    monkeypatch.setattr(LeanDiT, "__call__", noisy)
    monkeypatch.setattr(LeanDiT, "fill", clean)


class Remembered:
    """A recorder of passes that does over again what it was shown."""

    def aside(self, work: graphs.Work) -> Tensor | None:
        return work()

    def record(self, work: graphs.Work) -> graphs.Work:
        return work


def recordings(lean: LeanDiT) -> int:
    """How many passes a `LeanDiT` has recorded."""
    assert lean.graphs is not None
    return sum(made is not None for known in lean.graphs.of.values() for made in known.made.values())
