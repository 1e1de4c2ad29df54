"""Rolling Forcing's joint window: several chunks in work at once, each one step less noisy than the next.

One pass of the network takes every chunk of the window one step further, all of them seeing each other. Then the oldest one is
clean: it is handed out, its clean pass fills the cache, and a chunk of pure noise joins at the other end. While the window fills
and when it runs empty, it is shorter.

A joint pass looks back at the sink, whose keys are rotated anew to stand right before the other cached frames, and at as many
cached frames as `window` leaves beside sink and the window itself; a clean pass at the last `window` frames, where they stood.
Source of the semantics: arXiv:2509.25161 and TencentARC/RollingForcing@a1477d0, re-implemented.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, S query tokens, K key tokens, h heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rfbench.attention import rotate, rotations
from rfbench.backbones.wan.dit import TextKV, WanDiT
from rfbench.cache import CacheShape
from rfbench.config import CacheCfg
from rfbench.schedule import add_noise, flow_to_x0
from rfbench.transfer import to_device


class RollingCache:
    """Keys and values of clean frames, for all layers: raw keys of the sink, rotated ones of the last `window` frames."""

    def __init__(self, cfg: CacheCfg, shape: CacheShape, *, dtype: torch.dtype, device: torch.device) -> None:
        assert cfg.window is not None and cfg.sink is not None
        self.window, self.sink, self.shape = cfg.window, cfg.sink, shape
        self.tokens = shape.height * shape.width

        def buffers(frames: int) -> list[Tensor]:
            size = (shape.batch, frames * self.tokens, shape.heads, shape.head_dim)
            return [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]

        self.anchors, self.anchor_values = buffers(self.sink), buffers(self.sink)
        self.keys, self.values = buffers(self.window), buffers(self.window)  # frame f lies in slot f modulo `window`
        self.start = self.frames = 0  # of the pass at work
        self.clean = False

    def begin(self, start: int, frames: int, *, clean: bool) -> None:
        """Announce a pass over `frames` frames from number `start` on; all frames before `start` had their clean pass."""
        self.start, self.frames, self.clean = start, frames, clean

    def extend(self, layer: int, q_BShD: Tensor, k_BShD: Tensor, v_BShD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rotated queries, and all keys and values that they attend to: [B, S, h, D], twice [B, K, h, D]."""
        own = self._rotation(self.start, self.frames, q_BShD.device)
        queries, keys = rotate(q_BShD, own), rotate(k_BShD, own)
        end, pieces = self.start + self.frames, list[tuple[Tensor, Tensor]]()
        past = range(max(0, end - self.window) if self.clean else max(self.sink, end + self.sink - self.window), self.start)
        if self.start and not self.clean:
            before = self._rotation(self.start - len(past) - self.sink, self.sink, q_BShD.device)
            pieces.append((rotate(self.anchors[layer], before), self.anchor_values[layer]))
        pieces += [(self.keys[layer][:, self._slot(frame)], self.values[layer][:, self._slot(frame)]) for frame in past]
        all_k, all_v = (torch.cat(parts, 1) for parts in zip(*pieces, (keys, v_BShD), strict=True))
        if self.clean:
            self._keep(layer, k_BShD, keys, v_BShD)
        return queries, all_k, all_v

    def _keep(self, layer: int, raw_BShD: Tensor, rotated_BShD: Tensor, v_BShD: Tensor) -> None:
        for frame, *parts in zip(
            range(self.start, self.start + self.frames), *(x.split(self.tokens, 1) for x in (raw_BShD, rotated_BShD, v_BShD)), strict=True
        ):
            raw, rotated, v = parts
            self.keys[layer][:, self._slot(frame)], self.values[layer][:, self._slot(frame)] = rotated, v
            if frame < self.sink:
                place = slice(frame * self.tokens, (frame + 1) * self.tokens)
                self.anchors[layer][:, place], self.anchor_values[layer][:, place] = raw, v

    def _slot(self, frame: int) -> slice:
        slot = frame % self.window
        return slice(slot * self.tokens, (slot + 1) * self.tokens)

    def _rotation(self, start: int, frames: int, device: torch.device) -> Tensor:
        return rotations(tuple(range(start, start + frames)), self.shape.height, self.shape.width, self.shape.head_dim, device)


@torch.no_grad()
def roll(
    model: WanDiT,
    text: TextKV,
    chunks: int,
    length: int,
    noise: Callable[[int], Tensor],
    steps: Sequence[float],
    sigmas: Sequence[float],
    cache: RollingCache,
    tell: Callable[[str], None],
) -> Iterator[Tensor]:
    """Clean chunks of `length` latent frames in order, each handed out before its clean pass: [B, F, C, H, W].

    `noise` is called once for the chunk that joins, then, oldest first, once for every chunk that has steps to go. `tell` hears
    "begin", "denoised" and "cached" of each chunk; the turns in which the window fills belong to the first one.
    """

    def each_frame(values: Sequence[float]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.float64).repeat_interleave(length)[None], cache.keys[0].device)

    window: list[Tensor] = []  # noisy chunks, oldest first
    tell("begin")
    for turn in range(chunks + len(steps) - 1):
        if turn < chunks:
            window.append(noise(length))
        oldest = min(turn, chunks - 1) + 1 - len(window)
        numbers = [turn - chunk for chunk in range(oldest, oldest + len(window))]  # of the step that each chunk takes now
        x_BFCHW = torch.cat(window, 1)
        cache.begin(oldest * length, x_BFCHW.shape[1], clean=False)
        flow = model(x_BFCHW, each_frame([steps[number] for number in numbers]), text, cache=cache)
        made = list(flow_to_x0(flow, x_BFCHW, each_frame([sigmas[number] for number in numbers])).split(length, 1))
        if numbers[0] == len(steps) - 1:
            tell("denoised")
            yield made[0]
            if oldest + 1 < chunks:
                cache.begin(oldest * length, length, clean=True)
                model(made[0], each_frame([0.0]), text, cache=cache)
                tell("cached")
                tell("begin")
            made, numbers = made[1:], numbers[1:]
        window = [add_noise(x0, noise(length), each_frame([sigmas[number + 1]])) for x0, number in zip(made, numbers, strict=True)]
