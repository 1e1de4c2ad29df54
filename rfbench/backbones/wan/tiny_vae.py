"""A tiny decoder of Wan2.1 latents for real-time use: a twenty-fifth of the arithmetic of the real one, and softer pictures.

It was distilled from the real decoder and only approximates it. `approximate` says so, for whoever reports numbers that it was part of.

Tensor names are those of `taew2_1.pth`, whose encoder is left aside. It takes latents as the diffusion model makes them, normalised.

Source of the semantics: madebyollin/taehv taehv.py, re-implemented.

Shapes: B batch, T frames of whatever rate, F latent frames, C channels, H and W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rfbench.backbones.base import TEMPORAL
from rfbench.backbones.wan.vae import AT_ONCE, Past, channels_last, in_space, in_time, pointwise
from rfbench.weights import load_into

WIDTHS = (256, 128, 64, 64)  # channels at the latents' resolution, and after each doubling of it
GROWTH = (1, 2, 2)  # frames that each doubling of the resolution makes of one


def conv(inner: int, outer: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1, bias=bias)


class Squash(nn.Module):
    """Latents softly limited to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """Convolutions of a frame and the frame before it, beside a shortcut; a stream begins after a frame of zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(2 * dim, dim), nn.ReLU(), conv(dim, dim), nn.ReLU(), conv(dim, dim))

    def forward(self, x_BTHWC: Tensor, past: Past) -> Tensor:
        earlier = past.get(self, torch.zeros_like(x_BTHWC[:, :1]))
        past[self] = x_BTHWC[:, -1:].clone()
        both = torch.cat([x_BTHWC, torch.cat([earlier, x_BTHWC[:, :-1]], dim=1)], dim=-1)
        return in_space(self.conv, both).add_(x_BTHWC).relu_()


class Grow(nn.Module):
    """Makes `times` frames of every frame."""

    def __init__(self, dim: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(dim, times * dim, 1, bias=False)

    def forward(self, x_BTHWC: Tensor, past: Past) -> Tensor:
        return in_time(pointwise(self.conv, x_BTHWC), self.times)


class TinyVAE(nn.Module):
    """The weights; `TinyDecoder` is a stream through them."""

    approximate = True

    def __init__(self, z_dim: int = 16, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = [Squash(), conv(z_dim, widths[0]), nn.ReLU()]
        for inner, outer, times in zip(widths, widths[1:], GROWTH, strict=False):
            layers += [MemoryBlock(inner) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), Grow(inner, times), conv(inner, outer, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), conv(widths[-1], 3))

    def forward(self, z_BFHWC: Tensor, past: Past) -> Tensor:
        """Pixels [B, T, H, W, 3] in 0..1, four frames for each latent frame, the first three of a stream to be thrown away."""
        x_BTHWC = z_BFHWC
        for layer in cast(Iterable[nn.Module], self.decoder):
            x_BTHWC = layer(x_BTHWC, past) if isinstance(layer, MemoryBlock | Grow) else in_space(layer, x_BTHWC)
        return x_BTHWC

    def load(self, tensors: Mapping[str, Tensor], where: Any) -> None:
        """Take the decoder's weights of `taew2_1.pth`, strictly; `where` names them in errors.

        Raises:
            UserError: they are of another model.
        """
        load_into(self, {name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.")}, where=where)


class TinyDecoder:
    """Streaming state of a batch of clips being decoded: a `Decoder` of `rfbench.backbones.base`."""

    approximate = True

    def __init__(self, vae: TinyVAE) -> None:
        channels_last(vae)
        self.vae = vae
        self.past: Past = {}

    @torch.no_grad()
    def __call__(self, latent_BFCHW: Tensor) -> Tensor:
        """Pixels [B, T, 3, H, W] of the next frames' normalised latents, in float32 within [-1, 1], whatever the dtype of the weights."""
        surplus = 0 if self.past else TEMPORAL - 1
        z_BFHWC = latent_BFCHW.permute(0, 1, 3, 4, 2).to(next(self.vae.parameters()).dtype)
        pixel_BTHWC = torch.cat([self.vae(part, self.past).float().clamp_(0, 1) for part in z_BFHWC.split(AT_ONCE, dim=1)], dim=1)
        return pixel_BTHWC[:, surplus:].mul_(2).sub_(1).permute(0, 1, 4, 2, 3)
