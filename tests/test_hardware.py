"""What is said of the device: lines of nvidia-smi as it prints them, and this machine."""

from __future__ import annotations

import shutil
import subprocess

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


@pytest.mark.gpu
def test_a_gpu_tells_clocks_and_power():
    state = hardware.state(CUDA)
    assert state["clocks.sm"] > 0 and state["power.limit"] > 0
    assert hardware.software(CUDA)["cudnn"] > 0
