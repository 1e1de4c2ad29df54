"""The device that something runs on: what it is called here, and in which state it is."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from rfbench import strict
from rfbench.settings import Shortcuts, settings

ASKED = (  # of nvidia-smi; clocks in MHz, power in W, temperature in degrees Celsius
    *("name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("power.limit", "power.draw", "temperature.gpu", "persistence_mode", "mig.mode.current"),
)


def name(device: torch.device) -> str:
    """What a device is called here: its table in rfbench.toml, else its own name in path letters."""
    return settings().hardware_name(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")


def peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The most TFLOP/s that products in a dtype can reach here, and whose figure that is: the maker's, from rfbench.toml, else measured."""
    if (figure := printed(device, str(dtype).removeprefix("torch."))) is not None:
        return figure, "the maker's dense peak"
    size = 768
    x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        begun = time.perf_counter() if device.type == "cuda" else time.process_time()
        torch.mm(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() if device.type == "cuda" else time.process_time()) - begun)
    return 2 * size**3 / min(seconds) / 1e12, f"measured with products of {size} x {size}"


def printed(device: torch.device, dtype: str) -> float | None:
    """The dense peak of a dtype, as rfbench.toml has it of the device's maker, in TFLOP/s."""
    table = settings().hardware.get(name(device))
    return table.tflops.get(dtype) if table is not None else None


def software(device: torch.device) -> dict[str, Any]:
    """Versions and switches that a speed depends on and that `provenance` does not record."""
    found: dict[str, Any] = {"float32_matmul": torch.get_float32_matmul_precision(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found |= {"cudnn": torch.backends.cudnn.version(), "cudnn_benchmark": torch.backends.cudnn.benchmark}
        found |= {"cudnn_tf32": torch.backends.cudnn.allow_tf32}
        try:
            found["triton"] = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            found["triton"] = None
    return found


def timed_by() -> dict[str, Any]:
    """Of the settings of this machine, those that a speed depends on, so that a timing is identified by them as well, unlike videos: `[fast]` of
    rfbench.toml but for the size of `generate`'s passes, and the number of threads."""
    fast: dict[str, Any] = strict.as_plain(settings().fast)
    return {key: value for key, value in fast.items() if key != "tokens"} | {"threads": torch.get_num_threads()}


def state(device: torch.device) -> dict[str, Any]:
    """What changes from minute to minute: clocks, power and temperature of a GPU; load and clock of a CPU."""
    return _gpu(device) if device.type == "cuda" else _cpu()


def _gpu(device: torch.device) -> dict[str, Any]:
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not found: clocks and power limit are not known"}
    properties = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits", "-i", _uuid(str(properties.uuid))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"nvidia-smi": f"{type(error).__name__}: clocks and power limit are not known"}
    if done.returncode:
        return {"nvidia-smi": " ".join((done.stdout + done.stderr).split())[:200]}
    return parsed(done.stdout)


def energy(device: torch.device) -> tuple[Callable[[], float] | None, str]:
    """How to read the joules that a GPU has taken since its driver was loaded, and who tells; without it, why nobody does."""
    if device.type != "cuda":
        return None, "not measured: a CPU does not tell"
    try:
        import pynvml
    except ImportError:
        return None, "not measured: nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(_uuid(str(torch.cuda.get_device_properties(device).uuid)))
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return None, f"not measured: NVML says {error}"

    def joules() -> float:
        torch.cuda.synchronize(device)  # of all that it was given, such as prompts to encode
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000

    return joules, "NVML"


def parsed(line: str) -> dict[str, Any]:
    """A line of nvidia-smi's CSV, numbers as numbers; what it does not know (`[N/A]`) is None."""
    cells = [cell.strip() for cell in line.strip().split(", ")]
    found: dict[str, Any] = {}
    for key, cell in zip(ASKED, cells, strict=True):
        number = re.fullmatch(r"\d+(\.\d+)?", cell) is not None
        found[key] = float(cell) if number and key.startswith(("clocks", "power", "temperature")) else None if cell.startswith("[") else cell
    return found


def _uuid(text: str) -> str:
    """As nvidia-smi spells it; torch leaves the prefix out."""
    return text if text.startswith(("GPU-", "MIG-")) else f"GPU-{text}"


def _cpu() -> dict[str, Any]:
    found: dict[str, Any] = {"load": [round(part, 2) for part in os.getloadavg()]}
    try:
        clocks = [float(clock) for clock in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)]
    except OSError:  # not Linux
        clocks = []
    return found | {"mhz": round(sum(clocks) / len(clocks)) if clocks else None}


@functools.cache
def _asked() -> Shortcuts:
    return settings().fast.shortcuts


_instead: list[Shortcuts] = []


def shortcuts() -> Shortcuts:
    """Those that decoding and copying take: of rfbench.toml of this process, or in a block of `by` the ones that it names."""
    return _instead[-1] if _instead else _asked()


@contextlib.contextmanager
def by(named: Shortcuts) -> Iterator[None]:
    """Decode and copy by other shortcuts than those of rfbench.toml, as the rungs of a ladder do."""
    _instead.append(named)
    try:
        yield
    finally:
        _instead.pop()


def kernels(device: torch.device) -> bool | None:
    """Whether decoding and copying take kernels on a device: those that prove themselves (None), all of them or an error (True), or none."""
    return shortcuts().kernels if device.type == "cuda" else False
