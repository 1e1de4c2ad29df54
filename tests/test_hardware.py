"""What is said of the device: lines of nvidia-smi as it prints them, and this machine."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
import types

import pytest
import torch

from rfbench import hardware

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_line_of_nvidia_smi():
    line = "NVIDIA H100 80GB HBM3, 570.86.15, P0, 1980, 2619, 1980, 2619, 700.00, 118.35, 33, Enabled, [N/A]\n"
    assert hardware.parsed(line) == {
        "name": "NVIDIA H100 80GB HBM3",
        "driver_version": "570.86.15",
        "pstate": "P0",
        "clocks.sm": 1980.0,
        "clocks.mem": 2619.0,
        "clocks.max.sm": 1980.0,
        "clocks.max.mem": 2619.0,
        "power.limit": 700.0,
        "power.draw": 118.35,
        "temperature.gpu": 33.0,
        "persistence_mode": "Enabled",
        "mig.mode.current": None,
    }


def test_a_gpu_that_cannot_be_asked_says_so(monkeypatch):
    class Properties:
        uuid = "3f0c"

    asked = []

    def refuse(command, **how):
        asked.append(command)
        return subprocess.CompletedProcess(command, 9, "NVIDIA-SMI has failed\n", "")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "not found" in hardware.state(CUDA)["nvidia-smi"]
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", refuse)
    assert hardware.state(CUDA) == {"nvidia-smi": "NVIDIA-SMI has failed"}
    assert asked[0][-2:] == ["-i", "GPU-3f0c"]


def test_a_cpu_has_a_load_and_a_name():
    state = hardware.state(CPU)
    assert len(state["load"]) == 3 and min(state["load"]) >= 0
    assert state["mhz"] is None or 100 < state["mhz"] < 10_000
    assert hardware.name(CPU) == "cpu"
    assert hardware.software(CPU) == {"float32_matmul": torch.get_float32_matmul_precision(), "threads": torch.get_num_threads()}


class Nvml(types.ModuleType):
    """As much of NVML as is asked: a counter in millijoules, or a GPU that has none."""

    class NVMLError(Exception):
        pass

    def __init__(self, refused: str = "") -> None:
        super().__init__("pynvml")
        self.refused, self.asked, self.spent = refused, "", 5_000_000

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked = uuid
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        assert handle == "handle"
        if self.refused:
            raise self.NVMLError(self.refused)
        self.spent += 1500
        return self.spent


def test_energy_is_read_in_joules_from_the_gpu_that_torch_uses(monkeypatch):
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="3f0c"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    read, whose = hardware.energy(CUDA)
    assert read is not None and whose == "NVML" and nvml.asked == "GPU-3f0c"
    assert read() - read() == -1.5


def test_energy_that_nobody_tells_is_said_to_be_missing(monkeypatch):
    assert hardware.energy(CPU) == (None, "not measured: a CPU does not tell")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="3f0c"))
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("Not Supported"))
    assert hardware.energy(CUDA) == (None, "not measured: NVML says Not Supported")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert hardware.energy(CUDA) == (None, "not measured: nvidia-ml-py is not installed")


def test_the_stand_in_has_the_names_of_the_package():
    pynvml = pytest.importorskip("pynvml")
    assert issubclass(pynvml.NVMLError, Exception)
    for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"):
        theirs, ours = inspect.signature(getattr(pynvml, name)), inspect.signature(getattr(Nvml(), name))
        assert len(theirs.parameters) == len(ours.parameters)


@pytest.mark.gpu
def test_a_gpu_tells_clocks_and_power():
    state = hardware.state(CUDA)
    assert state["clocks.sm"] > 0 and state["power.limit"] > 0
    assert hardware.software(CUDA)["cudnn"] > 0
