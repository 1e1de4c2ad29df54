"""The Wan2.1 diffusion transformer for streaming: what `WanDiT` computes, without what a pass without gradients can leave out.

A stream has one text and a few timesteps, which all tokens of a pass share, and of its clean pass only keys and values are
wanted. So more is known beforehand than `WanDiT.forward` may assume. Weights are read where the model keeps them.

All tokens of a pass are rows of one matrix, clip by clip; where a clean pass goes along with the next chunk's first step, its rows come first.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, S tokens of a chunk, R rows, M width, h heads, D head width,
G chunks in a pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rfbench.attention import attend, rotate, rotations
from rfbench.backbones.wan.dit import Block, Cache, TextKV, WanDiT
from rfbench.cache import KVCache


@dataclass(frozen=True)
class Shortcuts:
    """Work that is left out or joined, each part for itself. The video stays the same up to rounding (`rfbench.ladder`)."""

    modulation: bool = True  # what depends on the timestep alone is computed once per stream and not in every pass
    context: bool = True  # the clean pass ends at the keys and values of the last layer
    merged: bool = True  # queries, keys and values are one product; queries and keys are normalised and rotated together
    fused: bool = True  # modulation is part of its layer norm, the gate of its residual sum; other norms take fewer operations
    columns: bool = True  # on a CPU, small weights are copied column by column: a product of few rows reads them faster
    sigmoid: bool = True  # on a CPU, GELU is taken by a sigmoid, which is faster there than a tangent
    untracked: bool = True  # tensors keep no record of views and versions, which only gradients need
    joint: bool = True  # the clean pass of a chunk goes along with the first step of the next one


SHORTCUTS = Shortcuts()
ON = {"columns": "cpu", "sigmoid": "cpu"}  # the others are for every device
SMALL = 2**20  # elements of a weight
SLOPE = 2 * (2 / torch.pi) ** 0.5  # GELU's tangent form is x sigmoid(SLOPE (x + 0.044715 x^3))


def usable(device: torch.device) -> list[str]:
    """The shortcuts that do something on a device, in the order of the ladder."""
    return [field.name for field in fields(Shortcuts) if ON.get(field.name, device.type) == device.type]


@dataclass(frozen=True)
class Product:
    """x W^T + b, in the dtype of the weights."""

    weight_KN: Tensor
    bias: Tensor

    def __call__(self, x_RK: Tensor) -> Tensor:
        return torch.addmm(self.bias, x_RK if x_RK.dtype == self.bias.dtype else x_RK.to(self.bias.dtype), self.weight_KN)


@dataclass(frozen=True)
class Layer:
    """The weights of a block."""

    qkv: tuple[Product, ...]  # three, or one for all
    norm_qk: Tensor  # [2, M]
    o: Product
    norm3: tuple[Tensor, Tensor]
    cross_q: Product
    cross_norm_q: Tensor
    cross_o: Product
    up: Product
    down: Product


Six = tuple[Tensor, ...]  # of a block: shift, gain, gate of attention, then of the feed-forward, each [M], or of two timesteps [2, 1, M]
Tables = tuple[list[Six], tuple[Tensor, Tensor]]  # of every block; shift and gain of the head


class LeanDiT:
    """A model as one stream runs it; its weights must not change meanwhile."""

    @torch.no_grad()
    def __init__(self, model: WanDiT, shortcuts: Shortcuts = SHORTCUTS) -> None:
        self.model, self.shortcuts = model, shortcuts
        self.eps, self.size, self.heads = model.cfg.eps, (model.cfg.dim,), (model.cfg.num_heads, model.cfg.head_dim)
        device = model.head.modulation.device
        self.floor, self.slope = torch.tensor(model.cfg.eps, device=device), torch.tensor(SLOPE, device=device)
        self.sigmoid = shortcuts.sigmoid and device.type == "cpu"
        self.layers = [read(cast(Block, block), shortcuts) for block in model.blocks]
        self.head = product(model.head.head, columns=shortcuts.columns)
        self.tables: dict[tuple[float, ...], Tables] = {}  # of the timesteps that were taken
        self.mode: Any = torch.inference_mode if shortcuts.untracked else torch.no_grad

    def __call__(self, x_BFCHW: Tensor, t: float, text: TextKV, cache: Cache | None, *, kept: bool = False) -> Tensor:
        """The flow of noisy frames that are all at timestep `t`: [B, F, C, H, W]. See `WanDiT.forward`.

        Unless `kept`, what it leaves in the cache is for this pass alone: a clean pass comes before the next chunk.
        """
        with self.mode():
            tables = self._tables((t,))
            return self._flow(x_BFCHW, self._rows([x_BFCHW], tables[0], text, cache, kept=kept), tables[1])

    def fill(self, clean_BFCHW: Tensor, text: TextKV, cache: Cache) -> None:
        """The clean pass: it leaves keys and values in the cache."""
        with self.mode():
            self._rows([clean_BFCHW], self._tables((0.0,))[0], text, cache, clean=True)

    def fill_and_step(self, clean_BFCHW: Tensor, x_BFCHW: Tensor, t: float, text: TextKV, cache: KVCache) -> Tensor:
        """`fill` with a chunk, then the flow of the next one, in one pass. `cache` has begun the next chunk and not yet carried it out.

        Layer by layer, the next chunk looks at what the clean one has left just before, so nothing is other than in two passes.
        """
        with self.mode():
            tables = self._tables((0.0, t))
            rows = self._rows([clean_BFCHW, x_BFCHW], tables[0], text, cache, clean=True)
            shift, gain = tables[1]
            return self._flow(x_BFCHW, rows[-rows.shape[0] // 2 :] if not self.shortcuts.context else rows, (shift[1, 0], gain[1, 0]))

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
        for number, (layer, six, text_kv) in enumerate(zip(self.layers, blocks, text, strict=True)):
            shift1, gain1, gate1, shift2, gain2, gate2 = six
            qk_R2M, v_RM = self._project(layer, self._modulate(x_RM, shift1, gain1))
            qk, v = qk_R2M.view(*size, 2, *self.heads), v_RM.view(*size, *self.heads)
            dropped = clean and self.shortcuts.context and number == len(self.layers) - 1
            seen = list[Tensor]()
            for place in range(len(chunks)):
                if place:
                    cast(KVCache, cache).carry(number)
                looked = self._look(number, qk[place], v[place], cache, rotation, joint=place + 1 < len(chunks), raw=kept or (clean and not place))
                if place or not dropped:
                    seen.append(attend(*looked))
            if dropped:
                if not place:
                    break
                x_RM = x_RM[x_RM.shape[0] // 2 :]
                gate1, shift2, gain2, gate2 = (table[1, 0] for table in (gate1, shift2, gain2, gate2))
            x_RM = self._gated(x_RM, gate1, layer.o((seen[0] if len(seen) == 1 else torch.cat(seen)).reshape(x_RM.shape)))
            query = self._norm(layer.cross_q(torch.layer_norm(x_RM, self.size, *layer.norm3, self.eps)), layer.cross_norm_q)
            x_RM = x_RM + layer.cross_o(self._read(query, size[1:], text_kv))
            x_RM = self._gated(x_RM, gate2, layer.down(self._gelu(layer.up(self._modulate(x_RM, shift2, gain2)))))
        return x_RM

    def _look(
        self, number: int, qk_BS2hD: Tensor, v_BShD: Tensor, cache: Cache | None, rotation: Tensor | None, *, joint: bool, raw: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries of a chunk, and all keys and values that it attends to; `joint`: the next chunk is in the same pass."""
        if isinstance(cache, KVCache):
            return cache.put(number, qk_BS2hD, v_BShD, cache.before if joint else cache.view, raw=raw)
        if cache is not None:
            return cache.extend(number, qk_BS2hD[:, :, 0], qk_BS2hD[:, :, 1], v_BShD)
        assert rotation is not None
        q, k = rotate(qk_BS2hD, rotation.unsqueeze(1)).unbind(2)
        return q, k, v_BShD

    def _read(self, query_RM: Tensor, size: tuple[int, int], text_kv: tuple[Tensor, Tensor]) -> Tensor:
        """What rows find in the text: [R, M]. Chunks of one clip look at the same text; with several clips, each chunk for itself."""
        chunks = query_RM.view(-1, *size, *self.heads)
        if size[0] == 1:
            return attend(chunks.flatten(0, 2).unsqueeze(0), *text_kv).reshape(query_RM.shape)
        return torch.cat([attend(chunk, *text_kv) for chunk in chunks]).reshape(query_RM.shape)

    def _project(self, layer: Layer, x_RM: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised queries and keys [R, 2, M], and values [R, M]."""
        if self.shortcuts.merged:
            qkv = layer.qkv[0](x_RM).view(-1, 3, *self.size)
            return self._norm(qkv[:, :2], layer.norm_qk), qkv[:, 2]
        q, k, v = (part(x_RM) for part in layer.qkv)
        return torch.stack([self._norm(part, gain) for part, gain in zip((q, k), layer.norm_qk, strict=True)], 1), v

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """RMS norm over the width, times a gain [M] or [2, M]."""
        if not self.shortcuts.fused:
            return functional.rms_norm(x.to(gain.dtype), self.size, eps=self.eps) * gain
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        normed = torch.addcmul(self.floor, size, size, value=1 / self.size[0]).rsqrt_().mul(x)
        return (normed if normed.dtype == gain.dtype else normed.to(gain.dtype)).mul_(gain)

    def _modulate(self, x_RM: Tensor, shift: Tensor, gain: Tensor) -> Tensor:
        """LN(x) gain + shift."""
        if self.shortcuts.fused and x_RM.dtype == gain.dtype and gain.ndim == 1:
            return torch.layer_norm(x_RM, self.size, gain, shift, self.eps)
        normed = torch.layer_norm(x_RM, self.size, eps=self.eps)
        return torch.addcmul(shift, _split(normed, gain), gain).view(x_RM.shape)

    def _gated(self, x_RM: Tensor, gate: Tensor, y_RM: Tensor) -> Tensor:
        """x + gate y."""
        if not self.shortcuts.fused:
            return (_split(x_RM, gate) + gate * _split(y_RM, gate)).view(x_RM.shape)
        return torch.addcmul(x_RM, gate, y_RM) if gate.ndim == 1 else torch.addcmul(_split(x_RM, gate), gate, _split(y_RM, gate)).view(x_RM.shape)

    def _gelu(self, x: Tensor) -> Tensor:
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
    if columns and weight.device.type == "cpu" and weight.numel() <= SMALL:
        weight = weight.contiguous()
    return Product(weight, bias)


def read(block: Block, shortcuts: Shortcuts) -> Layer:
    """The weights of a block."""
    own, cross, (up, _, down) = block.self_attn, block.cross_attn, block.ffn
    laid = functools.partial(product, columns=shortcuts.columns)
    return Layer(
        qkv=(laid(own.q, own.k, own.v),) if shortcuts.merged else (laid(own.q), laid(own.k), laid(own.v)),
        norm_qk=torch.stack([own.norm_q.weight, own.norm_k.weight]),
        o=laid(own.o),
        norm3=(block.norm3.weight, block.norm3.bias),
        cross_q=laid(cross.q),
        cross_norm_q=cross.norm_q.weight,
        cross_o=laid(cross.o),
        up=laid(cast(nn.Linear, up)),
        down=laid(cast(nn.Linear, down)),
    )
