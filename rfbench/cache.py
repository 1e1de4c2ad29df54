"""The KV cache of a streaming denoiser: which frames stay is decided once per chunk, on Python integers.

A policy is a pure function from how many frames are held and how many come in to a `Plan`; `KVCache` carries the plan out
for all layers. Frames keep the physical slot that they were written to: nothing is rolled, nothing concatenated, nothing
read back from the device. Attention does not depend on the order of its keys, so only their positions matter.

Shapes: B batch, S tokens of the new frames, K tokens of all attended frames, N tokens per frame, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rfbench.attention import rotate, rotations
from rfbench.config import CacheCfg


@dataclass(frozen=True)
class Plan:
    """What happens to the held frames before new ones come in; slots are counted from the oldest held frame."""

    keep: tuple[int, ...]  # slots that stay, in order
    fold: tuple[tuple[int, int], ...] = ()  # (evicted slot, sink slot that it is averaged into)


def full(held: int, new: int) -> Plan:
    """Every frame stays."""
    return Plan(tuple(range(held)))


def window(held: int, new: int, *, size: int) -> Plan:
    """The last `size` frames, the new ones counted in."""
    return static_sink(held, new, size=size, sink=0)


def static_sink(held: int, new: int, *, size: int, sink: int) -> Plan:
    """The first `sink` frames stay for good; of the others, the latest that fit into `size` beside them and the new ones."""
    over = max(0, held + new - size)
    if over > held - min(sink, held):
        raise ValueError(f"a window of {size} frames with a sink of {sink} has no room for {new} new ones")
    start = min(sink, held)
    return Plan((*range(start), *range(start + over, held)))


def ema_sink(held: int, new: int, *, size: int, sink: int) -> Plan:
    """As `static_sink`, and every frame that leaves is averaged into the sink (paper Eq. 5 to 8).

    The paper evicts a chunk of as many frames as the sink has, frame by frame. Where the sizes differ, the i-th evicted
    frame goes to sink slot i modulo `sink`; the released code overwrites the sink there instead (D-12).
    """
    plan = static_sink(held, new, size=size, sink=sink)
    gone = [slot for slot in range(held) if slot not in plan.keep]
    return Plan(plan.keep, tuple((slot, i % sink) for i, slot in enumerate(gone)))


POLICIES: dict[str, Callable[..., Plan]] = {"full": full, "window": window, "static_sink": static_sink, "ema_sink": ema_sink}


def plan(cfg: CacheCfg, held: int, new: int) -> Plan:
    """The plan of the configured policy."""
    settings = {"size": cfg.window, "sink": cfg.sink}
    return POLICIES[cfg.policy](held, new, **{name: value for name, value in settings.items() if value is not None})


@dataclass(frozen=True)
class CacheShape:
    """Sizes that a denoiser's cache has; `latents` is the longest clip, needed by policy `full` alone."""

    layers: int
    batch: int
    heads: int
    head_dim: int
    height: int  # tokens
    width: int  # tokens
    latents: int


class KVCache:
    """Keys and values of the frames that a chunk may look back at, for all layers of one batch of clips.

    Per chunk: `begin(frames)` once, then any number of passes, each calling `extend` once per layer; every pass overwrites
    what the pass before wrote, so that later chunks see the last one (the clean pass).

    With `rope: relative` keys are stored raw and numbered 0, 1, 2, ... from the oldest held frame; the numbers change only
    when a chunk begins, so held keys are rotated once per chunk and layer and not in every pass. With `rope: absolute`
    only rotated keys are stored.
    """

    def __init__(self, cfg: CacheCfg, shape: CacheShape, *, dtype: torch.dtype, device: torch.device) -> None:
        self.cfg = cfg
        self.shape = shape
        self.tokens = shape.height * shape.width
        slots = shape.latents if cfg.window is None else min(cfg.window, shape.latents)
        size = (shape.batch, slots * self.tokens, shape.heads, shape.head_dim)

        def buffers() -> list[Tensor]:
            return [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]

        self.rotated, self.values = buffers(), buffers()
        self.raw = buffers() if cfg.rope == "relative" else self.rotated
        self.sinks: list[tuple[Tensor, Tensor]] = []  # sink K and V in `fold_dtype`, once something was folded
        self.free = list(range(slots))
        self.held: list[int] = []  # physical slot of each held frame, oldest first; the chunk in work comes last
        self.positions: list[int] = []  # time position of each held frame
        self.chunk = 0  # frames of the chunk in work
        self.frames = 0  # frames that ever began

    def begin(self, frames: int) -> None:
        """Make room for a chunk of `frames` frames: evict, fold, renumber.

        Raises:
            ValueError: the chunk does not fit into the window, or a `full` cache is longer than the clip it was made for.
        """
        step = plan(self.cfg, len(self.held), frames)
        if step.fold:
            self._fold([(self.held[gone], self.held[sink]) for gone, sink in step.fold])
        kept = [self.held[slot] for slot in step.keep]
        self.free = sorted(self.free + [slot for slot in self.held if slot not in kept])
        if frames > len(self.free):
            raise ValueError(f"the cache has {len(self.free)} free frame slots and {frames} frames come in")
        self.held = kept + self.free[:frames]
        self.free = self.free[frames:]
        if self.cfg.rope == "relative":
            self.positions = list(range(len(self.held)))
            self._rotate(len(kept))
        else:
            self.positions = [self.positions[slot] for slot in step.keep] + list(range(self.frames, self.frames + frames))
        self.chunk = frames
        self.frames += frames

    def extend(self, layer: int, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put the chunk's raw keys and values in place; the rotated queries and all keys and values to attend to.

        When gradients are recorded, the chunk's own keys and values carry them and earlier frames' do not; the stored
        tensors are left alone, so that autograd's copies stay valid.

        Returns:
            queries [B, S, H, D], keys [B, K, H, D], values [B, K, H, D].
        """
        rotation = self._rotation(len(self.held) - self.chunk, len(self.held), q_BSHD.device)
        queries, keys = rotate(q_BSHD, rotation), rotate(k_BSHD, rotation)
        if torch.is_grad_enabled():
            past = self.held[: len(self.held) - self.chunk]
            return (
                queries,
                torch.cat([*self._read(self.rotated[layer], past), keys], 1),
                torch.cat([*self._read(self.values[layer], past), v_BSHD], 1),
            )
        new = self.held[len(self.held) - self.chunk :]
        self._write(self.rotated[layer], new, keys)
        self._write(self.values[layer], new, v_BSHD)
        if self.cfg.rope == "relative":
            self._write(self.raw[layer], new, k_BSHD)
        used = len(self.held) * self.tokens  # slots are handed out lowest first, so the used ones are the first ones
        return queries, self.rotated[layer][:, :used], self.values[layer][:, :used]

    def _rotation(self, first: int, last: int, device: torch.device) -> Tensor:
        return rotations(tuple(self.positions[first:last]), self.shape.height, self.shape.width, self.shape.head_dim, device)

    def _rotate(self, kept: int) -> None:
        """Rotate the kept raw keys to their new positions, in all layers."""
        for first, last, slots in self._runs(self.held[:kept]):
            rotation = self._rotation(first, last, self.values[0].device)
            for raw, rotated in zip(self.raw, self.rotated, strict=True):
                rotated[:, slots] = rotate(raw[:, slots], rotation)

    def _fold(self, pairs: list[tuple[int, int]]) -> None:
        """sink = alpha sink + (1 - alpha) evicted, raw keys and values alike; the average is kept in `fold_dtype`."""
        assert self.cfg.alpha is not None and self.cfg.fold_dtype is not None and self.cfg.sink is not None
        dtype = getattr(torch, self.cfg.fold_dtype)
        for gone, sink in pairs:
            logical = self.held.index(sink)
            for layer, (keys, values) in enumerate(zip(self.raw, self.values, strict=True)):
                if len(self.sinks) <= layer:
                    self.sinks.append(
                        (self._gather(keys, self.held[: self.cfg.sink]).to(dtype), self._gather(values, self.held[: self.cfg.sink]).to(dtype))
                    )
                for buffer, average in zip((keys, values), self.sinks[layer], strict=True):
                    part = average[:, logical * self.tokens : (logical + 1) * self.tokens]
                    part.mul_(self.cfg.alpha).add_(buffer[:, self._tokens(gone)].to(dtype) * (1 - self.cfg.alpha))
                    buffer[:, self._tokens(sink)] = part.to(buffer.dtype)

    def _tokens(self, slot: int, frames: int = 1) -> slice:
        return slice(slot * self.tokens, (slot + frames) * self.tokens)

    def _runs(self, slots: list[int]) -> list[tuple[int, int, slice]]:
        """Neighbouring physical slots as one piece: (first, last + 1) in the given list, and their tokens."""
        runs: list[tuple[int, int, slice]] = []
        start = 0
        for i in range(1, len(slots) + 1):
            if i == len(slots) or slots[i] != slots[i - 1] + 1:
                runs.append((start, i, self._tokens(slots[start], i - start)))
                start = i
        return runs

    def _read(self, buffer: Tensor, slots: list[int]) -> list[Tensor]:
        return [buffer[:, tokens] for _, _, tokens in self._runs(slots)] if slots else []

    def _gather(self, buffer: Tensor, slots: list[int]) -> Tensor:
        return torch.cat(self._read(buffer, slots), 1)

    def _write(self, buffer: Tensor, slots: list[int], new_BSHD: Tensor) -> None:
        for first, last, tokens in self._runs(slots):
            buffer[:, tokens] = new_BSHD[:, first * self.tokens : last * self.tokens]
