"""Shortcuts that prove themselves: what rfbench.toml leaves open is taken where it runs and gives what the plain form gives.

A kernel is tried once per process, size and dtype, on a few drawn numbers, beside the plain form that it stands for, and so are the kernels
of attention that are not torch's own choice; a recorded pass beside the pass without a recording (`rfbench.backbones.wan.graphs`). So the
verdict is there before anything is made by it, and no bit of a clip depends on when that was. What fails is left out for the rest of the
process, which is said on stderr and recorded by runs; where rfbench.toml asks for it, it is an error.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from rfbench.errors import UserError
from rfbench.progress import say

Kernel = Callable[..., Any]
Rows8 = tuple[Tensor, Tensor]  # 8-bit floats, and what each row is multiplied by
Pair = tuple[Tensor | Rows8, Tensor | Rows8, torch.dtype]  # what a kernel and its plain form make, and the coarsest dtype that one of them rounds to
Trial = Callable[[Kernel], Iterable[Pair]]

left_out: dict[str, str] = {}  # what did not prove itself in this process, and why; a single kernel as `kernels.<name>`
_verdicts: dict[Hashable, str | None] = {}


def leave_out(name: str, why: str, *, asked: bool | None) -> None:
    """Go on without a shortcut, or without one of the kernels.

    Raises:
        UserError: it was asked for (code 1).
    """
    if asked:
        shortcut = name.partition(".")[0]
        raise UserError(f"[fast] shortcut '{shortcut}' is asked for, but '{name}' {why}; leave '{shortcut}' out of rfbench.toml", code=1)
    if name not in left_out:
        left_out[name] = why
        say(f"shortcut '{name}' is left out: it {why}")


def kernel(name: str, asked: bool | None, device: torch.device, sizes: Hashable, trial: Trial) -> Kernel | None:
    """A function of `rfbench.kernels`, once it has proved itself on a device for rows of such sizes and dtypes; None where it is left out.

    Raises:
        UserError: it was asked for (True) and does not compile, or gives something else (code 1).
    """
    if asked is False:
        return None
    key = (name, device, sizes)
    if key not in _verdicts:
        _verdicts[key] = tried(functools.partial(_function, name), trial)
    if (why := _verdicts[key]) is not None:
        leave_out(f"kernels.{name}", why, asked=asked)
        return None
    return _function(name)


@torch.no_grad()
def tried(find: Callable[[], Kernel], trial: Trial) -> str | None:
    """What keeps a kernel from being used; None if it is as it should be."""
    try:
        for found, wanted, dtype in trial(find()):
            ours, theirs = _values(found), _values(wanted)
            off = float((ours - theirs).norm() / theirs.norm())
            if not off <= bound(dtype):
                return f"is {off:.1e} apart from its plain form, where {bound(dtype):.1e} is rounding"
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except Exception as error:  # of a compiler and a driver, whose errors have no common kind
        return f"fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def bound(dtype: torch.dtype) -> float:
    """Relative L2 distance that rounding explains: sums in float32 in another order, and a few roundings to the dtype, each of which is less than a
    third of its epsilon off in the mean; of bytes, one in a thousand that is one off."""
    return (torch.finfo(dtype).eps if dtype.is_floating_point else 2**-12) + 8 * torch.finfo(torch.float32).eps


def drawn(*size: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers for a trial, of nobody else's generator."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _function(name: str) -> Kernel:
    found: Kernel = getattr(importlib.import_module("rfbench.kernels"), name)
    return found


def _values(x: Tensor | Rows8) -> Tensor:
    return x.double() if isinstance(x, Tensor) else x[0].double() * x[1].double()
