"""Rung 0 of the ladder: the streaming loop as the reference runs it.

In every layer and every pass it rotates the queries and all keys of the window in complex float64, joins sink, window and
new keys anew, projects the text again, normalises operation by operation in float32, and reads its places from tensors with
`.item()`; when the cache is full it shifts all of it. It is a plain implementation of its own that shares only weights and
noise with `rfbench.sampler`, so it is also the oracle of tests/test_streaming.py. Where the two differ numerically, one of
them is wrong.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, N tokens per frame, S tokens of the chunk,
K tokens of the window, M width, h heads, D head width, L text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rfbench.backbones.base import Backbone
from rfbench.config import CacheCfg, SamplerCfg
from rfbench.sampler import Noise, timesteps
from rfbench.schedule import Schedule


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def layer_norm(x: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    mean = x32.mean(-1, keepdim=True)
    return ((x32 - mean) / torch.sqrt((x32 - mean).pow(2).mean(-1, keepdim=True) + eps)).type_as(x)


def rope(x_BKhD: Tensor, positions: list[int], height: int, width: int) -> Tensor:
    """Rotate in complex float64 with tables that are joined for every call."""
    dim = x_BKhD.shape[-1]
    side = 2 * (dim // 6)
    tables = []
    for part, places in ((dim - 2 * side, max(positions) + 1), (side, height), (side, width)):
        frequency = 1.0 / torch.pow(torch.tensor(10000.0, dtype=torch.float64), torch.arange(0, part, 2, dtype=torch.float64) / part)
        angle = torch.outer(torch.arange(places, dtype=torch.float64), frequency)
        tables.append(torch.polar(torch.ones_like(angle), angle))
    frames = len(positions)
    table = torch.cat(
        [
            tables[0][positions].view(frames, 1, 1, -1).expand(frames, height, width, -1),
            tables[1].view(1, height, 1, -1).expand(frames, height, width, -1),
            tables[2].view(1, 1, width, -1).expand(frames, height, width, -1),
        ],
        dim=-1,
    ).reshape(frames * height * width, 1, -1)
    rotated = [torch.view_as_real(torch.view_as_complex(x.to(torch.float64).reshape(*x.shape[:-1], -1, 2)) * table).flatten(2) for x in x_BKhD]
    return torch.stack(rotated).type_as(x_BKhD)


class NaiveCache:
    """Raw keys and values of one layer in time order, sink first; places are kept in tensors, as the reference does."""

    def __init__(self, cfg: CacheCfg, tokens: int) -> None:
        self.cfg, self.tokens = cfg, tokens
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.end = torch.zeros(1, dtype=torch.long)  # tokens that are final
        self.positions: list[int] = []  # absolute frame of each held frame

    def make_room(self, frames: int, now: int) -> None:
        """Evict what does not fit beside a chunk of `frames` frames that starts at frame `now`, shift the rest, fold it."""
        held, size, sink = int(self.end.item()) // self.tokens, self.cfg.window, self.cfg.sink or 0
        self.positions = [*self.positions[:held], *range(now, now + frames)]
        if size is None or self.keys is None or self.values is None or held + frames <= size:
            return
        gone, n = held + frames - size, self.tokens
        first = min(sink, held)
        for name in ("keys", "values"):
            old = getattr(self, name)
            kept = old[:, : first * n].clone()
            if self.cfg.policy == "ema_sink":
                assert self.cfg.alpha is not None
                for i in range(gone):
                    slot = slice(i % sink * n, (i % sink + 1) * n)
                    left = old[:, (first + i) * n : (first + i + 1) * n].clone()
                    kept[:, slot] = self.cfg.alpha * kept[:, slot] + (1 - self.cfg.alpha) * left
            setattr(self, name, torch.cat([kept, old[:, (first + gone) * n : held * n].clone()], 1))
        self.positions = [*self.positions[:first], *self.positions[first + gone :]]
        self.end -= gone * n

    def joined(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        end = int(self.end.item())
        if self.keys is None or self.values is None:
            return new_keys, new_values
        return torch.cat([self.keys[:, :end], new_keys], 1), torch.cat([self.values[:, :end], new_values], 1)

    def settle(self, keys: Tensor, values: Tensor) -> None:
        """Keep what the clean pass attended to."""
        self.keys, self.values = keys, values
        self.end.fill_(keys.shape[1])


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def forward(model: Any, x_BFCHW: Tensor, t: float, text_BLE: Tensor, caches: list[NaiveCache], *, clean: bool) -> Tensor:
    """One pass of a chunk through the network."""
    cfg = model.cfg
    batch, frames = x_BFCHW.shape[:2]
    tokens = model.patch_embedding(x_BFCHW.transpose(1, 2))
    height, width = tokens.shape[-2:]
    x = tokens.flatten(2).transpose(1, 2)  # [B, F N, M]
    half = cfg.freq_dim // 2
    angle = torch.outer(torch.full((batch * frames,), t, dtype=torch.float64), torch.pow(10000, -torch.arange(half, dtype=torch.float64) / half))
    time_BFM = model.time_embedding(torch.cat([torch.cos(angle), torch.sin(angle)], 1).float()).view(batch, frames, -1)
    six = model.time_projection(time_BFM).unflatten(2, (6, cfg.dim))
    context = model.text_embedding(text_BLE)

    def modulated(y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        y = layer_norm(y, cfg.eps).unflatten(1, (frames, -1))
        return (y * (1 + scale) + shift).flatten(1, 2)

    def gated(y: Tensor, gate: Tensor) -> Tensor:
        return (y.unflatten(1, (frames, -1)) * gate).flatten(1, 2)

    for block, cache in zip(model.blocks, caches, strict=True):
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation.unsqueeze(1) + six).unsqueeze(3).unbind(2)
        own, cross = block.self_attn, block.cross_attn
        y = modulated(x, shift1, scale1)
        q = rms(own.q(y), own.norm_q.weight, cfg.eps).unflatten(2, (cfg.num_heads, -1))
        k = rms(own.k(y), own.norm_k.weight, cfg.eps).unflatten(2, (cfg.num_heads, -1))
        v = own.v(y).unflatten(2, (cfg.num_heads, -1))
        keys, values = cache.joined(k, v)
        held = keys.shape[1] // (height * width)
        places = list(range(held)) if cache.cfg.rope == "relative" else cache.positions
        x = x + gated(own.o(attention(rope(q, places[-frames:], height, width), rope(keys, places, height, width), values)), gate1)
        if clean:
            cache.settle(keys, values)
        y = nn.functional.layer_norm(x, (cfg.dim,), block.norm3.weight, block.norm3.bias, cfg.eps)
        q = rms(cross.q(y), cross.norm_q.weight, cfg.eps).unflatten(2, (cfg.num_heads, -1))
        k = rms(cross.k(context), cross.norm_k.weight, cfg.eps).unflatten(2, (cfg.num_heads, -1))
        v = cross.v(context).unflatten(2, (cfg.num_heads, -1))
        x = x + cross.o(attention(q, k, v))
        x = x + gated(block.ffn(modulated(x, shift2, scale2)), gate2)
    shift, scale = (model.head.modulation.unsqueeze(1) + time_BFM.unsqueeze(2)).unsqueeze(3).unbind(2)
    out = model.head.head(modulated(x, shift, scale))
    _, rows, columns = cfg.patch
    out = out.view(batch, frames, height, width, rows, columns, cfg.out_dim)
    return torch.einsum("bfhwrsc->bfchrws", out).reshape(batch, frames, cfg.out_dim, height * rows, width * columns)


def possible(cfg: SamplerCfg) -> bool:
    """Whether this loop can do what a sampler does: few steps with fresh noise, a policy's plain form, one prompt, no guidance."""
    plain = cfg.solver == "renoise" and cfg.guidance == 1.0 and not cfg.context_noise and cfg.context == "clean" and cfg.reroll is None
    cache = cfg.cache
    return plain and cache is not None and cache.mismatch == "average" and cache.shot_offset is None and cache.empty_sink == "ignored"


def naive(backbone: Backbone, text_BLE: Tensor, latents: int, cfg: SamplerCfg, noise: Noise, initial_BFCHW: Tensor | None = None) -> Iterator[Tensor]:
    """The clean chunks, as `rfbench.sampler.stream` makes them with solver `renoise` and no guidance, in the dtype of the noise."""
    assert possible(cfg) and cfg.chunk is not None and cfg.cache is not None
    schedule, steps, length = Schedule(cfg.shift), timesteps(cfg), cfg.chunk
    tokens = backbone.shape.height * backbone.shape.width // (backbone.denoiser.cfg.patch[1] * backbone.denoiser.cfg.patch[2])
    caches = [NaiveCache(cfg.cache, tokens) for _ in range(backbone.denoiser.cfg.num_layers)]
    for start in range(0, latents, length):
        for cache in caches:
            cache.make_room(length, start)
        x0 = initial_BFCHW[:, start : start + length] if initial_BFCHW is not None else text_BLE[:, :0]
        x = x0 if x0.shape[1] else noise(length)
        for number, step in enumerate(() if x0.shape[1] else steps):
            sigma = float(schedule.sigma(torch.tensor(step, dtype=torch.float64)))
            x0 = (x.double() - sigma * forward(backbone.denoiser, x, step, text_BLE, caches, clean=False).double()).type_as(x)
            if number + 1 < len(steps):
                after = float(schedule.sigma(torch.tensor(steps[number + 1], dtype=torch.float64)))
                x = ((1 - after) * x0.double() + after * noise(length).double()).type_as(x)
        yield x0
        if start + length < latents:
            forward(backbone.denoiser, x0, 0.0, text_BLE, caches, clean=True)
