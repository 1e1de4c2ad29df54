"""The Wan2.2 video autoencoder (48 channels, 4 x 16 x 16), of the layers of Wan2.1's and through the same streams.

Two things are new. Network and pixels exchange 2 x 2 pixels as channels of one. And the layers of each resolution stand beside a
shortcut without weights, which averages neighbours on the way down and repeats them on the way up.

Parameter names are those of `Wan2.2_VAE.pth`. Source of the semantics: Wan-Video/Wan2.2@42bf4cf wan/modules/vae2_2.py, re-implemented.

Shapes: as in `rfbench.backbones.wan.vae`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rfbench.backbones.base import TEMPORAL
from rfbench.backbones.wan.vae import Network, Past, Resample, ResidualBlock, middle, through

FOLD = 2  # rows (and columns) of pixels that are channels of one

# Mean and standard deviation of the latent channels, by which the diffusion model's latents are normalised.
# fmt: off
MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


@dataclass(frozen=True)
class VAE22Cfg:
    """Sizes, as in `VAECfg`; the decoder's width is its own."""

    dim: int = 160
    decoder_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self) -> None:
        assert len(self.temporal_downsample) == len(self.dim_mult) - 1, "temporal_downsample has an entry between each two resolutions"
        assert 2 ** sum(self.temporal_downsample) <= TEMPORAL, "frames are encoded in groups of 4"
        assert len(self.mean) == len(self.std) == self.z_dim, "every latent channel has a mean and a standard deviation"

    @property
    def patch(self) -> int:
        """Pixel rows (and columns) per latent row."""
        return int(self.fold * 2 ** (len(self.dim_mult) - 1))

    @property
    def fold(self) -> int:
        return FOLD

    def encoder(self) -> Network:
        return encoder(self)

    def decoder(self) -> Network:
        return decoder(self)

    def in_diffusers(self, name: str) -> str:
        """The layers of a resolution are `resnets` and a `downsampler` or `upsampler` there."""
        if found := re.match(r"(\w+)\.(down|up)samples\.(\d+)\.\2samples\.(\d+)\.", name):
            network, way, level, layer = found.groups()
            last = int(layer) == self.num_res_blocks + (way == "up")
            return f"{network}.{way}_blocks.{level}.{f'{way}sampler' if last else f'resnets.{layer}'}.{name[found.end() :]}"
        return name


def averaged(x_BTHWC: Tensor, outer: int, times: int, scale: int) -> Tensor:
    """Every `times` frames, `scale` rows and `scale` columns as one with `outer` channels: means of groups of channels and neighbours.

    An odd frame, which is the first of a stream, follows a frame of zeros.
    """
    if x_BTHWC.shape[1] % times:
        x_BTHWC = torch.cat([torch.zeros_like(x_BTHWC[:, :1]), x_BTHWC], dim=1)
    x = x_BTHWC.unflatten(3, (-1, scale)).unflatten(2, (-1, scale)).unflatten(1, (-1, times))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4).unflatten(-1, (outer, -1)).mean(-1)


def repeated(x_BTHWC: Tensor, outer: int, times: int, scale: int) -> Tensor:
    """Every frame as `times` frames of `scale` times the rows and columns with `outer` channels, each a copy of one channel."""
    parts = (outer, times, scale, scale)
    x = x_BTHWC.repeat_interleave(outer * times * scale * scale // x_BTHWC.shape[-1], dim=-1).unflatten(-1, parts)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(5, 6).flatten(3, 4).flatten(1, 2)


class Down(nn.Module):
    """The encoder's layers of one resolution, to the next one where it is `halved`, beside averages."""

    def __init__(self, inner: int, outer: int, blocks: int, *, halved: bool, temporal: bool) -> None:
        super().__init__()
        self.outer, self.times, self.scale = outer, 1 + temporal, 1 + halved
        layers: list[nn.Module] = [ResidualBlock(outer if block else inner, outer) for block in range(blocks)]
        self.downsamples = nn.ModuleList(layers + [Resample(outer, outer, up=False, temporal=temporal)] * halved)

    def forward(self, x_BTHWC: Tensor, past: Past) -> Tensor:
        h_BTHWC = through(self.downsamples, x_BTHWC, past)
        return h_BTHWC + averaged(x_BTHWC, self.outer, self.times, self.scale)


class Up(nn.Module):
    """The decoder's layers of one resolution, to the next one and beside copies where it is `doubled`.

    The first frame of a stream stays one frame, so the first of its two copies goes.
    """

    def __init__(self, inner: int, outer: int, blocks: int, *, doubled: bool, temporal: bool) -> None:
        super().__init__()
        self.outer, self.times, self.doubled = outer, 1 + temporal, doubled
        layers: list[nn.Module] = [ResidualBlock(outer if block else inner, outer) for block in range(blocks)]
        self.upsamples = nn.ModuleList(layers + [Resample(outer, outer, up=True, temporal=temporal)] * doubled)

    def forward(self, x_BTHWC: Tensor, past: Past) -> Tensor:
        h_BTHWC = through(self.upsamples, x_BTHWC, past)
        return h_BTHWC + repeated(x_BTHWC, self.outer, self.times, 2)[:, -h_BTHWC.shape[1] :] if self.doubled else h_BTHWC


def encoder(cfg: VAE22Cfg) -> Network:
    """Pixels as channels [B, T, H, W, 12] -> mean and log variance of latents [B, F, H, W, 2 C]."""
    widths = [cfg.dim * times for times in (1, *cfg.dim_mult)]
    steps = [(True, temporal) for temporal in cfg.temporal_downsample] + [(False, False)]
    levels: list[nn.Module] = [
        Down(inner, outer, cfg.num_res_blocks, halved=halved, temporal=temporal)
        for inner, outer, (halved, temporal) in zip(widths[:-1], widths[1:], steps, strict=True)
    ]
    return Network((3 * FOLD**2, cfg.dim, widths[-1], 2 * cfg.z_dim), downsamples=levels, middle=middle(widths[-1]))


def decoder(cfg: VAE22Cfg) -> Network:
    """Latents [B, F, H, W, C] -> pixels as channels [B, T, H, W, 12]."""
    widths = [cfg.decoder_dim * times for times in (*cfg.dim_mult, cfg.dim_mult[-1])][::-1]
    steps = [(True, temporal) for temporal in reversed(cfg.temporal_downsample)] + [(False, False)]
    levels: list[nn.Module] = [
        Up(inner, outer, cfg.num_res_blocks + 1, doubled=doubled, temporal=temporal)
        for inner, outer, (doubled, temporal) in zip(widths[:-1], widths[1:], steps, strict=True)
    ]
    return Network((cfg.z_dim, widths[0], widths[-1], 3 * FOLD**2), middle=middle(widths[0]), upsamples=levels)
