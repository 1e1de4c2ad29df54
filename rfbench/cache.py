"""The KV cache of a streaming denoiser: which frames stay is decided once per chunk, on Python integers.

A policy is a pure function from how many frames are held and how many come in to a `Plan`; `KVCache` carries the plan out
for all layers. Frames keep the physical slot that they were written to: nothing is rolled, nothing concatenated, nothing
read back from the device. Attention does not depend on the order of its keys, so only their positions matter.

Shapes: B batch, S tokens of the new frames, K tokens of all attended frames, N tokens per frame, H heads, D head width.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from rfbench.attention import rotate, rotations
from rfbench.config import CacheCfg
from rfbench.transfer import to_device


@dataclass(frozen=True)
class Plan:
    """What happens to the held frames before new ones come in; slots are counted from the oldest held frame."""

    keep: tuple[int, ...]  # slots that stay, in order
    fold: tuple[tuple[int, int], ...] = ()  # (evicted slot, sink slot that it is averaged into)
    overwrite: tuple[tuple[int, int], ...] = ()  # (evicted slot, sink slot that it replaces)


def full(held: int, new: int) -> Plan:
    """Every frame stays."""
    return Plan(tuple(range(held)))


def window(held: int, new: int, *, size: int) -> Plan:
    """The last `size` frames, the new ones counted in."""
    return static_sink(held, new, size=size, sink=0)


def static_sink(held: int, new: int, *, size: int, sink: int, stay: tuple[int, ...] = ()) -> Plan:
    """The first `sink` frames and those in `stay` are kept; of the others, the latest that fit into `size` beside them and the new ones."""
    free = [slot for slot in range(sink, held) if slot not in stay]
    over = max(0, held + new - size)
    if over > len(free):
        raise ValueError(f"a window of {size} frames with a sink of {sink + len(stay)} has no room for {new} new ones")
    return Plan(tuple(slot for slot in range(held) if slot not in free[:over]))


def ema_sink(held: int, new: int, *, size: int, sink: int, mismatch: str = "average") -> Plan:
    """As `static_sink`, and every frame that leaves is averaged into the sink (paper Eq. 5 to 8).

    The paper evicts a chunk of as many frames as the sink has, frame by frame. Where the sizes differ, the i-th evicted
    frame goes to sink slot i modulo `sink`; with `mismatch` "overwrite" the first evicted frames replace the first sink
    frames instead, without any average, as the released code does (D-12).
    """
    plan = static_sink(held, new, size=size, sink=sink)
    gone = [slot for slot in range(held) if slot not in plan.keep]
    if mismatch == "overwrite" and len(gone) != sink:
        return Plan(plan.keep, overwrite=tuple((slot, i) for i, slot in enumerate(gone[:sink])))
    return Plan(plan.keep, tuple((slot, i % sink) for i, slot in enumerate(gone)))


POLICIES: dict[str, Callable[..., Plan]] = {"full": full, "window": window, "static_sink": static_sink, "ema_sink": ema_sink}


def plan(cfg: CacheCfg, held: int, new: int, stay: tuple[int, ...] = ()) -> Plan:
    """The plan of the configured policy; `stay` are slots beside the sink's that a shot keeps."""
    settings = {"size": cfg.window, "sink": cfg.sink, "mismatch": cfg.mismatch if cfg.policy == "ema_sink" else None, "stay": stay or None}
    return POLICIES[cfg.policy](held, new, **{name: value for name, value in settings.items() if value is not None})


def runs(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """(first, last + 1) of each stretch of rows in which every number is one more than in the row before."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row != tuple(number + 1 for number in rows[i - 1])]
    return list(itertools.pairwise([*starts, len(rows)]))


@dataclass(frozen=True)
class View:
    """What a chunk in work is to the cache, the same in all passes and layers."""

    rotation: Tensor  # of its own tokens
    targets: list[list[tuple[slice, Tensor, Tensor, Tensor]]]  # per layer and piece: its tokens, and where their rotated and raw keys and values go
    rows: Tensor  # where its tokens are kept
    key: tuple[int, ...]  # views of one cache that agree in it differ in `rotation` alone
    seen: list[tuple[Tensor, Tensor]]  # per layer, the keys and values that it attends to: slots are handed out lowest first, so they come first


@dataclass(frozen=True)
class Move:
    """What a chunk that comes in does to the stored frames, the same in all layers."""

    merges: tuple[tuple[slice, slice, slice], ...] = ()  # evicted tokens, those of the sink that they are averaged into, and the average's own
    alpha: float = 0.0  # share of the old sink
    gather: tuple[tuple[int, int, slice], ...] = ()  # pieces of the sink, when it is folded into for the first time
    turns: tuple[tuple[slice, Tensor], ...] = ()  # kept tokens whose keys are rotated anew

    @property
    def key(self) -> tuple[object, ...]:
        """Moves that agree in it differ in rotations alone."""
        slices = [piece for merge in self.merges for piece in merge] + [piece for *_, piece in self.gather] + [tokens for tokens, _ in self.turns]
        return self.alpha, len(self.merges), len(self.gather), *((piece.start, piece.stop) for piece in slices)


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


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _rows(slots: tuple[int, ...], tokens: int, device: torch.device) -> Tensor:
    """The tokens of slots, one behind the other."""
    return to_device(torch.cat([torch.arange(slot * tokens, (slot + 1) * tokens) for slot in slots]), device)


def room(cfg: CacheCfg, latents: int) -> int:
    """Frames that the cache of a clip of `latents` latent frames holds at a time."""
    return latents if cfg.window is None else min(cfg.window, max(latents, cfg.sink or 0))


Gradients = Literal["detached", "in_place"]


class KVCache:
    """Keys and values of the frames that a chunk may look back at, for all layers of one batch of clips.

    Per chunk: `begin(frames)` once, then any number of passes, each calling `extend` once per layer; every pass overwrites
    what the pass before wrote, so that later chunks see the last one (the clean pass).

    With `rope: relative` keys are stored raw and numbered 0, 1, 2, ... from the oldest held frame; the numbers change only
    when a chunk begins, so held keys are rotated once per chunk and layer and not in every pass. With `rope: absolute`
    only rotated keys are stored.

    `gradients` is about passes under autograd. "detached": what is read from the cache carries none. "in_place": what is
    read has the values of the clean pass, and its gradient flows to what the last pass under autograd made of the same
    frame (D-34). That is what writing to the cache in place does to autograd in the released training code.
    """

    def __init__(self, cfg: CacheCfg, shape: CacheShape, *, dtype: torch.dtype, device: torch.device, gradients: Gradients = "detached") -> None:
        self.cfg = cfg
        self.shape = shape
        self.gradients = gradients
        self.tokens = shape.height * shape.width
        slots = room(cfg, shape.latents)
        size = (shape.batch, slots * self.tokens, shape.heads, shape.head_dim)

        def buffers() -> list[Tensor]:
            return [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]

        self.rotated, self.values = buffers(), buffers()
        self.raw = buffers() if cfg.rope == "relative" else self.rotated
        self.sinks: list[tuple[Tensor, Tensor]] = []  # sink K and V in `fold_dtype`; they count once something was folded
        if cfg.fold_dtype is not None:
            size, folded = (shape.batch, (cfg.sink or 0) * self.tokens, shape.heads, shape.head_dim), getattr(torch, cfg.fold_dtype)
            self.sinks = [
                (torch.zeros(size, dtype=folded, device=device), torch.zeros(size, dtype=folded, device=device)) for _ in range(shape.layers)
            ]
        self.slots = slots
        self.restart()

    def memory(self) -> list[Tensor]:
        """All that passes change: keys and values of every layer, and the sinks' averages."""
        return [*self.rotated, *self.values, *(() if self.raw is self.rotated else self.raw), *(part for pair in self.sinks for part in pair)]

    def restart(self) -> None:
        """Forget the clip: as new, but the same memory."""
        for buffer in (*self.rotated, *self.values, *(() if self.raw is self.rotated else self.raw)):
            buffer.zero_()
        self.folded = False
        self.free = list(range(self.slots))
        self.held: list[int] = []  # physical slot of each held frame, oldest first; the chunk in work comes last
        self.numbers: list[int] = []  # which frame of the clip each held frame is
        self.traces: dict[int, list[tuple[Tensor, Tensor]]] = {}  # "in_place": physical slot -> per layer, K and V under autograd, K as in `raw`
        self.chunk = 0  # frames of the chunk in work
        self.frames = 0  # frames that ever began
        self.shot: int | None = None  # frame that the shot began with; None: the clip's first shot, whose sink is the clip's
        self.offset = 0  # frames by which positions are ahead of numbers
        self.view = self.before = View(torch.empty(0), [], torch.empty(0), (), [])  # of the chunk in work, and of the one before it
        self.move = Move()  # of the chunk in work

    def begin(self, frames: int, *, cut: bool = False, carried: bool = True) -> None:
        """Make room for a chunk of `frames` frames: evict, fold, renumber.

        Unless `carried`, the stored frames stay as they are until `carry` was called for every layer: the clean pass of the
        chunk before may go on in `before` meanwhile, one layer ahead.

        With `cut` the chunk begins a shot (`shot_offset`): from then on positions are further ahead, and once the chunk is past, its
        first frames stay in place of those of the shot before, beside the clip's own sink (arXiv:2605.18739, NVlabs/LongLive@7860ad9).

        Raises:
            ValueError: the chunk does not fit into the window, or a `full` cache is longer than the clip it was made for.
        """
        shot = range(0) if self.shot is None else range(self.shot, self.shot + (self.cfg.sink or 0))
        step = plan(self.cfg, len(self.held), frames, tuple(slot for slot, number in enumerate(self.numbers) if number in shot))
        if cut:
            assert self.cfg.shot_offset is not None
            self.shot, self.offset = self.frames, self.offset + self.cfg.shot_offset
        folds = [(self.held[gone], self.held[sink], sink) for gone, sink in step.fold or step.overwrite]
        alpha = (self.cfg.alpha or 0.0) if step.fold else 0.0
        for gone, sink, _ in folds:
            self._merge_traces(gone, sink, alpha)
        pieces = self._runs(self.held[: self.cfg.sink]) if folds and not self.folded else []
        self.folded = self.folded or bool(folds)
        kept = [self.held[slot] for slot in step.keep]
        self.free = sorted(self.free + [slot for slot in self.held if slot not in kept])
        if frames > len(self.free):
            raise ValueError(f"the cache has {len(self.free)} free frame slots and {frames} frames come in")
        self.traces = {slot: trace for slot, trace in self.traces.items() if slot in kept}
        self.held = kept + self.free[:frames]
        self.free = self.free[frames:]
        self.numbers = [self.numbers[slot] for slot in step.keep] + list(range(self.frames, self.frames + frames))
        self.chunk = frames
        self.frames += frames
        merges = tuple(tuple(self._tokens(number, last - first) for number in folds[first]) for first, last in runs(folds))
        self.move = Move(cast(tuple[tuple[slice, slice, slice], ...], merges), alpha, tuple(pieces), self._turns(len(kept)))
        self.before, self.view = self.view, self._view(len(kept))
        if carried:
            for layer in range(self.shape.layers):
                self.carry(layer)

    def carry(self, layer: int) -> None:
        """Do to the stored frames of a layer what `begin` left to be done: fold into the sink, then rotate what is kept to its new positions."""
        move, raw, values, rotated = self.move, self.raw[layer], self.values[layer], self.rotated[layer]
        for buffer, average in zip((raw, values), self.sinks[layer] if move.merges else (), strict=False):
            for first, last, tokens in move.gather:
                average[:, first * self.tokens : last * self.tokens] = buffer[:, tokens]
            for evicted, sink, own in move.merges:  # sink = alpha sink + (1 - alpha) evicted, raw keys and values alike
                part = average[:, own]
                part.mul_(move.alpha).add_(buffer[:, evicted].to(part.dtype) * (1 - move.alpha))
                buffer[:, sink] = part
        for tokens, rotation in move.turns:
            rotated[:, tokens] = rotate(raw[:, tokens], rotation)

    def rewind(self) -> list[int]:
        """Forget all frames but the sink's, so that they can be brought in again; their numbers in the clip, in order."""
        sink = min(self.cfg.sink or 0, len(self.held))
        gone = self.numbers[sink:]
        self.free = sorted(self.free + self.held[sink:])
        self.held, self.numbers = self.held[:sink], self.numbers[:sink]
        self.frames -= len(gone)
        return gone

    def extend(self, layer: int, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put the chunk's raw keys and values in place; the rotated queries and all keys and values to attend to.

        When gradients are recorded, the stored tensors are left alone, so that autograd's copies stay valid.

        Returns:
            queries [B, S, H, D], keys [B, K, H, D], values [B, K, H, D].
        """
        if not torch.is_grad_enabled():
            return self.put(layer, torch.stack((q_BSHD, k_BSHD), 2), v_BSHD, self.view, raw=True)
        queries, keys = rotate(q_BSHD, self.view.rotation), rotate(k_BSHD, self.view.rotation)
        first = len(self.held) - self.chunk
        if self.gradients == "in_place":
            self._trace(layer, self.held[first:], k_BSHD if self.cfg.rope == "relative" else keys, v_BSHD)
        past_k, past_v = self._past(layer, first)
        nothing = [torch.zeros_like(keys[:, : self.tokens])] * self._empty()
        return queries, torch.cat([*past_k, keys, *nothing], 1), torch.cat([*past_v, v_BSHD, *nothing], 1)

    def kept(self, layer: int) -> KVCache:
        """What one layer reads now, of the chunk in work, to be read again when the cache has moved on: no more than that is copied and held."""
        past, then = self.held[: len(self.held) - self.chunk], copy.copy(self)
        for name in ("rotated", "values"):
            buffer = getattr(self, name)[layer]
            setattr(then, name, [torch.cat([buffer[:, :0], *self._read(buffer, past)], 1)] * self.shape.layers)
        then.raw, then.sinks, then.before, then.move = [], [], View(torch.empty(0), [], torch.empty(0), (), []), Move()
        then.view = dataclasses.replace(self.view, targets=[], seen=[])
        then.held = list(range(len(self.held)))
        then.traces = {place: self.traces[slot] for place, slot in enumerate(self.held) if slot in self.traces}
        return then

    def put(self, layer: int, qk_BS2HD: Tensor, v_BSHD: Tensor, view: View, *, raw: bool) -> tuple[Tensor, Tensor, Tensor]:
        """As `extend`, without gradients: raw queries and keys in one tensor, for the chunk in work or the one before it.

        Later chunks need the `raw` keys of the clean pass, and nobody those of another.
        """
        queries, keys = rotate(qk_BS2HD, view.rotation.unsqueeze(1)).unbind(2)
        targets = view.targets[layer]
        for own, rotated, unrotated, values in targets:
            parts = (keys, v_BSHD) if len(targets) == 1 else (keys[:, own], v_BSHD[:, own])
            rotated.copy_(parts[0])
            values.copy_(parts[1])
            if raw and self.cfg.rope == "relative":
                unrotated.copy_(qk_BS2HD[:, own, 1])
        return queries, *view.seen[layer]

    def _empty(self) -> int:
        """Slots of the sink that no frame fills yet, where those are attended to: they hold zeros, right behind the held ones."""
        return max(0, (self.cfg.sink or 0) - len(self.held)) if self.cfg.empty_sink == "attended" else 0

    def _rotation(self, first: int, last: int, device: torch.device) -> Tensor:
        positions = tuple(range(first, last)) if self.cfg.rope == "relative" else tuple(number + self.offset for number in self.numbers[first:last])
        return rotations(positions, self.shape.height, self.shape.width, self.shape.head_dim, device)

    def _turns(self, kept: int) -> tuple[tuple[slice, Tensor], ...]:
        """The kept frames at their new positions, where positions change."""
        device = self.values[0].device
        found = self._runs(self.held[:kept]) if self.cfg.rope == "relative" else []
        return tuple((tokens, self._rotation(first, last, device)) for first, last, tokens in found)

    def _view(self, kept: int) -> View:
        """Of the chunk in work, which comes behind the kept frames."""
        used = (len(self.held) + self._empty()) * self.tokens
        pieces = [(slice(first * self.tokens, last * self.tokens), tokens) for first, last, tokens in self._runs(self.held[kept:])]
        buffers = list(zip(self.rotated, self.raw, self.values, strict=True))
        device, slots = self.values[0].device, tuple(self.held[kept:])
        return View(
            self._rotation(kept, len(self.held), device),
            [[(own, rotated[:, tokens], raw[:, tokens], values[:, tokens]) for own, tokens in pieces] for rotated, raw, values in buffers],
            _rows(slots, self.tokens, device),
            (*slots, used),
            [(rotated[:, :used], values[:, :used]) for rotated, _, values in buffers],
        )

    def _merge_traces(self, gone: int, sink: int, alpha: float) -> None:
        """The sink's gradient flows to both of which it is the average; a frame without a trace takes none."""
        old, new = ([(share * k, share * v) for k, v in self.traces.get(slot, ())] for share, slot in ((alpha, sink), (1 - alpha, gone)))
        if old and new:
            self.traces[sink] = [(k1 + k2, v1 + v2) for (k1, v1), (k2, v2) in zip(old, new, strict=True)]
        elif old or new:
            self.traces[sink] = old or new

    def _trace(self, layer: int, slots: list[int], k_BSHD: Tensor, v_BSHD: Tensor) -> None:
        """Remember what a pass under autograd made of the chunk, frame by frame."""
        for slot, k, v in zip(slots, k_BSHD.split(self.tokens, 1), v_BSHD.split(self.tokens, 1), strict=True):
            self.traces[slot] = [*self.traces.get(slot, [])[:layer], (k, v)]

    def _past(self, layer: int, frames: int) -> tuple[list[Tensor], list[Tensor]]:
        """Rotated keys, and values, of the first `frames` held frames."""
        if self.gradients == "detached":
            return self._read(self.rotated[layer], self.held[:frames]), self._read(self.values[layer], self.held[:frames])
        past_k, past_v = [], []
        for place, slot in enumerate(self.held[:frames]):
            k, v = self.rotated[layer][:, self._tokens(slot)], self.values[layer][:, self._tokens(slot)]
            if slot in self.traces:
                trace_k, trace_v = self.traces[slot][layer]
                if self.cfg.rope == "relative":
                    trace_k = rotate(trace_k, self._rotation(place, place + 1, k.device))
                k, v = k + (trace_k - trace_k.detach()), v + (trace_v - trace_v.detach())
            past_k.append(k)
            past_v.append(v)
        return past_k, past_v

    def _tokens(self, slot: int, frames: int = 1) -> slice:
        return slice(slot * self.tokens, (slot + frames) * self.tokens)

    def _runs(self, slots: list[int]) -> list[tuple[int, int, slice]]:
        """Neighbouring physical slots as one piece: (first, last + 1) in the given list, and their tokens."""
        return [(first, last, self._tokens(slots[first], last - first)) for first, last in runs([(slot,) for slot in slots])]

    def _read(self, buffer: Tensor, slots: list[int]) -> list[Tensor]:
        return [buffer[:, tokens] for _, _, tokens in self._runs(slots)] if slots else []
