"""Products from 8-bit floats: approximate, and on Hopper twice as many per second as from bfloat16.

Every row that comes in and every output's row of the weight has a scale of its own, by which its largest number becomes the largest
of float8_e4m3fn. Sums are taken in float32 (on Hopper by its fast way, which keeps fewer bits of them). Weights are quantised once;
they stay in memory as they were as well, for passes that are not made of such products.

Tested on a CPU, which makes the same products slowly. Not run on a GPU yet.

Shapes: R rows, K numbers that go into an output, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

LARGEST = 448.0  # of float8_e4m3fn
LEAST = 1e-12  # largest number of a row that still gets a scale of its own: a row of zeros stays one
CAPABILITY = (8, 9)  # compute capability from which on a GPU multiplies 8-bit floats

Rows8 = tuple[Tensor, Tensor]  # rows [R, K] in 8 bits, and what each of them is multiplied by [R, 1]


def missing(device: torch.device) -> str | None:
    """Why a device cannot make such products; None if it can."""
    if device.type != "cuda" or (found := torch.cuda.get_device_capability(device)) >= CAPABILITY:
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
