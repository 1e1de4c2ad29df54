"""Triton kernels for the DiT's passes: what lies between its products in one reading and one writing each, computed in float32.

Where the products are of 8-bit floats (`rfbench.backbones.wan.float8`), what comes out for them is quantised on the way.

Tested with Triton's interpreter on a CPU, and compiled ahead of time for sm_90 as a chunk at full size launches them; none of them has run
on a GPU yet. `benchmarks.launches` tells what they move and what bounds them: a chunk of the 1.3B student (five passes) is at least 13.1 ms of
an H100's bandwidth, and its decoding 6.0 ms.

Shapes: B batch, S tokens of a chunk, R = B S rows, K tokens that a cache has room for, M width, h heads, D head width, G groups of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAIN: dict[str, Any] = {"enable_fp_fusion": False}  # products and sums round one by one, as in torch and in the interpreter: bytes are promised
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _warps(numbers: int, each: int = 1024) -> int:
    """Of a program that holds so many: 32 or 64 a thread fit its registers, and a row that is one warp's has no other to wait for."""
    return max(1, min(16, numbers // each))


@triton.jit
def _pairs(value):
    """What lies at even places, and what lies at odd ones: read in one piece and taken apart after, 16 bytes go to a thread at once."""
    return tl.split(tl.reshape(value, (value.shape[0] // 2, 2)))


@triton.jit
def _rotated(value, cos, sin):
    even, odd = _pairs(value)
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), value.shape)


@triton.jit(do_not_specialize=["tokens", "room"])
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
    BLOCK: tl.constexpr,
    RAW: tl.constexpr,
):
    row = tl.program_id(0)
    token = row % tokens
    at = tl.arange(0, BLOCK)
    there = at < WIDTH
    own = qkv + row.to(tl.int64) * (3 * WIDTH) + at
    q = tl.load(own, there, 0.0).to(tl.float32)
    k = tl.load(own + WIDTH, there, 0.0).to(tl.float32)
    v = tl.load(own + 2 * WIDTH, there, 0.0)
    cos, sin = _pairs(tl.load(rotation + token.to(tl.int64) * HEAD + at % HEAD))
    place = ((row // tokens) * room + tl.load(rows + token)) * WIDTH + at

    q = q * tl.rsqrt(tl.sum(q * q) / WIDTH + eps) * tl.load(gain + at, there, 0.0).to(tl.float32)
    k = k * tl.rsqrt(tl.sum(k * k) / WIDTH + eps) * tl.load(gain + WIDTH + at, there, 0.0).to(tl.float32)
    tl.store(queries + row.to(tl.int64) * WIDTH + at, _rotated(q, cos, sin), there)
    tl.store(keys + place, _rotated(k, cos, sin), there)
    if RAW:
        tl.store(raw + place, k, there)
    tl.store(values + place, v, there)


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
    block = triton.next_power_of_2(width)
    sizes: dict[str, Any] = {"WIDTH": width, "HEAD": head, "BLOCK": block, "RAW": raw is not None, "num_warps": _warps(block)}
    given = (qkv_R3M, gain_2M, angles, rows_S, queries, keys, keys if raw is None else raw, values)
    _place[(batch * tokens,)](*given, tokens, room, eps, **sizes, **PLAIN)
    return queries


@triton.jit
def _to_float8(value):
    """To the nearest of float8_e4m3fn, halves to even. Triton's interpreter, which does not carry into the exponent, gets what is rounded before."""
    if INTERPRETED:
        bits = value.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        fixed = (value + 24576.0) - 24576.0  # below its least normal number it knows multiples of 2^-9: 24576 leaves a float32 as many bits
        value = tl.where(tl.abs(value) < 0.015625, fixed, normal)
    return value.to(tl.float8e4nv)


@triton.jit
def _scale(value):
    """Of a row of float8, as `rfbench.backbones.wan.float8.quantised` gives it."""
    return tl.maximum(tl.max(tl.abs(value)), 1e-12) / 448.0


@triton.jit(do_not_specialize=["group", "gate_group"])
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
    number = tl.program_id(0)
    row = number.to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < WIDTH
    table = (number // group) * WIDTH + at
    value = tl.load(x + row * WIDTH + at, there, 0.0).to(tl.float32)
    if ADDED:
        more = tl.load(y + row * WIDTH + at, there, 0.0).to(tl.float32)
        if GATED:
            more = more * tl.load(gate + (number // gate_group) * WIDTH + at, there, 0.0).to(tl.float32)
        rounded = (value + more).to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + at, rounded, there)
        value = rounded.to(tl.float32)
    middle = tl.sum(value) / WIDTH
    value = tl.where(there, value - middle, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value) / WIDTH + eps)
    value = value * tl.load(gain + table, there, 0.0).to(tl.float32) + tl.load(shift + table, there, 0.0).to(tl.float32)
    if EIGHT:
        scale = _scale(value)  # which is zero where nothing is there, as shift and gain are
        tl.store(scales + row, scale)
        value = _to_float8(value * (1.0 / scale))
    tl.store(out + row * WIDTH + at, value, there)


Rows = Tensor | tuple[Tensor, Tensor]  # in the dtype of the gain; or with `eight` in 8 bits, and a scale for each row


def modulate(x_RM: Tensor, shift: Tensor, gain: Tensor, eps: float, *, eight: bool = False) -> Rows:
    """LN(x) gain + shift; the tables are [M], or [G, ..., M] with one for each G-th of the rows."""
    return _launch(x_RM, None, None, x_RM, shift, gain, eps, eight)


def add_and_modulate(
    x_RM: Tensor, gate: Tensor | None, y_RM: Tensor, shift: Tensor, gain: Tensor, eps: float, *, eight: bool = False
) -> tuple[Tensor, Rows]:
    """x + gate y (or x + y), and `modulate` of it; the sum has the wider dtype of x and gate, as it has in torch."""
    total = torch.empty_like(x_RM, dtype=x_RM.dtype if gate is None else torch.promote_types(x_RM.dtype, gate.dtype))
    return total, _launch(x_RM, gate, y_RM, total, shift, gain, eps, eight)


def _launch(x: Tensor, gate: Tensor | None, y: Tensor | None, total: Tensor, shift: Tensor, gain: Tensor, eps: float, eight: bool) -> Rows:
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn if eight else gain.dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if eight else out
    groups, gates = gain.numel() // width, 1 if gate is None else gate.numel() // width
    block = triton.next_power_of_2(width)
    sizes: dict[str, Any] = {"WIDTH": width, "BLOCK": block, "GATED": gate is not None, "ADDED": y is not None, "num_warps": _warps(block, 2048)}
    given = (x, x if gate is None else gate.contiguous(), x if y is None else y, total, shift.contiguous(), gain.contiguous(), out, scales)
    _norm[(rows,)](*given, rows // groups, rows // gates, eps, EIGHT=eight, **sizes, **PLAIN)
    return (out, scales) if eight else out


@triton.jit
def _sigmoid(value):
    """By 2^x and 1 / sqrt(x), each of which is one instruction of a GPU: e^x and a division, no nearer, come with steps for numbers below 2^-126."""
    root = tl.rsqrt(1.0 + tl.exp2(value * -1.4426950408889634))
    return root * root


@triton.jit
def _gelu(value):
    """The tangent form: x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    return value * _sigmoid(value * (1.5957691216057308 + 0.07135481627159956 * (value * value)))


@triton.jit
def _quantised(x, out, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at, behind = tl.arange(0, BLOCK), BLOCK + tl.arange(0, REST)
    first = tl.load(x + row * WIDTH + at).to(tl.float32)
    rest = tl.load(x + row * WIDTH + behind, behind < WIDTH, 0.0).to(tl.float32)
    if GELU:
        first, rest = _gelu(first), _gelu(rest)
    scale = tl.maximum(_scale(first), _scale(rest))
    tl.store(scales + row, scale)
    tl.store(out + row * WIDTH + at, _to_float8(first * (1.0 / scale)))
    tl.store(out + row * WIDTH + behind, _to_float8(rest * (1.0 / scale)), behind < WIDTH)


def quantised(x_RM: Tensor, *, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """`rfbench.backbones.wan.float8.quantised`, of GELU's tangent form or of the rows as they are."""
    rows, width = x_RM.shape
    out, scales = torch.empty(x_RM.shape, dtype=torch.float8_e4m3fn, device=x_RM.device), torch.empty(rows, 1, device=x_RM.device)
    block = triton.next_power_of_2(width) // 2
    sizes: dict[str, Any] = {"WIDTH": width, "BLOCK": block, "REST": triton.next_power_of_2(width - block), "num_warps": _warps(block)}
    _quantised[(rows,)](x_RM.contiguous(), out, scales, GELU=gelu, **sizes, **PLAIN)
    return out, scales


@triton.jit(do_not_specialize=["rows"])
def _rms(x, gain, out, rows, stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr):
    clip, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None]
    there = (row < rows) & (channel < WIDTH)
    at = row.to(tl.int64) * WIDTH + channel
    value = tl.load(x + clip * rows * WIDTH + at, there, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / WIDTH + eps)
    value = value * scale * tl.load(gain + channel, channel < WIDTH, 0.0).to(tl.float32)
    if SILU:
        value = value * _sigmoid(value)
    tl.store(out + clip * stride + at, value, there)


def norm_silu(x_BTHWC: Tensor, gain_C: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """SiLU of the RMS norm over the last axis: the autoencoder's, one pixel a row. `x_BTHWC` is contiguous, and every clip of `out` is."""
    return _scaled(x_BTHWC, gain_C, eps, torch.empty_like(x_BTHWC) if out is None else out, silu=True)


def rms_norm(x_RM: Tensor, gain_M: Tensor, eps: float) -> Tensor:
    """The RMS norm of contiguous rows times a gain, in the gain's dtype."""
    return _scaled(x_RM[None], gain_M, eps, torch.empty_like(x_RM, dtype=gain_M.dtype)[None], silu=False)[0]


def _scaled(x: Tensor, gain: Tensor, eps: float, out: Tensor, *, silu: bool) -> Tensor:
    width = x.shape[-1]
    rows, block = x[0].numel() // width, triton.next_power_of_2(width)
    sizes: dict[str, Any] = {"WIDTH": width, "BLOCK": block, "ROWS": max(1, 4096 // block), "SILU": silu, "num_warps": _warps(max(4096, block))}
    _rms[(triton.cdiv(rows, sizes["ROWS"]), len(x))](x, gain, out, rows, out.stride(0), eps, **sizes, **PLAIN)
    return out


@triton.jit
def _as_uint8(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < count, 0.0).to(tl.float32) * 127.5 + 127.5
    value = tl.minimum(tl.maximum(value, 0.0), 255.0)
    value = (value + 8388608.0) - 8388608.0  # 2^23 leaves a float32 no halves: they go to the even side, as torch rounds
    tl.store(out + at, value.to(tl.uint8), at < count)


def as_uint8(x: Tensor) -> Tensor:
    """Contiguous values of [-1, 1] as bytes, rounded as `rfbench.video.as_uint8` does."""
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    _as_uint8[(triton.cdiv(x.numel(), 2048),)](x, out, x.numel(), BLOCK=2048, **PLAIN)
    return out


@triton.jit
def _head(x, tokens, clip_stride, token_stride, HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Some tokens of a clip's head, where they are among all of its clip that are contiguous, and which of them there are."""
    clip, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    at = tl.arange(0, WIDE)[None, :]
    there = (token < tokens) & (at < HEAD)
    value = tl.load(x + clip * clip_stride + token * token_stride + head * HEAD + at, there, 0.0).to(tl.float32)
    return value, ((clip * tokens + token) * HEADS + head) * HEAD + at, there


@triton.jit
def _largest(x, largest, tokens, clip_stride, token_stride, HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    value, _, _ = _head(x, tokens, clip_stride, token_stride, HEADS, HEAD, BLOCK, WIDE)
    tl.store(largest + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.max(tl.abs(value)))


@triton.jit
def _quantised_heads(
    x,
    largest,
    out,
    scales,
    tokens,
    clip_stride,
    token_stride,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
):
    part = tl.arange(0, PARTS)
    scale = _scale(tl.load(largest + tl.program_id(1) * tl.num_programs(0) + part, part < tl.num_programs(0), 0.0))
    tl.store(scales + tl.program_id(1), scale, tl.program_id(0) == 0)
    value, at, there = _head(x, tokens, clip_stride, token_stride, HEADS, HEAD, BLOCK, WIDE)
    tl.store(out + at, _to_float8(value * (1.0 / scale)), there)


def quantised_heads(x_BSHD: Tensor) -> tuple[Tensor, Tensor]:
    """`rfbench.backbones.wan.float8.quantised_heads`: one reading for what is largest in each part of a head, one that rounds."""
    batch, tokens, heads, head = x_BSHD.shape
    wide, block = triton.next_power_of_2(head), 64
    parts = triton.cdiv(tokens, block)
    largest = torch.empty(batch * heads, parts, device=x_BSHD.device)
    out, scales = torch.empty(x_BSHD.shape, dtype=torch.float8_e4m3fn, device=x_BSHD.device), torch.empty(batch, heads, device=x_BSHD.device)
    sizes: dict[str, Any] = {"HEADS": heads, "HEAD": head, "BLOCK": block, "WIDE": wide, "num_warps": _warps(block * wide)}
    grid, where = (parts, batch * heads), (tokens, x_BSHD.stride(0), x_BSHD.stride(1))
    _largest[grid](x_BSHD, largest, *where, **sizes, **PLAIN)
    _quantised_heads[grid](x_BSHD, largest, out, scales, *where, PARTS=triton.next_power_of_2(parts), **sizes, **PLAIN)
    return out, scales
