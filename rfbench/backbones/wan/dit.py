"""The Wan2.1 diffusion transformer, bidirectional and causal in one module.

Parameter names are those of the original checkpoints. The network predicts the flow noise - x0 of latent video frames from
noisy frames, one timestep per frame, and text. What a token may attend to is the caller's choice: all tokens
(bidirectional), those a dense mask allows, or what a cache leaves it (streaming).

Every layer computes in the dtype that its own weights are stored in. So precision is a matter of storage, see `WanDiT.store`.

Source of the semantics: Wan-Video/Wan2.1 wan/modules/model.py and the causal variants of its descendants, re-implemented.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, N tokens per frame, S = F N tokens, M width,
L text tokens, E text width, h heads, D head width.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rfbench.attention import attend, rotate, rotations

Eight = Literal["products", "attention"]  # what can be computed from 8-bit floats
TextKV = list[tuple[Tensor, Tensor]]  # per layer, cross-attention keys and values [B, L, h, D]
ISLANDS = re.compile(r"time_|fps_|modulation|norm|^head\.")  # the weights that Wan's own network applies outside of bf16 autocast


@dataclass(frozen=True)
class DiTCfg:
    """Sizes; `patch` is (frames, rows, columns).

    `islands`: time embedding, modulation, norms, residual stream and head stay in float32 whatever dtype the rest has, as in
    Wan's own network. The students of the Self Forcing family have no such islands. In float32 there is no difference.
    `float8`: what streams compute from 8-bit floats, which is approximate: the blocks' products, or the attention of tokens to each other.
    `fps`: the network is told the frame rate, in five tensors more (SkyReels-V2-DF-1.3B; it knows 16 and everything else).
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    islands: bool = False
    float8: tuple[Eight, ...] = ()
    fps: int | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """[cos | sin] of t times 10000^(-i / (width / 2)), in float64: [..., width]."""
    half = width // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = t.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Cache(Protocol):
    """What a streaming pass attends to: `rfbench.cache.KVCache`, `rfbench.rolling.RollingCache`."""

    def extend(self, layer: int, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """From a layer's raw queries, keys and values to the rotated queries and all keys and values to attend to."""


class Linear(nn.Linear):
    """A product in the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Norm(nn.Module):
    """RMS norm over the full width, before the split into heads."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BSM: Tensor) -> Tensor:
        return functional.rms_norm(x_BSM.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Projections that self and cross attention share."""

    def __init__(self, cfg: DiTCfg) -> None:
        super().__init__()
        self.heads = cfg.num_heads
        self.q, self.k, self.v, self.o = (Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = Norm(cfg.dim, cfg.eps), Norm(cfg.dim, cfg.eps)

    def split(self, x_BSM: Tensor) -> Tensor:
        """[B, S, h, D]."""
        return x_BSM.unflatten(-1, (self.heads, -1))

    def queries(self, x_BSM: Tensor) -> Tensor:
        return self.split(self.norm_q(self.q(x_BSM)))

    def keys_values(self, x_BSM: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.norm_k(self.k(x_BSM))), self.split(self.v(x_BSM))


@dataclass(frozen=True)
class Scope:
    """What the tokens of one pass attend to: a cache, or each other at the given rotation and under an optional mask."""

    cache: Cache | None = None
    rotation: Tensor | None = None
    mask_SS: Tensor | None = None


class Block(nn.Module):
    """Self attention, cross attention to text, feed-forward; the first and the last are modulated by the timestep."""

    def __init__(self, cfg: DiTCfg, layer: int) -> None:
        super().__init__()
        self.layer, self.cfg = layer, cfg
        self.norm3 = nn.LayerNorm(cfg.dim, cfg.eps)
        self.self_attn, self.cross_attn = Attention(cfg), Attention(cfg)
        self.ffn = nn.Sequential(Linear(cfg.dim, cfg.ffn_dim), nn.GELU(approximate="tanh"), Linear(cfg.ffn_dim, cfg.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim**0.5)

    def forward(self, x_BFNM: Tensor, time_BF6M: Tensor, text: Tensor | tuple[Tensor, Tensor], scope: Scope) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time_BF6M).unsqueeze(-2).unbind(2)
        x_BFNM = x_BFNM + gate1 * self._self_attention(modulate(x_BFNM, shift1, scale1, self.cfg.eps), scope)
        query = self.cross_attn.queries(self.norm3(x_BFNM).flatten(1, 2))
        x_BFNM = x_BFNM + self.cross_attn.o(attend(query, *self._text_kv(text)).flatten(-2)).view_as(x_BFNM)
        return x_BFNM + gate2 * self.ffn(modulate(x_BFNM, shift2, scale2, self.cfg.eps))

    def _text_kv(self, text: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.cross_attn.keys_values(text) if isinstance(text, Tensor) else text

    def _self_attention(self, x_BFNM: Tensor, scope: Scope) -> Tensor:
        x_BSM = x_BFNM.flatten(1, 2)
        q, (k, v) = self.self_attn.queries(x_BSM), self.self_attn.keys_values(x_BSM)
        if scope.cache is not None:
            q, k, v = scope.cache.extend(self.layer, q, k, v)
        else:
            assert scope.rotation is not None
            q, k = rotate(q, scope.rotation), rotate(k, scope.rotation)
        return self.self_attn.o(attend(q, k, v, scope.mask_SS).flatten(-2)).view_as(x_BFNM)


def modulate(x_BFNM: Tensor, shift_BF1M: Tensor, scale_BF1M: Tensor, eps: float) -> Tensor:
    """LN(x) (1 + scale) + shift; the layer norm has no weights of its own."""
    return torch.addcmul(shift_BF1M, functional.layer_norm(x_BFNM, x_BFNM.shape[-1:], eps=eps), 1 + scale_BF1M)


class Head(nn.Module):
    """Modulated projection to the pixels of each token's patch, channel fastest."""

    def __init__(self, cfg: DiTCfg) -> None:
        super().__init__()
        self.eps = cfg.eps
        self.head = Linear(cfg.dim, math.prod(cfg.patch) * cfg.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)

    def forward(self, x_BFNM: Tensor, time_BFM: Tensor) -> Tensor:
        shift, scale = (self.modulation + time_BFM.unsqueeze(2)).unsqueeze(-2).unbind(2)
        return self.head(modulate(x_BFNM, shift, scale, self.eps))


class WanDiT(nn.Module):
    """Flow of latent video frames; see the module's docstring."""

    def __init__(self, cfg: DiTCfg) -> None:
        super().__init__()
        self.cfg = cfg
        self.patch_embedding = nn.Conv3d(cfg.in_dim, cfg.dim, cfg.patch, cfg.patch)
        self.text_embedding = nn.Sequential(Linear(cfg.text_dim, cfg.dim), nn.GELU(approximate="tanh"), Linear(cfg.dim, cfg.dim))
        self.time_embedding = nn.Sequential(Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), Linear(cfg.dim, cfg.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(cfg.dim, cfg.dim * 6))
        if cfg.fps is not None:
            self.fps_embedding = nn.Embedding(2, cfg.dim)
            self.fps_projection = nn.Sequential(Linear(cfg.dim, cfg.dim), nn.SiLU(), Linear(cfg.dim, cfg.dim * 6))
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.head = Head(cfg)

    @property
    def dtype(self) -> torch.dtype:
        """Of latents, noise and flow."""
        return self.head.head.weight.dtype

    def store(self, dtype: torch.dtype) -> None:
        """Keep the weights in `dtype`, but those of the float32 islands that `cfg` has, and compute in these dtypes."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if self.cfg.islands and ISLANDS.search(name) else dtype)

    def text_kv(self, text_BLE: Tensor) -> TextKV:
        """Cross-attention keys and values of all layers. Zero rows of padding are embedded and attended to like any other."""
        embedded = self.text_embedding(text_BLE)
        return [block.cross_attn.keys_values(embedded) for block in cast(Iterable[Block], self.blocks)]

    def forward(self, x_BFCHW: Tensor, t_BF: Tensor, text: Tensor | TextKV, *, cache: Cache | None = None, mask_SS: Tensor | None = None) -> Tensor:
        """Predict the flow of each frame.

        Args:
            x_BFCHW: noisy latent frames; with a cache, those that its `begin` announced.
            t_BF: timestep in [0, 1000] of each frame; [B, 1] gives all frames the same, [1, 1] all clips too.
            text: embedding [B, L, E], or what `text_kv` made of it.
            mask_SS: without a cache, which token (row) may attend to which (column).

        Returns:
            flow [B, F, C, H, W].
        """
        height, width = x_BFCHW.shape[-2] // self.cfg.patch[1], x_BFCHW.shape[-1] // self.cfg.patch[2]
        x_BFNM = self.embed_patches(x_BFCHW)
        time, six = self.embed_time(t_BF)
        texts = itertools.repeat(self.text_embedding(text), len(self.blocks)) if isinstance(text, Tensor) else text
        if cache is None:
            rotation = rotations(tuple(range(x_BFNM.shape[1])), height, width, self.cfg.head_dim, x_BFNM.device)
            scope = Scope(rotation=rotation, mask_SS=mask_SS)
        else:
            scope = Scope(cache=cache)
        for block, own in zip(self.blocks, texts, strict=True):
            x_BFNM = block(x_BFNM, six, own, scope)
        return self.unpatch(self.head(x_BFNM, time), height, width)

    def embed_time(self, t_BF: Tensor) -> tuple[Tensor, Tensor]:
        """What timesteps do to the head, [B, F, M], and to every block, [B, F, 6, M], before the tables of these are added."""
        time = self.time_embedding(timestep_embedding(t_BF, self.cfg.freq_dim))
        six = self.time_projection(time).unflatten(-1, (6, -1))
        if self.cfg.fps is not None:
            six = six + self.fps_projection(self.fps_embedding.weight[int(self.cfg.fps != 16)]).unflatten(-1, (6, -1))
        return time, six

    def embed_patches(self, x_BFCHW: Tensor) -> Tensor:
        """Tokens [B, F, N, M]. The patches' convolution as the matrix product that it is: faster, and the same bits for one clip and for many."""
        (batch, length, channels, height, width), (frames, rows, columns) = x_BFCHW.shape, self.cfg.patch
        x = x_BFCHW.reshape(batch, length // frames, frames, channels, height // rows, rows, width // columns, columns)
        patches = x.permute(0, 1, 4, 6, 3, 2, 5, 7).reshape(batch, length // frames, height // rows * (width // columns), -1)
        weight = self.patch_embedding.weight.flatten(1)
        return functional.linear(patches.to(weight.dtype), weight, self.patch_embedding.bias)

    def unpatch(self, x_BFNO: Tensor, height: int, width: int) -> Tensor:
        """Frames [B, F, C, H, W] of what the head makes of tokens, `height` rows of `width`."""
        (batch, length), (_, rows, columns) = x_BFNO.shape[:2], self.cfg.patch
        x = x_BFNO.reshape(batch, length, height, width, rows, columns, self.cfg.out_dim)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, length, self.cfg.out_dim, height * rows, width * columns)


def block_causal_mask(frames: int, tokens: int, chunk: int, window: int | None, device: torch.device) -> Tensor:
    """Which token may attend to which in a one-pass causal model: [S, S], True where allowed.

    A token sees everything up to the end of its own chunk, with a window only the last `window` frames before that end.
    """
    frame = torch.arange(frames, device=device).repeat_interleave(tokens)
    end = (frame // chunk + 1) * chunk
    allowed = frame[None, :] < end[:, None]
    if window is not None:
        allowed &= frame[None, :] >= end[:, None] - window
    return allowed
