"""Every kernel is compiled at full size for GPUs that are not here, and what comes out holds what only a compiler can tell."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

launches: Any = pytest.importorskip("benchmarks.launches", reason="there is no triton; pip install triton", exc_type=ImportError)

ROWS, WIDTH, HALF = 4680, 1536, 2  # tokens of a chunk, width of the network, bytes of a number


@functools.cache
def compiled(arch: int) -> list[dict[str, Any]]:
    """In a process of its own: in this one kernels are interpreted."""
    told = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "error", "-m", "benchmarks.launches", "--arch", str(arch)], capture_output=True, text=True, env=told)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_what_a_compiler_makes_of_each_kernel(arch):
    found = compiled(arch)
    assert {row["launch"].split()[0] for row in found} >= {"place", "norm", "rms", "as_uint8", *(("quantised",) if arch >= 89 else ())}
    for row in found:
        assert row["spilled"] == 0 and not row["float64"], row
        assert not row["contracted"], row  # products and sums round one by one, as in the interpreter and in torch
        assert row["wide"] >= 0.85 and row["narrow"] <= 3, row  # a thread's bytes come and go 16 at a time, but for a few
        assert row["loops"] == 0 and row["issued_us"] < row["us"]["H100 SXM"], row  # memory is what a launch waits for
        assert row["to_8_bit"] == (["rn.satfinite.e4m3x2.f32"] if "eight" in row["launch"] or row["launch"].startswith("quantised") else []), row


def test_a_pass_moves_what_is_counted_by_hand():
    row = ROWS * WIDTH * HALF
    tables = {"rms": 1, "norm": 2, "norm gated added": 3, "norm added": 2}
    tensors = {"rms": 2, "norm": 2, "norm gated added": 4, "norm added": 4}
    found = {(row["launch"], row["in"]): row for row in compiled(90)}
    for name, number in tensors.items():
        size = f"1, {ROWS}" if name == "rms" else ROWS
        assert found[f"{name} ({size}, {WIDTH})", "bfloat16"]["bytes"] == number * row + tables[name] * WIDTH * HALF
    place = 3 * row + 3 * row + 2 * WIDTH * HALF + ROWS * 128 * 4 + ROWS * 8  # q, k and v in and out; gains; rotations; where the cache has them
    assert found[f"place ({ROWS}, {3 * WIDTH})", "bfloat16"]["bytes"] == place
    assert found[f"place raw ({ROWS}, {3 * WIDTH})", "bfloat16"]["bytes"] == place + row
    passes = [row for row in compiled(90) if row["in"] == "bfloat16" and not row["launch"].startswith(launches.DECODING)]
    assert sum(row["times"] for row in passes if row["launch"].startswith("place")) == 5 * 30  # a chunk's four steps and its clean pass


def test_noted_launches_can_be_made():
    """With numbers in place of none, by the interpreter where there is no GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = {launch.kernel: launch for launch, _ in launches.noted(reduced=True) if not launch.name.startswith("rms silu")}
    assert set(kinds) == {"_norm", "_rms", "_place", "_as_uint8"}
    for launch in kinds.values():
        launch.ready(device)()
