"""Cached streaming against the loop that the released code runs: `python -m benchmarks.streaming`.

`naive` does what the reference does in every layer and every pass: rotates the queries and all keys of the window in
complex float64, joins sink, window and new keys anew, shifts the whole cache when it is full, projects the text again,
normalises operation by operation in float32, and reads its places from tensors with `.item()`. It is a plain
implementation of its own that shares only weights and noise with `rfbench.sampler`, so it is also the oracle of
tests/test_streaming.py. Where the two differ numerically, one of them is wrong.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, N tokens per frame, S tokens of the chunk,
K tokens of the window, M width, h heads, D head width, L text tokens, E text width.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from rfbench import provenance
from rfbench.backbones.base import Backbone, open_backbone
from rfbench.config import CacheCfg, SamplerCfg
from rfbench.sampler import Noise, clip_noise, stream, timesteps
from rfbench.schedule import Schedule

WINDOW, SINK = 9, 3


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


def naive(backbone: Backbone, text_BLE: Tensor, latents: int, cfg: SamplerCfg, noise: Noise) -> Iterator[Tensor]:
    """The clean chunks, as `rfbench.sampler.stream` makes them with solver `renoise` and no guidance."""
    assert cfg.chunk is not None and cfg.cache is not None and cfg.solver == "renoise" and cfg.guidance == 1.0
    schedule, steps, length = Schedule(cfg.shift), timesteps(cfg), cfg.chunk
    tokens = backbone.shape.height * backbone.shape.width // (backbone.denoiser.cfg.patch[1] * backbone.denoiser.cfg.patch[2])
    caches = [NaiveCache(cfg.cache, tokens) for _ in range(backbone.denoiser.cfg.num_layers)]
    for start in range(0, latents, length):
        for cache in caches:
            cache.make_room(length, start)
        x = noise(length)
        for number, step in enumerate(steps):
            sigma = float(schedule.sigma(torch.tensor(step, dtype=torch.float64)))
            x0 = (x.double() - sigma * forward(backbone.denoiser, x, step, text_BLE, caches, clean=False).double()).float()
            if number + 1 < len(steps):
                after = float(schedule.sigma(torch.tensor(steps[number + 1], dtype=torch.float64)))
                x = ((1 - after) * x0.double() + after * noise(length).double()).float()
        yield x0
        if start + length < latents:
            forward(backbone.denoiser, x0, 0.0, text_BLE, caches, clean=True)


def student(policy: str = "ema_sink", rope_kind: str = "relative", *, window: int = WINDOW, sink: int = SINK) -> SamplerCfg:
    """Four steps with the given cache."""
    settings: dict[str, Any] = {"policy": policy, "rope": rope_kind}
    settings |= {"window": window} if policy != "full" else {}
    settings |= {"sink": sink} if "sink" in policy else {}
    settings |= {"alpha": 0.9, "fold_dtype": "float32"} if policy == "ema_sink" else {}
    return SamplerCfg(steps=(1000, 750, 500, 250), shift=5.0, cache=CacheCfg(**settings))


@torch.no_grad()
def seconds(run: Callable[[], Iterator[Any]]) -> float:
    begun = time.perf_counter()
    for _ in run():
        pass
    return time.perf_counter() - begun


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time the shared sampler against the naive loop, in turns, in one process.")
    parser.add_argument("--latents", type=int, default=42, help="length of the clip in latent frames, whole chunks of 3")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    backbone = open_backbone("toy")
    backbone.fresh(0)
    nn.init.normal_(backbone.denoiser.head.head.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    text, cfg, latents = backbone.encode_text(["a red disc moves right"]), student(), arguments.latents
    runs: dict[str, Callable[[], Iterator[Any]]] = {
        "sampler": lambda: stream(backbone, text, latents, cfg, clip_noise(backbone, [0])),
        "naive": lambda: naive(backbone, text, latents, cfg, clip_noise(backbone, [0])),
    }
    found = torch.cat([chunk.latent_BFCHW for chunk in stream(backbone, text, latents, cfg, clip_noise(backbone, [0]))], 1)
    wanted = torch.cat(list(naive(backbone, text, latents, cfg, clip_noise(backbone, [0]))), 1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    chunks = latents // 3
    for name, taken in times.items():
        per_chunk = [1000 * second / chunks for second in taken]
        print(f"{name:8} {median(per_chunk):7.2f} ms per chunk of 3 latents ({min(per_chunk):.2f} to {max(per_chunk):.2f}, n = {len(per_chunk)})")
    ratio = median(slow / fast for slow, fast in zip(times["naive"], times["sampler"], strict=True))
    gap = float((found - wanted).norm() / wanted.norm())
    print(f"the naive loop takes {ratio:.2f} times as long; relative difference of the latents {gap:.1e}")
    machine = provenance.machine()
    print(json.dumps({"seconds": times, "ratio": ratio, "difference": gap, "latents": latents, "machine": machine}))


if __name__ == "__main__":
    main()
