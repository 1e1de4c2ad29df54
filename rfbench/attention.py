"""The one door to attention, and the rotary position embedding that goes with it.

Shapes: B batch, S query tokens, K key tokens, H heads, D head width, F frames, h rows, w columns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def attend(q_BSHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, mask_SK: Tensor | None = None) -> Tensor:
    """Softmax attention of every query over every key (or those that `mask_SK` allows), in the values' dtype: [B, S, H, D]."""
    if not q_BSHD.dtype == k_BKHD.dtype == v_BKHD.dtype:
        q_BSHD, k_BKHD = q_BSHD.to(v_BKHD.dtype), k_BKHD.to(v_BKHD.dtype)
    q, k, v = q_BSHD.transpose(1, 2), k_BKHD.transpose(1, 2), v_BKHD.transpose(1, 2)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_SK).transpose(1, 2)


def kernel() -> str:
    """Name of the attention kernel in use, for the run's record."""
    return "torch-sdpa"


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may serve gradients later on
def rotations(frames: tuple[int, ...], height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Complex rotations of the tokens of the frames at the given time positions: [F*h*w, 1, D/2].

    The head is split into a time part of D - 4 (D // 6) and a row and a column part of 2 (D // 6) each, base 10000
    within each part; angles are computed in float64 (Wan2.1, wan/modules/model.py).
    """

    def angles(positions: Sequence[int], size: int) -> Tensor:
        inverse = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        return torch.outer(torch.tensor(positions, dtype=torch.float64), inverse)

    side = 2 * (head_dim // 6)
    time, rows, columns = angles(frames, head_dim - 2 * side), angles(range(height), side), angles(range(width), side)
    parts = [
        time[:, None, None].expand(-1, height, width, -1),
        rows[None, :, None].expand(len(frames), -1, width, -1),
        columns[None, None].expand(len(frames), height, -1, -1),
    ]
    angle = torch.cat(parts, dim=-1).reshape(len(frames) * height * width, 1, head_dim // 2)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device)


def rotate(x_BSHD: Tensor, rotation_S1D: Tensor) -> Tensor:
    """Rotate adjacent pairs of the head by their position, in float32."""
    x = x_BSHD if x_BSHD.dtype == torch.float32 else x_BSHD.float()
    turned = torch.view_as_real(torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)) * rotation_S1D).view(x.shape)
    return turned if x_BSHD.dtype == torch.float32 else turned.to(x_BSHD.dtype)
