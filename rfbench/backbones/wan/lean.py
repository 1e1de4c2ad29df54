"""The Wan2.1 diffusion transformer for streaming: what `WanDiT` computes, without what a pass without gradients can leave out.

A stream has one text and a few timesteps, which all tokens of a pass share, and of its clean pass only keys and values are
wanted. So more is known beforehand than `WanDiT.forward` may assume. Weights are read where the model keeps them. With `DiTCfg.float8`
or `eight` products or attention are approximate, see `rfbench.backbones.wan.float8`: the one thing here that is more than a shortcut.

All tokens of a pass are rows of one matrix, clip by clip; where a clean pass goes along with the next chunk's first step, its rows come first.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, S tokens of a chunk, R rows, M width, h heads, D head width,
G chunks in a pass.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rfbench import proof
from rfbench.attention import attend, rotate, rotations
from rfbench.backbones.wan import float8, trials
from rfbench.backbones.wan.dit import Block, Cache, Eight, TextKV, WanDiT
from rfbench.backbones.wan.graphs import Graphs
from rfbench.cache import CacheShape, KVCache, Move, room
from rfbench.config import CacheCfg
from rfbench.errors import UserError
from rfbench.settings import Shortcuts as Shortcuts

SHORTCUTS = Shortcuts()
ON = {"columns": "cpu", "sigmoid": "cpu", **dict.fromkeys(("kernels", "graphs", "bytes", "copies"), "cuda")}  # the others are for every device
SMALL = 2**20  # elements of a weight
SLOPE = 2 * (2 / torch.pi) ** 0.5  # GELU's tangent form is x sigmoid(SLOPE (x + 0.044715 x^3))


NEEDS = {"kernels": "merged", "graphs": "modulation"}  # shortcuts that another one is part of


def usable(device: torch.device) -> list[str]:
    """The shortcuts that do something on a device, in the order of the ladder."""
    missing = {"kernels"} if importlib.util.find_spec("triton") is None else set[str]()
    return [field.name for field in fields(Shortcuts) if ON.get(field.name, device.type) == device.type and field.name not in missing]


def taken(shortcuts: Shortcuts, device: torch.device) -> list[str]:
    """The shortcuts that are taken on a device; what rfbench.toml leaves open, if what it is built on is taken, and unless it has failed already.

    Raises:
        UserError: one is asked for that this device cannot take, or without another one that it is built on.
    """
    asked, possible = {field.name: getattr(shortcuts, field.name) for field in fields(shortcuts)}, usable(device)
    for name, wanted in asked.items():
        if wanted and name not in possible:
            why = f"is for device '{ON[name]}' and this is '{device.type}'" if ON.get(name, device.type) != device.type else "needs package triton"
            raise UserError(f"[fast] shortcut '{name}' {why}; leave it out of rfbench.toml")
        if wanted and not asked.get(NEEDS.get(name, name)):
            raise UserError(f"[fast] shortcut '{name}' is built on '{NEEDS[name]}', which is switched off; switch both on or both off")
    if asked["kernels"] is None and ON.get("kernels", device.type) == device.type and "kernels" not in possible:
        proof.leave_out("kernels", "needs package triton", asked=None)
    open_ = [name for name in possible if asked[name] is None and asked.get(NEEDS.get(name, name)) is not False and name not in proof.left_out]
    return [name for name in possible if asked[name] or name in open_]


@dataclass(frozen=True)
class Product:
    """x W^T + b, in the dtype of the weights."""

    weight_KN: Tensor
    bias: Tensor

    def __call__(self, x_RK: Tensor) -> Tensor:
        return torch.addmm(self.bias, x_RK if x_RK.dtype == self.bias.dtype else x_RK.to(self.bias.dtype), self.weight_KN)


Times = Callable[[Any], Tensor]  # a `Product`, or a `float8.Product8`, which takes `Rows8` too
Rows = Tensor | float8.Rows8


@dataclass(frozen=True)
class Layer:
    """The weights of a block."""

    qkv: tuple[Times, ...]  # three, or one for all
    norm_qk: Tensor  # [2, M]
    o: Times
    norm3: tuple[Tensor, Tensor]
    cross_q: Times
    cross_norm_q: Tensor
    cross_o: Times
    up: Times
    down: Times


Look = Callable[[int, int, bool], tuple[Tensor, Tensor, Tensor]]  # layer, chunk of the pass, keep raw keys -> queries, all keys and values
Six = tuple[Tensor, ...]  # of a block: shift, gain, gate of attention, then of the feed-forward, each [M], or of two timesteps [2, 1, M]
Tables = tuple[list[Six], tuple[Tensor, Tensor]]  # of every block; shift and gain of the head


class LeanDiT:
    """A model as streams run it, one after the other; its weights must not change meanwhile.

    `attention` names a kernel (`rfbench.attention.KERNELS`); without it, it is the one of this process.

    Raises:
        UserError: a shortcut is asked for that its device cannot take.
    """

    @torch.no_grad()
    def __init__(
        self, model: WanDiT, shortcuts: Shortcuts = SHORTCUTS, *, eight: Collection[Eight] | None = None, attention: str | None = None
    ) -> None:
        self.model, self.shortcuts = model, shortcuts
        approximate = model.cfg.float8 if eight is None else eight
        self.eight, self.looks_by_eight = "products" in approximate, "attention" in approximate
        self.eps, self.size, self.heads = model.cfg.eps, (model.cfg.dim,), (model.cfg.num_heads, model.cfg.head_dim)
        device = model.head.modulation.device
        self.floor, self.slope = torch.tensor(model.cfg.eps, device=device), torch.tensor(SLOPE, device=device)
        chosen = taken(shortcuts, device)
        self.sigmoid = "sigmoid" in chosen
        self.kernels = dict[str, proof.Kernel]()
        if "kernels" in chosen:
            self.kernels = trials.proven(self)
        self.chosen = [name for name in chosen if name != "kernels" or self.kernels]
        self.graphs = Graphs(asked=shortcuts.graphs) if "graphs" in chosen else None
        self.caches: list[tuple[tuple[CacheCfg, CacheShape, dict[str, Any]], KVCache]] = []  # of streams that ended, with what they were made for
        laid = functools.partial(product, columns="columns" in chosen)
        of_blocks: Callable[..., Times] = laid
        if self.eight:
            of_blocks = functools.partial(float8.product, quantise=self.kernels.get("quantised", float8.quantised))
        self.attend_text = functools.partial(attend, by=attention)
        self.attend: Callable[..., Tensor] = self.attend_text
        if self.looks_by_eight:
            self.attend = functools.partial(float8.attend, quantise=self.kernels.get("quantised_heads", float8.quantised_heads))
        self.layers = [read(cast(Block, block), of_blocks, merged="merged" in chosen) for block in model.blocks]
        self.head = laid(model.head.head)
        self.tables: dict[tuple[float, ...], Tables] = {}  # of the timesteps that were taken
        self.mode: Any = torch.inference_mode if shortcuts.untracked else torch.no_grad

    @property
    def taken(self) -> list[str]:
        """The shortcuts that are taken; a recording that has failed meanwhile took all of them along."""
        return [name for name in self.chosen if name not in proof.left_out]

    def __call__(self, x_BFCHW: Tensor, t: float, text: TextKV, cache: Cache | None, *, kept: bool = False) -> Tensor:
        """The flow of noisy frames that are all at timestep `t`: [B, F, C, H, W]. See `WanDiT.forward`.

        Unless `kept`, what it leaves in the cache is for this pass alone: a clean pass comes before the next chunk.
        """
        flow = self._pass([x_BFCHW], (t,), text, cache, clean=False, kept=kept)
        assert flow is not None
        return flow

    def fill(self, clean_BFCHW: Tensor, text: TextKV, cache: Cache) -> None:
        """The clean pass: it leaves keys and values in the cache."""
        self._pass([clean_BFCHW], (0.0,), text, cache, clean=True, kept=False)

    def fill_and_step(self, clean_BFCHW: Tensor, x_BFCHW: Tensor, t: float, text: TextKV, cache: KVCache) -> Tensor:
        """`fill` with a chunk, then the flow of the next one, in one pass. `cache` has begun the next chunk and not yet carried it out.

        Layer by layer, the next chunk looks at what the clean one has left just before, so nothing is other than in two passes.
        """
        flow = self._pass([clean_BFCHW, x_BFCHW], (0.0, t), text, cache, clean=True, kept=False)
        assert flow is not None
        return flow

    def cache(self, cfg: CacheCfg, shape: CacheShape, **options: Any) -> KVCache:
        """A `KVCache` for one stream; in the memory of one that ended, if there are recordings that know where that is."""
        shape = replace(shape, latents=room(cfg, shape.latents))  # clips of any length share a window
        self.caches[:] = [(key, cache) for key, cache in self.caches if key[1].batch == shape.batch]  # for those of others there may be no room
        for number, (key, cache) in enumerate(self.caches):
            if key == (cfg, shape, options):
                del self.caches[number]
                cache.restart()
                return cache
        return KVCache(cfg, shape, **options)

    def done(self, cache: KVCache) -> None:
        """A stream has ended, whether all of it was made or not."""
        if "graphs" in self.taken:
            made = {"dtype": cache.values[0].dtype, "device": cache.values[0].device, "gradients": cache.gradients}
            self.caches.append(((cache.cfg, cache.shape, made), cache))

    def _pass(
        self, chunks: Sequence[Tensor], times: tuple[float, ...], text: TextKV, cache: Cache | None, *, clean: bool, kept: bool
    ) -> Tensor | None:
        """The flow of the last chunk; none after a clean pass for itself."""

        def work(chunks: Sequence[Tensor], text: TextKV) -> Tensor | None:
            blocks, (shift, gain) = self._tables(times)
            rows = self._rows(chunks, blocks, text, cache, clean=clean, kept=kept)
            if clean and len(chunks) == 1:
                return None
            if len(chunks) > 1:
                shift, gain, rows = shift[1, 0], gain[1, 0], rows if self.shortcuts.context else rows[rows.shape[0] // 2 :]
            return self._flow(chunks[-1], rows, (shift, gain))

        with self.mode():
            if self.graphs is None or not isinstance(cache, KVCache):
                return work(chunks, text)
            return self._replayed(self.graphs, work, chunks, (times, clean, kept), text, cache)

    def _replayed(self, graphs: Graphs, work: Any, chunks: Sequence[Tensor], what: tuple[Any, ...], text: TextKV, cache: KVCache) -> Tensor | None:
        """A pass by its recording: chunks, text, rotations and rows are taken in, the cache's memory and everything else is always the same."""
        move, views = (cache.move, (cache.before, cache.view)) if len(chunks) > 1 else (Move(), (cache.view, cache.view))
        self._tables(what[0])

        def replaced(inputs: Sequence[Tensor]) -> Tensor | None:
            left, before = iter(inputs[len(chunks) :]), (cache.before, cache.view, cache.move)
            cache.before, cache.view = (replace(view, rotation=next(left), rows=next(left)) for view in views)
            cache.move = replace(move, turns=tuple((tokens, next(left)) for tokens, _ in move.turns))
            try:
                return cast(Tensor | None, work(inputs[: len(chunks)], [(next(left), next(left)) for _ in text]))
            finally:
                cache.before, cache.view, cache.move = before

        constant = [*(table for view in views for table in (view.rotation, view.rows)), *(rotation for _, rotation in move.turns)]
        key = (what, *(view.key for view in views), move.key, *(tuple(chunk.shape) for chunk in chunks), text[0][0].shape)
        return graphs.run(cache, key, replaced, chunks, constant, [part for pair in text for part in pair])

    def _flow(self, x_BFCHW: Tensor, rows_RM: Tensor, head: tuple[Tensor, Tensor]) -> Tensor:
        """What the head makes of the rows that leave the last layer."""
        (batch, frames), (_, rows, columns) = x_BFCHW.shape[:2], self.model.cfg.patch
        out = self.head(self._modulate(rows_RM, *head)).view(batch, frames, rows_RM.shape[0] // (batch * frames), -1)
        return self.model.unpatch(out, x_BFCHW.shape[-2] // rows, x_BFCHW.shape[-1] // columns)

    def _rows(
        self, chunks: Sequence[Tensor], blocks: list[Six], text: TextKV, cache: Cache | None, *, clean: bool = False, kept: bool = False
    ) -> Tensor:
        """The rows that leave the last layer. With `clean` the first chunk only fills the cache; nothing of it is wanted in the end."""
        batch = chunks[0].shape[0]
        x_RM = self.model.embed_patches(torch.cat(list(chunks)) if len(chunks) > 1 else chunks[0]).flatten(0, 2)
        size = (len(chunks), batch, x_RM.shape[0] // (len(chunks) * batch))
        rotation = self._rotation(chunks[0]) if cache is None else None
        h_RM = self._modulate(x_RM, blocks[0][0], blocks[0][1], self.eight)
        for number, (layer, six, text_kv) in enumerate(zip(self.layers, blocks, text, strict=True)):
            _, _, gate1, shift2, gain2, gate2 = six
            look = self._looking(layer, h_RM, size, cache, rotation)
            dropped = clean and self.shortcuts.context and number == len(self.layers) - 1
            seen = list[Tensor]()
            for place in range(len(chunks)):
                if place:
                    cast(KVCache, cache).carry(number)
                looked = look(number, place, kept or (clean and not place))
                if place or not dropped:
                    seen.append(self.attend(*looked))
            if dropped:
                if not place:
                    break
                x_RM = x_RM[x_RM.shape[0] // 2 :]
                gate1, shift2, gain2, gate2 = (table[1, 0] for table in (gate1, shift2, gain2, gate2))
            out = layer.o((seen[0] if len(seen) == 1 else torch.cat(seen)).reshape(x_RM.shape))
            x_RM, h_RM = self._add_and_norm(x_RM, gate1, out, *reversed(layer.norm3))
            out = layer.cross_o(self._read(self._norm(layer.cross_q(h_RM), layer.cross_norm_q), size[1:], text_kv))
            x_RM, h_RM = self._add_and_norm(x_RM, None, out, shift2, gain2)
            out = layer.down(self._gelu(layer.up(h_RM)))
            if number == len(self.layers) - 1:
                return self._gated(x_RM, gate2, out)
            x_RM, h_RM = self._add_and_norm(x_RM, gate2, out, *blocks[number + 1][:2])  # what the next layer begins with
        return x_RM

    def _looking(self, layer: Layer, x_RM: Rows, size: tuple[int, int, int], cache: Cache | None, rotation: Tensor | None) -> Look:
        """How each chunk of a pass puts its keys and values in place and looks around."""
        if (kernel := self.kernels.get("place")) is not None and isinstance(cache, KVCache):
            qkv = layer.qkv[0](x_RM).view(size[0], size[1] * size[2], -1)

            def placed(number: int, chunk: int, raw: bool) -> tuple[Tensor, Tensor, Tensor]:
                view = cache.view if chunk + 1 == size[0] else cache.before
                unrotated = cache.raw[number] if raw and cache.cfg.rope == "relative" else None
                given = (view.rotation, view.rows, cache.rotated[number], unrotated, cache.values[number])
                return kernel(qkv[chunk], layer.norm_qk, self.eps, *given), *view.seen[number]

            return placed
        qk_R2M, v_RM = self._project(layer, x_RM)
        qk, v = qk_R2M.view(*size, 2, *self.heads), v_RM.view(*size, *self.heads)

        def look(number: int, chunk: int, raw: bool) -> tuple[Tensor, Tensor, Tensor]:
            if isinstance(cache, KVCache):
                return cache.put(number, qk[chunk], v[chunk], cache.view if chunk + 1 == size[0] else cache.before, raw=raw)
            if cache is not None:
                return cache.extend(number, qk[chunk, :, :, 0], qk[chunk, :, :, 1], v[chunk])
            assert rotation is not None
            queries, keys = rotate(qk[chunk], rotation.unsqueeze(1)).unbind(2)
            return queries, keys, v[chunk]

        return look

    def _read(self, query_RM: Tensor, size: tuple[int, int], text_kv: tuple[Tensor, Tensor]) -> Tensor:
        """What rows find in the text: [R, M]. Chunks of one clip look at the same text; with several clips, each chunk for itself."""
        if size[0] == 1:
            return self.attend_text(query_RM.view(1, -1, *self.heads), *text_kv).reshape(query_RM.shape)
        return torch.cat([self.attend_text(chunk, *text_kv) for chunk in query_RM.view(-1, *size, *self.heads)]).reshape(query_RM.shape)

    def _project(self, layer: Layer, x_RM: Rows) -> tuple[Tensor, Tensor]:
        """Normalised queries and keys [R, 2, M], and values [R, M]."""
        if self.shortcuts.merged:
            qkv = layer.qkv[0](x_RM).view(-1, 3, *self.size)
            return self._norm(qkv[:, :2], layer.norm_qk), qkv[:, 2]
        q, k, v = (part(x_RM) for part in layer.qkv)
        return torch.stack([self._norm(part, gain) for part, gain in zip((q, k), layer.norm_qk, strict=True)], 1), v

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """RMS norm over the width, times a gain [M] or [2, M]."""
        if gain.ndim == 1 and (kernel := self.kernels.get("rms_norm")) is not None:
            return cast(Tensor, kernel(x, gain, self.eps))
        if not self.shortcuts.fused:
            return functional.rms_norm(x.to(gain.dtype), self.size, eps=self.eps) * gain
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        normed = torch.addcmul(self.floor, size, size, value=1 / self.size[0]).rsqrt_().mul(x)
        return (normed if normed.dtype == gain.dtype else normed.to(gain.dtype)).mul_(gain)

    def _modulate(self, x_RM: Tensor, shift: Tensor, gain: Tensor, eight: bool = False) -> Any:
        """LN(x) gain + shift; with `eight`, for a product of 8-bit floats, and kernels already quantised."""
        if (kernel := self.kernels.get("modulate")) is not None:
            return kernel(x_RM, shift, gain, self.eps, eight=eight)
        if self.shortcuts.fused and x_RM.dtype == gain.dtype and gain.ndim == 1:
            return torch.layer_norm(x_RM, self.size, gain, shift, self.eps)
        normed = torch.layer_norm(x_RM, self.size, eps=self.eps)
        return torch.addcmul(shift, _split(normed, gain), gain).view(x_RM.shape)

    def _add_and_norm(self, x_RM: Tensor, gate: Tensor | None, y_RM: Tensor, shift: Tensor, gain: Tensor) -> tuple[Tensor, Any]:
        """x + gate y, or x + y, and the modulated norm of it, for a product of the block."""
        if (kernel := self.kernels.get("add_and_modulate")) is not None:
            return cast(tuple[Tensor, Any], kernel(x_RM, gate, y_RM, shift, gain, self.eps, eight=self.eight))
        total = x_RM + y_RM if gate is None else self._gated(x_RM, gate, y_RM)
        return total, self._modulate(total, shift, gain)

    def _gated(self, x_RM: Tensor, gate: Tensor, y_RM: Tensor) -> Tensor:
        """x + gate y."""
        if not self.shortcuts.fused:
            return (_split(x_RM, gate) + gate * _split(y_RM, gate)).view(x_RM.shape)
        return torch.addcmul(x_RM, gate, y_RM) if gate.ndim == 1 else torch.addcmul(_split(x_RM, gate), gate, _split(y_RM, gate)).view(x_RM.shape)

    def _gelu(self, x: Tensor) -> Rows:
        if self.eight and (kernel := self.kernels.get("quantised")) is not None:
            return cast(float8.Rows8, kernel(x, gelu=True))
        if not self.sigmoid:
            return functional.gelu(x, approximate="tanh")
        return torch.addcmul(self.slope, x, x, value=0.044715 * SLOPE).mul_(x).sigmoid_().mul_(x)

    def _tables(self, times: tuple[float, ...]) -> Tables:
        """What timesteps do to every block and to the head."""
        if times in self.tables:
            return self.tables[times]
        if len(times) > 1:
            each = [self._tables((t,)) for t in times]
            blocks = [
                tuple(torch.stack(parts)[:, None] for parts in zip(*sixes, strict=True)) for sixes in zip(*(one[0] for one in each), strict=True)
            ]
            shift, gain = (torch.stack(parts)[:, None] for parts in zip(*(one[1] for one in each), strict=True))
            found: Tables = (blocks, (shift, gain))
        else:
            found = self._embed(times[0])
        if self.shortcuts.modulation:
            self.tables[times] = found
        return found

    def _embed(self, t: float) -> Tables:
        model = self.model
        time, six = model.embed_time(torch.full((1, 1), t, dtype=torch.float64, device=model.head.modulation.device))
        blocks = list[Six]()
        for block in model.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = (cast(Block, block).modulation + six).view(6, -1).unbind()
            blocks.append((shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2))
        shift, scale = (model.head.modulation + time.unsqueeze(2)).view(2, -1).unbind()
        return blocks, (shift, 1 + scale)

    def _rotation(self, x_BFCHW: Tensor) -> Tensor:
        """Of all tokens of a clip that is made without a cache."""
        _, rows, columns = self.model.cfg.patch
        frames, (height, width) = tuple(range(x_BFCHW.shape[1])), x_BFCHW.shape[-2:]
        return rotations(frames, height // rows, width // columns, self.model.cfg.head_dim, x_BFCHW.device)


def _split(x_RM: Tensor, table: Tensor) -> Tensor:
    """Rows by timestep, where the table has several."""
    return x_RM if table.ndim == 1 else x_RM.view(len(table), -1, x_RM.shape[-1])


def product(*linears: nn.Linear, columns: bool) -> Product:
    """The weights of linear layers, those of several one behind the other."""
    weight, bias = linears[0].weight.data.T, linears[0].bias.data
    if len(linears) > 1:
        weight, bias = torch.cat([linear.weight for linear in linears]).T, torch.cat([linear.bias for linear in linears])
    if columns and weight.numel() <= SMALL:
        weight = weight.contiguous()
    return Product(weight, bias)


def read(block: Block, laid: Callable[..., Times], *, merged: bool) -> Layer:
    """The weights of a block."""
    own, cross, (up, _, down) = block.self_attn, block.cross_attn, block.ffn
    return Layer(
        qkv=(laid(own.q, own.k, own.v),) if merged else (laid(own.q), laid(own.k), laid(own.v)),
        norm_qk=torch.stack([own.norm_q.weight, own.norm_k.weight]),
        o=laid(own.o),
        norm3=(block.norm3.weight, block.norm3.bias),
        cross_q=laid(cross.q),
        cross_norm_q=cross.norm_q.weight,
        cross_o=laid(cross.o),
        up=laid(cast(nn.Linear, up)),
        down=laid(cast(nn.Linear, down)),
    )
