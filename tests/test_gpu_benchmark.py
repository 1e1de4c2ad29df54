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
    assert (
        found["small"] and set(found["parts"]) == {"kernels", "questions", "ladder", "stream"} and all(part["ok"] for part in found["parts"].values())
    )
    assert "passed" in found["parts"]["kernels"]["result"]
    assert [rung["name"] for rung in found["parts"]["ladder"]["result"]["rungs"]][:2] == ["naive", "slots"]


def test_what_a_part_does_is_noted_however_it_ends():
    def told(program: str, limit: float = 60.0) -> dict[str, Any]:
        found = gpu.alone([sys.executable, "-c", program], limit)
        assert found.pop("seconds") >= 0
        return found

    assert told("print('talk'); print('[1, 2]')") == {"result": [1, 2], "ok": True}
    assert told("1 / 0") == {"error": "exit 1: ZeroDivisionError: division by zero", "ok": False} | told("1 / 0")
    assert "ZeroDivisionError" in told("1 / 0")["error"]
    assert told("print(3); raise SystemExit('half of it')") == {"result": 3, "error": "exit 1: half of it", "ok": False}
    assert told("import os; os.abort()")["error"].startswith("exit -6")
    assert told("import time; time.sleep(60)", 0.5) == {"error": "took longer than 0.5 s", "ok": False}


def test_a_record_is_there_after_every_part(tmp_path, monkeypatch):
    """Also when the last one takes everything with it."""
    seen = list[list[str]]()

    def alone(command: list[str], limit: float) -> dict[str, Any]:
        for path in tmp_path.iterdir():
            seen.append(list(json.loads(path.read_text())["parts"]))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {"result": command[4], "ok": True, "seconds": 0.0}

    monkeypatch.setattr(gpu, "alone", alone)
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    assert seen == [["kernels"], ["kernels", "questions"], ["kernels", "questions", "ladder"]]
    assert sum(limit for _, limit in gpu.PARTS.values()) < 480
