"""Copies between host and device that the host does not wait for. On a CPU there is nothing to copy. None of it has run on a GPU yet."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rfbench.hardware import shortcuts

PINNED = {"cuda"}  # kinds of devices that read and write page-locked memory by themselves; from other memory the host copies first


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; the copy takes its place in the device's queue."""
    return (x.pin_memory() if device.type in PINNED else x).to(device, non_blocking=True)


def to_host(x: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host, beside whatever its device is given to do next; -> wait for it, and the copy.

    Page-locked memory is used again once it is free, so a caller that holds two copies at a time has two buffers.
    """
    if x.device.type not in PINNED:
        return lambda: x
    if shortcuts().copies is False:
        copied = x.cpu()
        return lambda: copied
    beside = side(x.device)
    beside.wait_stream(torch.cuda.current_stream(x.device))
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    with torch.cuda.stream(beside):
        host.copy_(x, non_blocking=True)
        done = beside.record_event()
    x.record_stream(beside)

    def there() -> Tensor:
        done.synchronize()
        return host

    return there


def side(device: torch.device) -> torch.cuda.Stream:
    """The queue of a device that copies to the host are in: one for themselves, unless `copies` is switched off."""
    return torch.cuda.current_stream(device) if shortcuts().copies is False else _own(device)


@functools.cache
def _own(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
