"""Products and attention from 8-bit floats: approximate, and on Hopper up to twice as many per second as from bfloat16.

Products: every row that comes in and every output's row of the weight has a scale of its own, by which its largest number becomes the
largest of float8_e4m3fn. Sums are taken in float32 (on Hopper by its fast way, which keeps fewer bits of them). Weights are quantised once;
they stay in memory as they were as well, for passes that are not made of such products.

Attention: every head of every clip has a scale of its own, for its queries, keys and values each, and all that a pass looks at is quantised
in that pass, cached keys and values again: what is largest among them changes with every step. The rest is that of FlashAttention 3's
8-bit forward pass (Dao-AILab/flash-attention@0251105, hopper/softmax.h and hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp).

Tested on a CPU, which does the same slowly. Not run on a GPU yet.

Shapes: R rows, K numbers that go into an output, N outputs; B clips, S queries, T keys, h heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from rfbench import attention
from rfbench.backbones.wan.dit import Eight

LARGEST = 448.0  # of float8_e4m3fn
LEAST = 1e-12  # largest number of a row that still gets a scale of its own: a row of zeros stays one
CAPABILITY = (8, 9)  # compute capability from which on a GPU multiplies 8-bit floats

FILLED = 256.0  # what the largest weight of a query's keys becomes before it is rounded; the sum that is divided by is that of all as they were

Rows8 = tuple[Tensor, Tensor]  # rows [R, K] in 8 bits, and what each of them is multiplied by [R, 1]
Heads8 = tuple[Tensor, Tensor]  # heads [B, S, h, D] in 8 bits, and what each of them is multiplied by [B, h]


def asked(**settings: str | None) -> tuple[Eight, ...]:
    """What is to be computed from 8-bit floats where that is set to so and so."""
    return tuple(what for what in get_args(Eight) if settings[what] == "float8")


def missing(what: Eight, device: torch.device) -> str | None:
    """Why a device cannot compute something from 8-bit floats; None if it can."""
    if device.type != "cuda":
        return None
    if what == "attention":
        return attention.missing("fa3", device)
    if (found := torch.cuda.get_device_capability(device)) >= CAPABILITY:
        return None
    return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} and this device has {found[0]}.{found[1]}"


def quantised(x_RK: Tensor) -> Rows8:
    """Rows in 8 bits, rounded to the nearest, halves to even."""
    x_RK = x_RK.float()
    scale_R1 = x_RK.abs().amax(-1, keepdim=True).clamp_(min=LEAST) / LARGEST
    return (x_RK / scale_R1).to(torch.float8_e4m3fn), scale_R1


@dataclass(frozen=True)
class Product8:
    """x W^T + b, in the dtype of the bias, of rows that are quantised here or were before."""

    weight_KN: Tensor
    scale_1N: Tensor
    bias: Tensor
    quantise: Callable[[Tensor], Rows8]

    def __call__(self, x: Tensor | Rows8) -> Tensor:
        (rows_RK, scale_R1), half = x if isinstance(x, tuple) else self.quantise(x), self.bias.dtype != torch.float32
        scales = scale_R1, ScalingType.RowWise, self.scale_1N, ScalingType.RowWise
        out = scaled_mm(
            rows_RK, self.weight_KN, *scales, bias=self.bias if half else None, output_dtype=self.bias.dtype, use_fast_accum=rows_RK.is_cuda
        )
        return out if half else out.add_(self.bias)  # beside a float32 result no GPU takes a bias


def product(*linears: nn.Linear, quantise: Callable[[Tensor], Rows8] = quantised) -> Product8:
    """The weights of linear layers, those of several one behind the other."""
    weight_NK, scale_N1 = quantised(torch.cat([linear.weight.data for linear in linears]))
    return Product8(weight_NK.T, scale_N1.T.contiguous(), torch.cat([linear.bias.data for linear in linears]), quantise)


def quantised_heads(x_BSHD: Tensor) -> Heads8:
    """Heads in 8 bits, rounded as rows are. No clip has a part in another's scale, so it is the same in any batch."""
    (batch, tokens, heads, width), (rows, scale_BH1) = x_BSHD.shape, quantised(x_BSHD.transpose(1, 2).flatten(2))
    return rows.view(batch, heads, tokens, width).transpose(1, 2), scale_BH1.squeeze(-1)


def attend(q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *, quantise: Callable[[Tensor], Heads8] = quantised_heads) -> Tensor:
    """Softmax attention of every query over every key, in the values' dtype: [B, S, h, D]. On a GPU D is a multiple of 16."""
    heads = [quantise(x) for x in (q_BSHD, k_BTHD, v_BTHD)]
    return (by_package if v_BTHD.is_cuda else emulated)(*heads).to(v_BTHD.dtype)


def by_package(q: Heads8, k: Heads8, v: Heads8) -> Tensor:
    """FlashAttention 3's, in bfloat16."""
    return attention.flash("fa3", q[0], k[0], v[0], q_descale=q[1], k_descale=k[1], v_descale=v[1])


def emulated(q: Heads8, k: Heads8, v: Heads8) -> Tensor:
    """What FlashAttention 3 computes, in bfloat16, by float32 products of the same rounded numbers.

    It takes keys block by block and rounds their weights with the largest score so far at `FILLED`; here that of all of them is.
    """
    q_BHSD, k_BHTD, v_BHTD = (heads.transpose(1, 2).float() for heads, _ in (q, k, v))
    score_BHST = q_BHSD @ k_BHTD.mT * (q[1] * k[1] * q_BHSD.shape[-1] ** -0.5)[..., None, None]
    weight_BHST = (score_BHST - score_BHST.amax(-1, keepdim=True)).exp() * FILLED
    seen_BHSD = weight_BHST.to(torch.float8_e4m3fn).float() @ v_BHTD
    return (seen_BHSD / weight_BHST.sum(-1, keepdim=True) * v[1][..., None, None]).bfloat16().transpose(1, 2)
