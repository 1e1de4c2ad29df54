"""What the Triton kernels of a chunk move and what a compiler makes of them, on any machine: `python -m benchmarks.launches [--arch 90]`.

A steady chunk of a Wan2.1 student at 480x832, four steps and the clean pass, then its decoding, is made of tensors without contents, with
bfloat16 numbers and with 8-bit ones; what would have been launched is noted and compiled ahead of time, specialised as by the launch.
A row for each says how often it is launched, the least bytes that it can move, what that takes at a GPU's bandwidth, and what its
instructions take if every scheduler issues one per clock: the larger of the two bounds it from below. JSON goes to stdout, a table to stderr.
`benchmarks.gpu` times the same launches.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, get_args
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import KernelInterface, driver

from rfbench import baselines, hardware, kernels, proof, video
from rfbench.backbones.wan import float8, lean, vae
from rfbench.backbones.wan.dit import Eight
from rfbench.config import SamplerCfg
from rfbench.sampler import stream
from rfbench.settings import Shortcuts

BASELINE = "wan/reward-forcing"
BANDWIDTH = {"H100 SXM": 3.35e12, "H200 SXM": 4.8e12}  # bytes per second, as NVIDIA prints them
ISSUED = 132 * 4 * 1.83e9  # instructions of a warp per second, on either: schedulers times the clock of the printed peaks
DECODING = ("rms silu", "as_uint8")  # kernels between convolutions, and behind them
STEADY = 2  # the chunk that finds a full window: from there on all have the same launches
META = torch.device("meta")


@dataclass(frozen=True)
class Launch:
    """A kernel of `rfbench.kernels` with its arguments by name, the tensors without contents, and the options of its compilation."""

    kernel: str
    grid: tuple[int, ...]
    given: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Kernel, switches that are on, numbers that come out."""
        return " ".join([self.kernel.strip("_"), *(key.lower() for key, value in self.options.items() if value is True), str(self.key[0][0])])

    @property
    def key(self) -> tuple[Any, ...]:
        """Launches that agree in it are compiled alike and move the same."""
        told = [(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value for value in self.given.values()]
        return *told, self.kernel, self.grid, *self.options.items()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.given.items() if isinstance(value, Tensor)}

    @property
    def least(self) -> int:
        """Bytes: each tensor once. Of a cache, which has room for more, as many rows as there are queries."""
        written = {name: self.given["queries"].nbytes for name in ("keys", "raw", "values") if self.kernel == "_place"}
        return sum({id(tensor): written.get(name, tensor.nbytes) for name, tensor in self.tensors.items()}.values())

    def ready(self, device: torch.device) -> Callable[[], Any]:
        """The launch itself, of random numbers on a device; whole numbers count up."""
        made = {id(tensor): filled(tensor, device) for tensor in self.tensors.values()}
        given = {name: made.get(id(value), value) for name, value in self.given.items()}
        return lambda: getattr(kernels, self.kernel)[self.grid](**given, **self.options)


def filled(like: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    if like.dtype == torch.int64:
        return made.copy_(torch.arange(like.numel(), device=device))
    return made.normal_() if like.dtype.itemsize > 1 else made


@functools.cache
def student(reduced: bool) -> tuple[SamplerCfg, Any]:
    """How it is sampled, and the backbone without contents."""
    ready = baselines.prepare(BASELINE, random_weights=True, reduced=reduced)
    with META:
        backbone: Any = ready.blank
    return ready.cfg.sampler, backbone.requires_grad_(False).to(META)


def noted(*, eight: Collection[Eight] = (), reduced: bool = False) -> list[tuple[Launch, int]]:
    """The launches of a steady chunk's passes, and of its decoding, and how often each comes; with 8-bit numbers of its passes alone."""
    launches = list[Launch]()

    class Noted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: launches.append(Launch(self.name, grid, dict(zip(self.kernel.arg_names, args, strict=False)), options))

    cfg, backbone = student(reduced)
    assert cfg.chunk is not None
    shape, dit = backbone.shape, backbone.denoiser
    chunk = (1, cfg.chunk, shape.channels, shape.height, shape.width)
    instead: dict[str, Any] = {name: Noted(name, kernel) for name, kernel in vars(kernels).items() if isinstance(kernel, KernelInterface)}
    with (
        mock.patch.multiple(kernels, **instead),
        mock.patch.object(lean, "ON", {}),  # what is for a GPU alone is taken
        mock.patch.object(lean, "attend", lambda q, k, v, by: torch.empty_like(q)),  # which is none of ours, and slow to pretend
        mock.patch.object(float8, "emulated", lambda q, k, v: torch.empty(q[0].shape, dtype=dit.dtype, device=META)),
        mock.patch.object(vae, "kernels", lambda device: True),
        mock.patch.object(hardware, "kernels", lambda device: True),
        mock.patch.object(proof, "tried", lambda name, trial: None),  # without numbers there is nothing to prove
    ):
        text = torch.empty(1, dit.cfg.text_len, dit.cfg.text_dim, dtype=dit.dtype, device=META)
        passes = lean.LeanDiT(dit, Shortcuts(kernels=True, graphs=False), eight=eight)
        noise, decode = torch.empty(chunk, dtype=dit.dtype, device=META), backbone.decoder()
        decode(noise)  # the first chunk, which has fewer frames
        for made in stream(backbone, text, (STEADY + 1) * chunk[1], cfg, lambda frames: noise, lean=passes):
            if made.index == STEADY - 1:
                launches.clear()
        if not eight:  # the decoder has no such numbers
            video.as_uint8(decode(noise))
    counted: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in launches:
        counted.setdefault(launch.key, []).append(launch)
    return [(each[0], len(each)) for each in counted.values()]


def compiled(launch: Launch, arch: int) -> dict[str, Any]:
    """What becomes of a launch on GPUs of compute capability `arch` / 10."""

    class Ahead:
        """Of a GPU, what a compiler asks for."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))
        get_current_device = staticmethod(lambda: arch)  # compiled kernels are kept device by device
        get_current_stream = staticmethod(lambda device: 0)

    with mock.patch.object(driver, "_active", Ahead()):
        made = getattr(kernels, launch.kernel).run(*launch.given.values(), grid=launch.grid, warmup=True, **launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
    ptx = made.asm["ptx"]
    moved = [width(how) for how in re.findall(r"(?:ld|st)\.global\.(\S+)", ptx)]
    return {
        "warps": made.metadata.num_warps,
        "registers": resources["reg"],
        "spilled": resources["stack"] + resources["local"],
        "instructions": instructions(made.asm["cubin"]),
        "loops": len(re.findall(r"scf\.(?:for|while)", made.asm["ttgir"])),
        "wide": sum(size for size in moved if size == 16) / sum(moved),
        "narrow": sum(size < 16 for size in moved),
        "contracted": made.metadata.enable_fp_fusion or re.search(r"fma\.\S*f32", ptx) is not None,
        "float64": ".f64" in ptx,
        "to_8_bit": sorted(set(re.findall(r"cvt\.(\S*e4m3x2\S*)", ptx))),
    }


def instructions(cubin: bytes) -> int:
    """Of 16 bytes each, with the padding behind them: what an ELF file's executable sections hold."""
    (start,), (size, number) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + each * size) for each in range(number)]
    return sum(length for _, _, flags, _, _, length in sections if flags & 4) // 16


def width(how: str) -> int:
    """Bytes that a thread moves by a PTX instruction such as `ld.global.v4.b32`."""
    many = re.search(r"v(\d)\.", how)
    return (int(many[1]) if many else 1) * int(how[-2:].lstrip("b")) // 8


def rows(arch: int) -> list[dict[str, Any]]:
    """One for each launch of a chunk."""
    found = list[dict[str, Any]]()
    for eight in ((), get_args(Eight)) if arch >= 89 else ((),):
        for launch, times in noted(eight=eight):
            known = compiled(launch, arch)
            issued = known["instructions"] * known["warps"] * math.prod(launch.grid) / ISSUED
            about = {"in": "8-bit" if eight else "bfloat16", "launch": launch.name, "times": times, "bytes": launch.least}
            bounds = {name: 1e6 * launch.least / speed for name, speed in BANDWIDTH.items()}
            found.append(about | {"us": bounds, "issued_us": 1e6 * issued, **known})
    return found


def shown(found: list[dict[str, Any]]) -> None:
    """A table for people, and what a chunk's launches come to."""
    print(f"{'':9} {'launch':44} times       MB  {'  '.join(f'us on {name}' for name in BANDWIDTH)}  us issued  registers", file=sys.stderr)
    for row in found:
        bounds = "  ".join(f"{row['us'][name]:14.1f}" for name in BANDWIDTH)
        told = f"{row['in']:9} {row['launch']:44} {row['times']:5} {row['bytes'] / 1e6:8.1f}  {bounds} {row['issued_us']:10.1f}"
        print(f"{told} {row['registers']:6} x {32 * row['warps']}", file=sys.stderr)
    for numbers in dict.fromkeys(row["in"] for row in found):
        for part in ("passes", "decoding"):
            own = [row for row in found if row["in"] == numbers and row["launch"].startswith(DECODING) == (part == "decoding")]
            if not own:
                continue
            bounds = ", ".join(f"{sum(row['times'] * row['us'][name] for row in own) / 1e3:.2f} ms on {name}" for name in BANDWIDTH)
            print(f"{numbers}, {part} of a chunk: {sum(row['times'] for row in own)} launches, at least {bounds}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten: 80, 89, 90; before 89 there are no 8-bit floats")
    arch = parser.parse_args().arch
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, and what is interpreted is not compiled; unset it")
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        found = rows(arch)
    shown(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
