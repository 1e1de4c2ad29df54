"""Triton kernels for the DiT's passes: what lies between its products in one reading and one writing each, computed in float32.

Where the products are of 8-bit floats (`rfbench.backbones.wan.float8`), what comes out for them is quantised on the way.

Tested with Triton's interpreter on a CPU; none of them has run on a GPU yet.

Shapes: B batch, S tokens of a chunk, R = B S rows, K tokens that a cache has room for, M width, h heads, D head width, G groups of rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _place(
    qkv,
    gain,
    rotation,
    rows,
    queries,
    keys,
    raw,
    values,
    tokens,
    room,
    eps,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    RAW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = row % tokens
    pair = tl.arange(0, PAIRS)
    there = pair < WIDTH // 2
    even = 2 * pair
    angle = rotation + token * HEAD + 2 * (pair % (HEAD // 2))
    cos = tl.load(angle, there, 0.0)
    sin = tl.load(angle + 1, there, 0.0)
    own = qkv + row * 3 * WIDTH + even
    place = ((row // tokens) * room + tl.load(rows + token)) * WIDTH + even

    a = tl.load(own, there, 0.0).to(tl.float32)
    b = tl.load(own + 1, there, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(a * a + b * b) / WIDTH + eps)
    a = a * scale * tl.load(gain + even, there, 0.0).to(tl.float32)
    b = b * scale * tl.load(gain + even + 1, there, 0.0).to(tl.float32)
    tl.store(queries + row * WIDTH + even, a * cos - b * sin, there)
    tl.store(queries + row * WIDTH + even + 1, a * sin + b * cos, there)

    a = tl.load(own + WIDTH, there, 0.0).to(tl.float32)
    b = tl.load(own + WIDTH + 1, there, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(a * a + b * b) / WIDTH + eps)
    a = a * scale * tl.load(gain + WIDTH + even, there, 0.0).to(tl.float32)
    b = b * scale * tl.load(gain + WIDTH + even + 1, there, 0.0).to(tl.float32)
    tl.store(keys + place, a * cos - b * sin, there)
    tl.store(keys + place + 1, a * sin + b * cos, there)
    if RAW:
        tl.store(raw + place, a, there)
        tl.store(raw + place + 1, b, there)

    tl.store(values + place, tl.load(own + 2 * WIDTH, there, 0.0), there)
    tl.store(values + place + 1, tl.load(own + 2 * WIDTH + 1, there, 0.0), there)


def place(
    qkv_R3M: Tensor, gain_2M: Tensor, eps: float, rotation_S1D: Tensor, rows_S: Tensor, keys: Tensor, raw: Tensor | None, values: Tensor
) -> Tensor:
    """Normalise queries and keys, rotate both, and put keys and values where a cache keeps them.

    Args:
        rotation_S1D: complex, as of `rfbench.attention.rotations`.
        rows_S: token of the cache that each token of the chunk becomes.
        keys, raw, values: [B, K, h, D], written to; `raw` takes the keys as they are before rotation, None if nobody needs them.

    Returns:
        queries [B, S, h, D].
    """
    (batch, room, heads, head), tokens, width = keys.shape, len(rows_S), gain_2M.shape[-1]
    queries = torch.empty(batch, tokens, heads, head, dtype=keys.dtype, device=keys.device)
    angles = torch.view_as_real(rotation_S1D)
    sizes: dict[str, Any] = {"WIDTH": width, "HEAD": head, "PAIRS": triton.next_power_of_2(width // 2), "RAW": raw is not None}
    grid = (batch * tokens,)
    _place[grid](qkv_R3M, gain_2M, angles, rows_S, queries, keys, keys if raw is None else raw, values, tokens, room, eps, **sizes)
    return queries


@triton.jit
def _to_float8(value):
    """To the nearest of float8_e4m3fn, halves to even. Rounded before it is converted: Triton's interpreter does not carry into the exponent."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    fixed = (value + 24576.0) - 24576.0  # below its least normal number it knows multiples of 2^-9: 24576 leaves a float32 as many bits
    return tl.where(tl.abs(value) < 0.015625, fixed, normal).to(tl.float8e4nv)


@triton.jit
def _store_float8(value, out, scales, row, at, there, WIDTH: tl.constexpr):
    """A row as `rfbench.backbones.wan.float8.quantised` gives it."""
    scale = tl.maximum(tl.max(tl.abs(tl.where(there, value, 0.0))), 1e-12) / 448.0
    tl.store(scales + row, scale)
    tl.store(out + row * WIDTH + at, _to_float8(value / scale), there)


@triton.jit
def _norm(
    x,
    gate,
    y,
    total,
    shift,
    gain,
    out,
    scales,
    group,
    gate_group,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    EIGHT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < WIDTH
    table = (row // group) * WIDTH + at
    value = tl.load(x + row * WIDTH + at, there, 0.0).to(tl.float32)
    if ADDED:
        more = tl.load(y + row * WIDTH + at, there, 0.0).to(tl.float32)
        if GATED:
            more = more * tl.load(gate + (row // gate_group) * WIDTH + at, there, 0.0).to(tl.float32)
        value = value + more
        tl.store(total + row * WIDTH + at, value, there)
        value = value.to(total.dtype.element_ty).to(tl.float32)
    middle = tl.sum(value) / WIDTH
    value = tl.where(there, value - middle, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value) / WIDTH + eps)
    value = value * tl.load(gain + table, there, 0.0).to(tl.float32) + tl.load(shift + table, there, 0.0).to(tl.float32)
    if EIGHT:
        _store_float8(value, out, scales, row, at, there, WIDTH)
    else:
        tl.store(out + row * WIDTH + at, value, there)


Rows = Tensor | tuple[Tensor, Tensor]  # in the dtype of the gain; or with `eight` in 8 bits, and a scale for each row


def modulate(x_RM: Tensor, shift: Tensor, gain: Tensor, eps: float, *, eight: bool = False) -> Rows:
    """LN(x) gain + shift; the tables are [M], or [G, ..., M] with one for each G-th of the rows."""
    return _launch(x_RM, None, None, x_RM, shift, gain, eps, eight)


def add_and_modulate(
    x_RM: Tensor, gate: Tensor | None, y_RM: Tensor, shift: Tensor, gain: Tensor, eps: float, *, eight: bool = False
) -> tuple[Tensor, Rows]:
    """x + gate y (or x + y), and `modulate` of it."""
    total = torch.empty_like(x_RM)
    return total, _launch(x_RM, gate, y_RM, total, shift, gain, eps, eight)


def _launch(x: Tensor, gate: Tensor | None, y: Tensor | None, total: Tensor, shift: Tensor, gain: Tensor, eps: float, eight: bool) -> Rows:
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn if eight else gain.dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if eight else out
    groups, gates = gain.numel() // width, 1 if gate is None else gate.numel() // width
    sizes: dict[str, Any] = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), "GATED": gate is not None, "ADDED": y is not None}
    given = (x, x if gate is None else gate.contiguous(), x if y is None else y, total, shift.contiguous(), gain.contiguous(), out, scales)
    _norm[(rows,)](*given, rows // groups, rows // gates, eps, EIGHT=eight, **sizes)
    return (out, scales) if eight else out


@triton.jit
def _quantised(x, out, scales, slope, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < WIDTH
    value = tl.load(x + row * WIDTH + at, there, 0.0).to(tl.float32)
    if GELU:
        value = value * tl.sigmoid(slope * (value + 0.044715 * value * value * value))
    _store_float8(value, out, scales, row, at, there, WIDTH)


def quantised(x_RM: Tensor, *, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """`rfbench.backbones.wan.float8.quantised`, of GELU's tangent form or of the rows as they are."""
    (rows, width), slope = x_RM.shape, 2 * math.sqrt(2 / math.pi)
    out, scales = torch.empty(x_RM.shape, dtype=torch.float8_e4m3fn, device=x_RM.device), torch.empty(rows, 1, device=x_RM.device)
    block = triton.next_power_of_2(width)
    _quantised[(rows,)](x_RM.contiguous(), out, scales, slope, WIDTH=width, BLOCK=block, GELU=gelu, num_warps=4 if block <= 2048 else 16)
    return out, scales


@triton.jit
def _norm_silu(x, gain, out, rows, stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < WIDTH
    value = tl.load(x + row * WIDTH + at, there, 0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / WIDTH + eps) * tl.load(gain + at, there, 0.0).to(tl.float32)
    tl.store(out + (row // rows) * stride + (row % rows) * WIDTH + at, value * tl.sigmoid(value), there)


def norm_silu(x_BTHWC: Tensor, gain_C: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """SiLU of the RMS norm over the last axis: the autoencoder's, one pixel a row. `x_BTHWC` is contiguous, and every clip of `out` is."""
    out, width = torch.empty_like(x_BTHWC) if out is None else out, x_BTHWC.shape[-1]
    rows = x_BTHWC[0].numel() // width
    sizes: dict[str, Any] = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width)}
    _norm_silu[(len(x_BTHWC) * rows,)](x_BTHWC, gain_C, out, rows, out.stride(0), eps, **sizes)
    return out


@triton.jit
def _as_uint8(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < count, 0.0).to(tl.float32) * 127.5 + 127.5
    value = tl.minimum(tl.maximum(value, 0.0), 255.0)
    whole = tl.floor(value)
    over = value - whole
    odd = whole - 2 * tl.floor(whole / 2)
    whole = whole + tl.where((over > 0.5) | ((over == 0.5) & (odd == 1.0)), 1.0, 0.0)  # halves go to the even side, as torch rounds
    tl.store(out + at, whole.to(tl.uint8), at < count)


def as_uint8(x: Tensor) -> Tensor:
    """Contiguous values of [-1, 1] as bytes, rounded as `rfbench.video.as_uint8` does."""
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    _as_uint8[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), BLOCK=1024)
    return out
