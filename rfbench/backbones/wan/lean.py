"""The Wan2.1 diffusion transformer for streaming: what `WanDiT` computes, without what a pass without gradients can leave out.

A stream has one text and a few timesteps, which all tokens of a pass share, and of its clean pass only keys and values are
wanted. So more is known beforehand than `WanDiT.forward` may assume. Weights are read where the model keeps them.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, S tokens, M width, h heads, D head width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rfbench.attention import attend, rotate, rotations
from rfbench.backbones.wan.dit import Block, Cache, TextKV, WanDiT


@dataclass(frozen=True)
class Shortcuts:
    """Work that is left out or joined, each part for itself. The video stays the same up to rounding (`rfbench.ladder`)."""

    modulation: bool = True  # what depends on the timestep alone is computed once per stream and not in every pass
    context: bool = True  # the clean pass ends at the keys and values of the last layer
    merged: bool = True  # queries and keys are one product and are normalised together
    fused: bool = True  # modulation is part of its layer norm, the gate of its residual sum; other norms take fewer operations
    columns: bool = True  # on a CPU, small weights are copied column by column: a product of few rows reads them faster


SHORTCUTS = Shortcuts()
SMALL = 2**20  # elements of a weight


@dataclass(frozen=True)
class Product:
    """x W^T + b, in the dtype of the weights."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """The weights of a block."""

    qk: tuple[Product, ...]  # two, or one for both
    norm_qk: Tensor  # [2, M]
    v: Product
    o: Product
    norm3: tuple[Tensor, Tensor]
    cross_q: Product
    cross_norm_q: Tensor
    cross_o: Product
    up: Product
    down: Product


Six = tuple[Tensor, ...]  # of a block at one timestep: shift, gain, gate of attention, then of the feed-forward, each [M]


class LeanDiT:
    """A model as one stream runs it; its weights must not change meanwhile."""

    @torch.no_grad()
    def __init__(self, model: WanDiT, shortcuts: Shortcuts) -> None:
        self.model, self.shortcuts = model, shortcuts
        self.eps, self.size, self.heads = model.cfg.eps, (model.cfg.dim,), (model.cfg.num_heads, model.cfg.head_dim)
        self.floor = torch.tensor(model.cfg.eps, device=model.head.modulation.device)
        self.layers = [read(cast(Block, block), shortcuts) for block in model.blocks]
        self.head = product(model.head.head, columns=shortcuts.columns)
        self.modulations: dict[float, tuple[list[Six], tuple[Tensor, Tensor]]] = {}  # of the timesteps that were taken

    @torch.no_grad()
    def __call__(self, x_BFCHW: Tensor, t: float, text: TextKV, cache: Cache | None) -> Tensor:
        """The flow of noisy frames that are all at timestep `t`: [B, F, C, H, W]. See `WanDiT.forward`."""
        blocks, (shift, gain) = self._modulation(t)
        x_BSM = self._tokens(x_BFCHW, blocks, text, cache)
        _, rows, columns = self.model.cfg.patch
        out = self.head(self._modulate(x_BSM, shift, gain)).unflatten(1, (x_BFCHW.shape[1], -1))
        return self.model.unpatch(out, x_BFCHW.shape[-2] // rows, x_BFCHW.shape[-1] // columns)

    @torch.no_grad()
    def fill(self, clean_BFCHW: Tensor, text: TextKV, cache: Cache) -> None:
        """The clean pass: it leaves keys and values in the cache."""
        self._tokens(clean_BFCHW, self._modulation(0.0)[0], text, cache, last=not self.shortcuts.context)

    def _tokens(self, x_BFCHW: Tensor, blocks: list[Six], text: TextKV, cache: Cache | None, *, last: bool = True) -> Tensor:
        """The tokens that leave the last layer: [B, S, M]. Without `last` that layer does no more than fill the cache."""
        x_BSM = self.model.embed_patches(x_BFCHW).flatten(1, 2)
        rotation = None if cache is not None else self._rotation(x_BFCHW)
        for number, (layer, six, text_kv) in enumerate(zip(self.layers, blocks, text, strict=True)):
            shift1, gain1, gate1, shift2, gain2, gate2 = six
            q, k, v = self._project(layer, self._modulate(x_BSM, shift1, gain1))
            if cache is not None:
                q, k, v = cache.extend(number, q, k, v)
            else:
                assert rotation is not None
                q, k = rotate(q, rotation), rotate(k, rotation)
            if not last and number == len(self.layers) - 1:
                break
            x_BSM = self._gated(x_BSM, gate1, layer.o(attend(q, k, v).flatten(-2)))
            query = self._norm(layer.cross_q(functional.layer_norm(x_BSM, self.size, *layer.norm3, self.eps)), layer.cross_norm_q)
            x_BSM = x_BSM + layer.cross_o(attend(query.unflatten(-1, self.heads), *text_kv).flatten(-2))
            hidden = functional.gelu(layer.up(self._modulate(x_BSM, shift2, gain2)), approximate="tanh")
            x_BSM = self._gated(x_BSM, gate2, layer.down(hidden))
        return x_BSM

    def _project(self, layer: Layer, x_BSM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys, and values: [B, S, h, D] each."""
        if self.shortcuts.merged:
            q, k = self._norm(layer.qk[0](x_BSM).unflatten(-1, (2, -1)), layer.norm_qk).unbind(2)
        else:
            q, k = (self._norm(part(x_BSM), gain) for part, gain in zip(layer.qk, layer.norm_qk, strict=True))
        return q.unflatten(-1, self.heads), k.unflatten(-1, self.heads), layer.v(x_BSM).unflatten(-1, self.heads)

    def _norm(self, x_BSM: Tensor, gain: Tensor) -> Tensor:
        """RMS norm over the width, times a gain [M] or [2, M]."""
        if not self.shortcuts.fused:
            return functional.rms_norm(x_BSM.to(gain.dtype), self.size, eps=self.eps) * gain
        size = torch.linalg.vector_norm(x_BSM, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(self.floor, size, size, value=1 / x_BSM.shape[-1]).rsqrt_().mul(x_BSM).to(gain.dtype).mul_(gain)

    def _modulate(self, x_BSM: Tensor, shift: Tensor, gain: Tensor) -> Tensor:
        """LN(x) gain + shift."""
        if self.shortcuts.fused and x_BSM.dtype == gain.dtype:
            return functional.layer_norm(x_BSM, self.size, gain, shift, self.eps)
        return torch.addcmul(shift, functional.layer_norm(x_BSM, self.size, eps=self.eps), gain)

    def _gated(self, x_BSM: Tensor, gate: Tensor, y_BSM: Tensor) -> Tensor:
        """x + gate y."""
        return torch.addcmul(x_BSM, gate, y_BSM) if self.shortcuts.fused else x_BSM + gate * y_BSM

    def _modulation(self, t: float) -> tuple[list[Six], tuple[Tensor, Tensor]]:
        """What timestep `t` does to every block, and shift and gain of the head."""
        if t in self.modulations:
            return self.modulations[t]
        model = self.model
        time, six = model.embed_time(torch.full((1, 1), t, dtype=torch.float64, device=model.head.modulation.device))
        blocks = list[Six]()
        for block in model.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = (cast(Block, block).modulation + six).view(6, -1).unbind()
            blocks.append((shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2))
        shift, scale = (model.head.modulation + time.unsqueeze(2)).view(2, -1).unbind()
        found = (blocks, (shift, 1 + scale))
        if self.shortcuts.modulation:
            self.modulations[t] = found
        return found

    def _rotation(self, x_BFCHW: Tensor) -> Tensor:
        """Of all tokens of a clip that is made without a cache."""
        _, rows, columns = self.model.cfg.patch
        frames, (height, width) = tuple(range(x_BFCHW.shape[1])), x_BFCHW.shape[-2:]
        return rotations(frames, height // rows, width // columns, self.model.cfg.head_dim, x_BFCHW.device)


def product(*linears: nn.Linear, columns: bool) -> Product:
    """The weights of linear layers, those of several one behind the other."""
    weight, bias = linears[0].weight.data, linears[0].bias.data
    if len(linears) > 1:
        weight, bias = torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears])
    if columns and weight.device.type == "cpu" and weight.numel() <= SMALL:
        weight = weight.T.contiguous().T
    return Product(weight, bias)


def read(block: Block, shortcuts: Shortcuts) -> Layer:
    """The weights of a block."""
    own, cross, (up, _, down) = block.self_attn, block.cross_attn, block.ffn
    laid = functools.partial(product, columns=shortcuts.columns)
    return Layer(
        qk=(laid(own.q, own.k),) if shortcuts.merged else (laid(own.q), laid(own.k)),
        norm_qk=torch.stack([own.norm_q.weight, own.norm_k.weight]),
        v=laid(own.v),
        o=laid(own.o),
        norm3=(block.norm3.weight, block.norm3.bias),
        cross_q=laid(cross.q),
        cross_norm_q=cross.norm_q.weight,
        cross_o=laid(cross.o),
        up=laid(cast(nn.Linear, up)),
        down=laid(cast(nn.Linear, down)),
    )
