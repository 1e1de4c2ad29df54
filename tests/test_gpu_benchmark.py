"""The script for GPUs runs from end to end, at a small size on whatever device there is."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_the_script_writes_a_record_of_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--chunks", "5", "--repeats", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["small"] and set(found["parts"]) == {"kernels", "ladder"} and all(part["ok"] for part in found["parts"].values())
    assert "passed" in found["parts"]["kernels"]["result"]
    assert [rung["name"] for rung in found["parts"]["ladder"]["result"]["rungs"]][:2] == ["naive", "slots"]


def test_a_part_that_fails_is_noted_and_the_next_one_is_done():
    parts: dict[str, Any] = {}
    assert not gpu.tried(parts, "bad", lambda: 1 / 0)
    assert gpu.tried(parts, "good", lambda: 2)
    assert "ZeroDivisionError" in parts["bad"]["error"] and parts["good"]["result"] == 2
