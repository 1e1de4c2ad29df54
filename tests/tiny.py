"""A backbone of a few thousand weights for tests, and how far two tensors are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rfbench.backbones.base import Decoder, VideoShape
from rfbench.backbones.wan.dit import DiTCfg, WanDiT

CFG = DiTCfg(dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_dim=8, text_len=4, in_dim=3, out_dim=3, freq_dim=16)


class Tiny(nn.Module):
    """A DiT with random weights (or weights to come); a prompt's embedding is noise that the prompt seeds; latents are their own pixels."""

    def __init__(self, cfg: DiTCfg = CFG, *, height: int = 4, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        self.shape = VideoShape(cfg.in_dim, height, width, height, width, 16)
        self.denoiser = WanDiT(cfg)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.denoiser.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        cfg = self.denoiser.cfg
        rows = [torch.randn(cfg.text_len, cfg.text_dim, generator=torch.Generator().manual_seed(sum(prompt.encode()))) for prompt in prompts]
        return torch.stack(rows)

    def encode_pixels(self, pixel_BTCHW: Tensor) -> Tensor:
        return pixel_BTCHW

    def decoder(self) -> Decoder:
        return lambda latent_BFCHW: latent_BFCHW

    def load(self, tensors: Mapping[str, Tensor], where: Any) -> None:
        self.load_state_dict(dict(tensors))

    def fresh(self, seed: int) -> None:
        raise NotImplementedError("a tiny backbone is made with its seed")


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
