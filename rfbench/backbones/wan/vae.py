"""The Wan2.1 video autoencoder as a stream: pixels -> latents and latents -> pixels, in chunks of any size, in constant memory.

Time is causal. The first pixel frame is a latent frame of its own, then four pixel frames make one latent frame. Every layer that
looks back in time keeps its last input frames in a `Past`, which belongs to a stream and not to the network, so that one network serves
any number of streams, and all frames of a chunk go through each layer together. Chunked and whole differ by rounding only.

Parameter names are those of `Wan2.1_VAE.pth`. Inside, channels come last, which is how convolutions, norms and attention run fastest.

Source of the semantics: Wan-Video/Wan2.1 wan/modules/vae.py, re-implemented.

Shapes: B batch, T pixel frames or frames of whatever rate, F latent frames, C channels, H and W rows and columns, N frames of all clips.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rfbench import proof
from rfbench.attention import attend
from rfbench.backbones.base import TEMPORAL
from rfbench.errors import UserError
from rfbench.hardware import kernels
from rfbench.weights import load_into

Past = dict[nn.Module, Tensor]  # state of a stream: by layer, the last input frames [B, K, H, W, C] that its next output needs
AT_ONCE = 4  # latent frames that go through the network together: enough to fill a GPU, few enough for its memory

# Mean and standard deviation of the latent channels, by which the diffusion model's latents are normalised.
# fmt: off
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on

# Parts of original names -> diffusers' names of them.
DIFFUSERS = (
    (r"^conv1\b", "quant_conv"),
    (r"^conv2\b", "post_quant_conv"),
    (r"coder\.conv1\b", "coder.conv_in"),
    (r"\bhead\.0\b", "norm_out"),
    (r"\bhead\.2\b", "conv_out"),
    (r"\bdownsamples\b", "down_blocks"),
    (r"\bmiddle\.0\b", "mid_block.resnets.0"),
    (r"\bmiddle\.1\b", "mid_block.attentions.0"),
    (r"\bmiddle\.2\b", "mid_block.resnets.1"),
    (r"\bresidual\.0\b", "norm1"),
    (r"\bresidual\.2\b", "conv1"),
    (r"\bresidual\.3\b", "norm2"),
    (r"\bresidual\.6\b", "conv2"),
    (r"\bshortcut\b", "conv_shortcut"),
)


@dataclass(frozen=True)
class VAECfg:
    """Sizes; one entry of `dim_mult` per resolution, one of `temporal_downsample` between each two of them, from pixels to latents.

    `attn_scales` adds attention where a resolution's scale is listed. The encoder counts scales from 1 at the pixels; the decoder
    starts from 1/4 at the latents of four resolutions, although they are at 1/8, as the original does.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self) -> None:
        assert len(self.temporal_downsample) >= len(self.dim_mult) - 1, "temporal_downsample has an entry between each two resolutions"
        assert 2 ** sum(self.temporal_downsample[: len(self.dim_mult) - 1]) <= TEMPORAL, "frames are encoded in groups of 4"
        assert len(self.mean) == len(self.std) == self.z_dim, "every latent channel has a mean and a standard deviation"

    @property
    def patch(self) -> int:
        """Pixel rows (and columns) per latent row."""
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def fold(self) -> int:
        return 1

    def encoder(self) -> Network:
        return encoder(self)

    def decoder(self) -> Network:
        return decoder(self)

    def in_diffusers(self, name: str) -> str:
        """Its decoder groups layers by resolution, some residual blocks and a resampling each; its encoder leaves them in one row."""
        assert not self.attn_scales, "diffusers' decoder has attention at the smallest resolution alone"
        if found := re.match(r"decoder\.upsamples\.(\d+)\.", name):
            group, layer = divmod(int(found[1]), self.num_res_blocks + 2)
            last = layer > self.num_res_blocks
            return f"decoder.up_blocks.{group}.{'upsamplers.0' if last else f'resnets.{layer}'}.{name[found.end() :]}"
        return name


class Norm(nn.Module):
    """RMS norm over the channels; `axes` is how many axes of size 1 follow the channels in the checkpoint."""

    def __init__(self, dim: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))
        self.eps = 1e-24 / dim  # the original bounds the root of the sum by 1e-12

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        return functional.rms_norm(x_BTHWC, (len(self.gamma),), self.gamma.flatten(), eps=self.eps)


def causal_conv(inner: int, outer: int, kernel: tuple[int, int, int], stride: int = 1) -> nn.Conv3d:
    """A convolution that pads in space alone; what comes before in time is `causal`'s business."""
    return nn.Conv3d(inner, outer, kernel, (stride, 1, 1), padding=(0, kernel[1] // 2, kernel[2] // 2))


def causal(conv: nn.Conv3d, x_BTHWC: Tensor, past: Past, norm: Norm | None = None) -> Tensor:
    """Convolve the stream's next frames, after norm and SiLU if there is a norm. A stream begins after frames of zeros.

    Norm and SiLU write right behind the frames of the past, which saves a copy of the chunk.
    """
    keep = conv.kernel_size[0] - conv.stride[0]
    batch, frames, *size = x_BTHWC.shape
    whole = x_BTHWC.new_empty(batch, keep + frames, *size)
    whole[:, :keep] = past.get(conv, 0)
    if norm is None:
        whole[:, keep:] = x_BTHWC
    elif (kernel := norm_silu(x_BTHWC)) is not None:
        kernel(x_BTHWC.contiguous(), norm.gamma.flatten(), norm.eps, out=whole[:, keep:])
    else:
        torch.ops.aten.silu.out(norm(x_BTHWC), out=whole[:, keep:])
    past[conv] = whole[:, frames:].clone()
    return conv(whole.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


def norm_silu(x_BTHWC: Tensor) -> proof.Kernel | None:
    """The kernel for norm and SiLU of such tensors, where kernels are taken and once it has proved itself."""
    device, dtype, width = x_BTHWC.device, x_BTHWC.dtype, x_BTHWC.shape[-1]

    def trial(kernel: proof.Kernel) -> Iterator[proof.Pair]:
        norm = Norm(width).to(device, dtype)
        norm.gamma.copy_(proof.drawn(width, 1, 1, 1, seed=0, device=device, dtype=dtype))
        x = proof.drawn(2, 1, 2, 3, width, seed=1, device=device, dtype=dtype)
        behind = torch.zeros_like(x).repeat(1, 2, 1, 1, 1)
        kernel(x, norm.gamma.flatten(), norm.eps, out=behind[:, 1:])
        yield behind, torch.cat([torch.zeros_like(x), functional.silu(norm(x))], 1), dtype

    return proof.kernel("norm_silu", kernels(device), device, (width, dtype), trial)


def channels_last(model: nn.Module) -> None:
    """On a GPU, lay convolutions' weights as frames lie here: cuDNN would copy them in every call."""
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d | nn.Conv3d) and conv.weight.is_cuda:
            layout = torch.channels_last if isinstance(conv, nn.Conv2d) else torch.channels_last_3d
            conv.weight.data = conv.weight.data.contiguous(memory_format=layout)


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of kernel size 1 as the matrix product that it is; channels are last."""
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    return functional.linear(x, conv.weight.flatten(1), conv.bias)


def in_space(module: nn.Module, x_BTHWC: Tensor) -> Tensor:
    """Apply a two-dimensional module to every frame."""
    x_NCHW: Tensor = module(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2))
    return x_NCHW.permute(0, 2, 3, 1).unflatten(0, x_BTHWC.shape[:2])


def in_time(x_BTHWC: Tensor, times: int) -> Tensor:
    """Make each frame `times` frames, the first of which is the first of as many equal parts of the channels."""
    return x_BTHWC.unflatten(-1, (times, -1)).movedim(-2, 2).flatten(1, 2)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, beside a shortcut."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        first, second = causal_conv(inner, outer, (3, 3, 3)), causal_conv(outer, outer, (3, 3, 3))
        self.residual = nn.Sequential(Norm(inner), nn.SiLU(), first, Norm(outer), nn.SiLU(), nn.Dropout(0.0), second)
        self.shortcut = nn.Conv3d(inner, outer, 1) if inner != outer else None

    def forward(self, x_BTHWC: Tensor, past: Past) -> Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = cast(Iterable[Any], self.residual)
        h_BTHWC = causal(conv2, causal(conv1, x_BTHWC, past, norm1), past, norm2)
        return h_BTHWC.add_(x_BTHWC if self.shortcut is None else pointwise(self.shortcut, x_BTHWC))


class Attention(nn.Module):
    """Attention with one head among the pixels of a frame, beside a shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = Norm(dim, axes=2)
        self.to_qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x_BTHWC: Tensor, past: Past) -> Tensor:
        q, k, v = (part.flatten(0, 1).flatten(1, 2)[:, :, None] for part in pointwise(self.to_qkv, self.norm(x_BTHWC)).chunk(3, dim=-1))
        return x_BTHWC + pointwise(self.proj, attend(q, k, v).view_as(x_BTHWC))


class Resample(nn.Module):
    """Half as many rows and columns, or (`up`) twice as many; if it is `temporal`, frames as well.

    The first frame of a stream stays one frame. Going down, it is the past of the second; going up, the second begins after zeros.
    """

    def __init__(self, inner: int, outer: int, *, up: bool, temporal: bool) -> None:
        super().__init__()
        self.up = up
        if up:
            self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(inner, outer, 3, padding=1))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(inner, outer, 3, stride=2))
        self.time_conv = None
        if temporal:
            self.time_conv = causal_conv(inner, 2 * inner, (3, 1, 1)) if up else causal_conv(outer, outer, (3, 1, 1), stride=2)

    def forward(self, x_BTHWC: Tensor, past: Past) -> Tensor:
        if self.up:
            return in_space(self.resample, self._resample_time(x_BTHWC, past))
        return self._resample_time(in_space(self.resample, x_BTHWC), past)

    def _resample_time(self, x_BTHWC: Tensor, past: Past) -> Tensor:
        conv = self.time_conv
        if conv is None:
            return x_BTHWC
        if conv not in past:
            first, rest = x_BTHWC[:, :1], x_BTHWC[:, 1:]
            past[conv] = first.new_zeros(()) if self.up else first.clone()
            return torch.cat([first, self._resample_time(rest, past)], dim=1) if rest.shape[1] else first
        x_BTHWC = causal(conv, x_BTHWC, past)
        return in_time(x_BTHWC, 2) if self.up else x_BTHWC


def through(layers: nn.ModuleList, x_BTHWC: Tensor, past: Past) -> Tensor:
    """One layer of a stream after another."""
    for layer in cast(Iterable[nn.Module], layers):
        x_BTHWC = layer(x_BTHWC, past)
    return x_BTHWC


class Network(nn.Module):
    """A convolution, groups of layers, and norm, SiLU and convolution: encoder and decoder differ in the groups."""

    def __init__(self, channels: tuple[int, int, int, int], **groups: list[nn.Module]) -> None:
        """`channels` come in, leave the first convolution, enter the head and go out; `groups` are layers by their names in the checkpoint."""
        super().__init__()
        inner, first, last, outer = channels
        self.conv1 = causal_conv(inner, first, (3, 3, 3))
        self.groups = tuple(groups)
        for name, layers in groups.items():
            self.add_module(name, nn.ModuleList(layers))
        self.head = nn.Sequential(Norm(last), nn.SiLU(), causal_conv(last, outer, (3, 3, 3)))

    def forward(self, x_BTHWC: Tensor, past: Past) -> Tensor:
        x_BTHWC = causal(self.conv1, x_BTHWC, past)
        for name in self.groups:
            x_BTHWC = through(getattr(self, name), x_BTHWC, past)
        norm, _, conv = cast(Iterable[Any], self.head)
        return causal(conv, x_BTHWC, past, norm)


def level(cfg: VAECfg, inner: int, outer: int, blocks: int, scale: float) -> list[nn.Module]:
    """The layers of one resolution."""
    layers: list[nn.Module] = []
    for block in range(blocks):
        layers.append(ResidualBlock(outer if block else inner, outer))
        if scale in cfg.attn_scales:
            layers.append(Attention(outer))
    return layers


def middle(dim: int) -> list[nn.Module]:
    """The layers at the resolution of the latents."""
    return [ResidualBlock(dim, dim), Attention(dim), ResidualBlock(dim, dim)]


def encoder(cfg: VAECfg) -> Network:
    """Pixels [B, T, H, W, 3] -> mean and log variance of latents [B, F, H, W, 2 C]."""
    layers: list[nn.Module] = []
    width = cfg.dim
    for number, times in enumerate(cfg.dim_mult):
        layers += level(cfg, width, width := cfg.dim * times, cfg.num_res_blocks, 0.5**number)
        if number < len(cfg.dim_mult) - 1:
            layers.append(Resample(width, width, up=False, temporal=cfg.temporal_downsample[number]))
    return Network((3, cfg.dim, width, 2 * cfg.z_dim), downsamples=layers, middle=middle(width))


def decoder(cfg: VAECfg) -> Network:
    """Latents [B, F, H, W, C] -> pixels [B, T, H, W, 3]."""
    layers: list[nn.Module] = []
    first = width = cfg.dim * cfg.dim_mult[-1]
    last = len(cfg.dim_mult) - 1
    for number, times in enumerate(reversed(cfg.dim_mult)):
        layers += level(cfg, width, width := cfg.dim * times, cfg.num_res_blocks + 1, 0.5 ** (last - 1 - number))
        if number < last:
            layers.append(Resample(width, width // 2, up=True, temporal=cfg.temporal_downsample[last - 1 - number]))
            width //= 2
    return Network((cfg.z_dim, first, width, 3), middle=middle(first), upsamples=layers)


class AutoencoderCfg(Protocol):
    """What makes an autoencoder of this family: `VAECfg`, or `rfbench.backbones.wan.vae22.VAE22Cfg`."""

    @property
    def z_dim(self) -> int: ...
    @property
    def fold(self) -> int:
        """Rows (and columns) of pixels that are channels of one to the networks."""

    @property
    def patch(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    def encoder(self) -> Network:
        """Folded pixels [B, T, H, W, 3 fold^2] -> mean and log variance of latents [B, F, H, W, 2 C]."""

    def decoder(self) -> Network:
        """Latents [B, F, H, W, C] -> folded pixels [B, T, H, W, 3 fold^2]."""

    def in_diffusers(self, name: str) -> str:
        """A tensor's name with its layer's place as diffusers' AutoencoderKLWan counts layers."""


class WanVAE(nn.Module):
    """The weights; `WanEncoder` and `WanDecoder` are streams through them."""

    def __init__(self, cfg: AutoencoderCfg) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = cfg.encoder(), cfg.decoder()
        self.conv1, self.conv2 = nn.Conv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1), nn.Conv3d(cfg.z_dim, cfg.z_dim, 1)

    def load(self, tensors: Mapping[str, Tensor], where: Any) -> None:
        """Take the weights of the published file or of diffusers' AutoencoderKLWan, strictly; `where` names them in errors.

        Raises:
            UserError: they are of another model.
        """
        if "decoder.conv_in.weight" in tensors:
            original = {their: ours for ours, their in diffusers_names(self.cfg).items()}
            tensors = {original.get(name, name): tensor for name, tensor in tensors.items()}
        load_into(self, tensors, where=where)

    def encode(self, pixel_BTHWC: Tensor, past: Past) -> Tensor:
        """Means of the latents [B, F, H, W, C] that the stream's next pixel frames make."""
        return pointwise(self.conv1, self.encoder(folded(pixel_BTHWC, self.cfg.fold), past))[..., : self.cfg.z_dim]

    def decode(self, z_BFHWC: Tensor, past: Past) -> Tensor:
        """Pixels [B, T, H, W, 3] that the stream's next latent frames make."""
        return unfolded(self.decoder(pointwise(self.conv2, z_BFHWC), past), self.cfg.fold)


def folded(x_BTHWC: Tensor, fold: int) -> Tensor:
    """`fold` x `fold` neighbours become channels of one, their rows fastest, then their columns; with 1 nothing moves."""
    x = x_BTHWC.unflatten(3, (-1, fold)).unflatten(2, (-1, fold))
    return x.permute(0, 1, 2, 4, 6, 5, 3).flatten(4)


def unfolded(x_BTHWC: Tensor, fold: int) -> Tensor:
    """The inverse of `folded`."""
    x = x_BTHWC.unflatten(-1, (-1, fold, fold))
    return x.permute(0, 1, 2, 6, 3, 5, 4).flatten(4, 5).flatten(2, 3)


def latent_scale(vae: WanVAE) -> Tensor:
    """Mean and standard deviation of the latent channels, where the weights are, but in float32 whatever they are in: [2, C]."""
    return torch.tensor((vae.cfg.mean, vae.cfg.std), dtype=torch.float32, device=vae.conv2.weight.device)


class WanDecoder:
    """Streaming state of a batch of clips being decoded, without gradients: a `Decoder` of `rfbench.backbones.base`."""

    approximate = False

    def __init__(self, vae: WanVAE) -> None:
        channels_last(vae)
        self.vae = vae
        self.past: Past = {}
        self.mean, self.std = latent_scale(vae)

    @torch.no_grad()
    def __call__(self, latent_BFCHW: Tensor) -> Tensor:
        """Pixels [B, T, 3, H, W] of the next frames' normalised latents, in float32 within [-1, 1], whatever the dtype of the weights."""
        z_BFHWC = latent_BFCHW.float().permute(0, 1, 3, 4, 2) * self.std + self.mean
        parts = z_BFHWC.to(self.vae.conv2.weight.dtype).split(AT_ONCE, dim=1)
        pixels = [self.vae.decode(part, self.past).float().clamp_(-1, 1) for part in parts]
        return torch.cat(pixels, dim=1).permute(0, 1, 4, 2, 3)


class WanEncoder:
    """Streaming state of a batch of clips being encoded, without gradients: the past, and pixel frames that do not fill a latent frame yet."""

    def __init__(self, vae: WanVAE) -> None:
        self.vae = vae
        self.past: Past = {}
        self.mean, self.std = latent_scale(vae)
        self.waiting_BTHWC: Tensor | None = None

    @torch.no_grad()
    def __call__(self, pixel_BTCHW: Tensor) -> Tensor:
        """Normalised latents [B, F, C, H, W], in float32, of what the next pixel frames in [-1, 1] complete; F may be 0.

        Groups of 1, 4, 4, ... pixel frames are encoded; frames that do not fill a group wait for the next call, so those at the end are dropped.

        Raises:
            UserError: rows or columns are no whole number of latents.
        """
        cfg = self.vae.cfg
        height, width = pixel_BTCHW.shape[-2:]
        if height % cfg.patch or width % cfg.patch:
            raise UserError(f"video of {width} x {height} pixels cannot be encoded: both must be multiples of {cfg.patch}; crop or resize it")
        x_BTHWC = pixel_BTCHW.permute(0, 1, 3, 4, 2).to(self.vae.conv2.weight.dtype)
        if self.waiting_BTHWC is not None:
            x_BTHWC = torch.cat([self.waiting_BTHWC, x_BTHWC], dim=1)
        ahead = 0 if self.past else TEMPORAL - 1  # frames that the first group lacks
        ready = max(0, (x_BTHWC.shape[1] + ahead) // TEMPORAL * TEMPORAL - ahead)
        self.waiting_BTHWC = x_BTHWC[:, ready:].clone()
        if not ready:
            return pixel_BTCHW.new_empty(len(x_BTHWC), 0, cfg.z_dim, height // cfg.patch, width // cfg.patch, dtype=torch.float32)
        step = AT_ONCE * TEMPORAL
        parts = x_BTHWC[:, :ready].tensor_split(tuple(range(step - ahead, ready, step)), dim=1)
        mean_BFHWC = torch.cat([self.vae.encode(part, self.past).float() for part in parts], dim=1)
        return ((mean_BFHWC - self.mean) / self.std).permute(0, 1, 4, 2, 3).contiguous()


def diffusers_names(cfg: AutoencoderCfg) -> dict[str, str]:
    """Every tensor of `WanVAE(cfg)`: its original name -> its name in diffusers' AutoencoderKLWan."""
    with torch.device("meta"):
        originals = WanVAE(cfg).state_dict()
    return {name: diffusers_name(cfg.in_diffusers(name)) for name in originals}


def diffusers_name(name: str) -> str:
    """An original name in diffusers' words, part by part (`DIFFUSERS`)."""
    for original, theirs in DIFFUSERS:
        name = re.sub(original, theirs, name)
    return name
