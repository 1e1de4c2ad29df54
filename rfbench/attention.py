"""The one door to attention, and the rotary position embedding that goes with it.

Shapes: B batch, S query tokens, K key tokens, H heads, D head width, F frames, h rows, w columns.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from rfbench import proof
from rfbench.errors import UserError
from rfbench.settings import settings
from rfbench.transfer import to_device

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # queries, keys, values, mask -> [B, S, H, D]


def attend(q_BSHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, mask_SK: Tensor | None = None, *, by: str | None = None) -> Tensor:
    """Softmax attention of every query over every key (or those that `mask_SK` allows), in the values' dtype: [B, S, H, D].

    `by` names a kernel; without it, it is the one of this process.
    """
    if not q_BSHD.dtype == k_BKHD.dtype == v_BKHD.dtype:
        q_BSHD, k_BKHD = q_BSHD.to(v_BKHD.dtype), k_BKHD.to(v_BKHD.dtype)
    name = by or kernel(v_BKHD.device)
    if name in LIMITED and (mask_SK is not None or not fits(q_BSHD, v_BKHD)):
        name = "torch-sdpa"
    return KERNELS[name](q_BSHD, k_BKHD, v_BKHD, mask_SK)


def fits(q_BSHD: Tensor, v_BKHD: Tensor) -> bool:
    """Whether a kernel that is not torch's own choice is for such tensors: half precision, heads of 128 at most, and no gradient to be recorded."""
    graded = torch.is_grad_enabled() and (q_BSHD.requires_grad or v_BKHD.requires_grad)
    return v_BKHD.dtype in (torch.bfloat16, torch.float16) and v_BKHD.shape[-1] <= 128 and v_BKHD.shape[-1] % 8 == 0 and not graded


@functools.cache
def kernel(device: torch.device) -> str:
    """The attention kernel of passes without gradients on a device, as rfbench.toml of this process says; for the run's record."""
    return choose(settings().fast.attention, device)


def choose(asked: str, device: torch.device) -> str:
    """The kernel that is asked for; of "auto" the first that can be had here, by what the device can do and never by its name, and proves itself.

    FlashAttention 3 and cuDNN lead on Hopper, and torch's own choice there would be FlashAttention 2. None has been measured here yet.

    Raises:
        UserError: it cannot be had on this device.
    """
    if asked == "auto":
        return next(name for name in KERNELS if missing(name, device) is None and (name not in LIMITED or proves_itself(name, device)))
    if (why := missing(asked, device)) is not None:
        raise UserError(f"[fast] attention '{asked}' {why}; leave it out of rfbench.toml, or take 'auto'")
    return asked


def proves_itself(name: str, device: torch.device) -> bool:
    """Whether a kernel gives what the plain form gives in float32, for a chunk that looks at a window and at a text; else it is left out."""

    def trial(run: proof.Kernel) -> Iterator[proof.Pair]:
        for keys in (288, 512):
            q, k, v = (proof.drawn(2, tokens, 3, 128, seed=seed, device=device, dtype=torch.bfloat16) for seed, tokens in enumerate((96, keys, keys)))
            yield run(q, k, v, None), KERNELS["math"](q.float(), k.float(), v.float(), None), torch.bfloat16

    why = proof.tried(lambda: KERNELS[name], trial)
    if why is not None:
        proof.leave_out(f"attention.{name}", why, asked=None)
    return why is None


def missing(name: str, device: torch.device) -> str | None:
    """Why a kernel cannot be had on a device; None if it can."""
    if name not in LIMITED:
        return None
    if device.type != "cuda":
        return f"needs a CUDA device and this is '{device.type}'"
    capability = torch.cuda.get_device_capability(device)
    if name == "fa3":
        if capability != (9, 0):
            return f"needs compute capability 9.0 and this device has {capability[0]}.{capability[1]}"
        return None if any(importlib.util.find_spec(module) for module in FA3) else f"needs package {' or '.join(FA3)}"
    if capability < (8, 0):
        return f"needs compute capability 8.0 and this device has {capability[0]}.{capability[1]}"
    if name == "cudnn":
        return None if torch.backends.cudnn.is_available() else "needs cuDNN"
    return None if importlib.util.find_spec("flash_attn") else "needs package flash_attn"


def flash(name: str, q_BSHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, **more: Tensor) -> Tensor:
    """`flash_attn_func` of a package, which takes and gives [B, S, H, D]; some versions give the softmax's denominators beside it."""
    modules = FA3 if name == "fa3" else ("flash_attn",)
    there = (module for look in (sys.modules.get, importlib.util.find_spec) for module in modules if look(module))  # looking on disk takes long
    out = importlib.import_module(next(there)).flash_attn_func(q_BSHD, k_BKHD, v_BKHD, causal=False, **more)
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def _package(name: str) -> Kernel:
    """The kernel of a package."""

    def run(q_BSHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, mask_SK: Tensor | None) -> Tensor:
        return flash(name, q_BSHD, k_BKHD, v_BKHD)

    return run


def _sdpa(*forced: SDPBackend) -> Kernel:
    """Torch's attention, by its own choice or by a forced one."""

    def run(q_BSHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, mask_SK: Tensor | None) -> Tensor:
        q, k, v = q_BSHD.transpose(1, 2), k_BKHD.transpose(1, 2), v_BKHD.transpose(1, 2)
        with sdpa_kernel(list(forced)) if forced else contextlib.nullcontext():
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_SK).transpose(1, 2)

    return run


FA3 = ("flash_attn_interface", "fa3_fwd_interface")  # modules of FlashAttention 3: of its authors, and of a build of its forward pass alone
KERNELS: dict[str, Kernel] = {  # best first
    "fa3": _package("fa3"),
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "fa2": _package("fa2"),
    "torch-sdpa": _sdpa(),
    "math": _sdpa(SDPBackend.MATH),
}
LIMITED = ("fa3", "cudnn", "fa2")  # in what they take, see `fits`


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
    return to_device(torch.polar(torch.ones_like(angle), angle).to(torch.complex64), device)


def rotate(x_BSHD: Tensor, rotation_S1D: Tensor) -> Tensor:
    """Rotate adjacent pairs of the head by their position, in float32."""
    x = x_BSHD if x_BSHD.dtype == torch.float32 else x_BSHD.float()
    turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation_S1D).flatten(-2)
    return turned if x_BSHD.dtype == torch.float32 else turned.to(x_BSHD.dtype)
