"""Work in another interpreter, held to everything that a worker can do wrong. Each test runs real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rfbench import processes
from rfbench.errors import UserError
from rfbench.processes import Program, work

RUNNER = """
import ctypes, json, os, signal, subprocess, sys, time

def load(settings):
    print("noise on stdout", flush=True)
    with open(settings["loads"], "a") as file:
        file.write("x")
    if settings.get("load"):
        exec(settings["load"])
    def run(item):
        print("working on", item["id"], flush=True)
        answer = {}
        exec(item.get("do", ""), {**globals(), "item": item, "answer": answer})
        return {"twice": 2 * item.get("number", 0), **answer}
    return run
"""


@pytest.fixture
def program(tmp_path):
    runner = tmp_path / "runner.py"
    runner.write_text(RUNNER)
    return Program(Path(sys.executable), runner, {"loads": str(tmp_path / "loads")}, startup_s=60, item_s=20)


def outcomes(program, items, folder, **changes):
    import dataclasses

    return list(work(dataclasses.replace(program, **changes), items, folder))


def loads(tmp_path):
    return len((tmp_path / "loads").read_text())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int, seconds: float = 10) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and alive(pid):
        time.sleep(0.05)
    return not alive(pid)


def test_items_in_rows_out_loaded_once_in_order(program, tmp_path):
    items = [{"id": str(i), "number": i} for i in range(50)]
    found = outcomes(program, items, tmp_path)
    assert [(outcome.id, outcome.row) for outcome in found] == [(str(i), {"twice": 2 * i}) for i in range(50)]
    assert loads(tmp_path) == 1 and "working on 49" in (tmp_path / "log.txt").read_text()
    assert outcomes(program, [], tmp_path) == [] and loads(tmp_path) == 1, "nothing to do starts nothing"


DEATHS = {
    "raises": ("raise ValueError('two\\nlines')", "ValueError: two lines", 1),
    "not JSON": ("answer['x'] = float('nan')", "ValueError: Out of range float values are not JSON compliant", 1),
    "out of memory": ("class OutOfMemoryError(RuntimeError): pass\nraise OutOfMemoryError('CUDA out of memory. Tried')", "CUDA out of memory", 2),
    "exits": ("os._exit(7)", "the worker ended with exit code 7", 2),
    "sys.exit": ("sys.exit(5)", "the worker ended with exit code", 2),
    "crashes": ("ctypes.string_at(0)", "the worker was killed by SIGSEGV", 2),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, as happens when memory runs out", 2),
    "says so and dies": ("print('libc: Out of Memory', flush=True); os.abort()", "killed by SIGABRT, out of memory", 2),
    "hangs": ("time.sleep(600)", "took longer than the 2 s that it has for one item", 2),
    "supervisor dies": ("os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)", "the worker", 2),
}


@pytest.mark.parametrize("how", DEATHS)
def test_an_item_that_fails_costs_itself_alone(program, tmp_path, how):
    do, reason, starts = DEATHS[how]
    items = [{"id": "a", "number": 1}, {"id": "b", "do": do}, {"id": "c", "number": 3}]
    a, b, c = outcomes(program, items, tmp_path, item_s=2 if how in ("hangs", "supervisor dies") else 20)
    assert (a.row, b.row, c.row) == ({"twice": 2}, None, {"twice": 6})
    assert b.error is not None and reason in b.error and "\n" not in b.error
    assert "working on b" in b.log and "working on a" not in b.log and "working on c" not in b.log, "the log of this item, not of another"
    assert loads(tmp_path) == starts, "only what spoils a process costs another start"


GARBAGE = """
for fd in (1, 2):
    os.write(fd, b'{"done": "b", "row": {"twice": 666}}' + bytes(range(256)) * 200)
print('{"done": "b", "row": 1}', flush=True)
subprocess.run([sys.executable, "-c", "print('{}')"], check=True)
"""


def test_nothing_that_is_printed_is_taken_for_a_row(program, tmp_path):
    (outcome,) = outcomes(program, [{"id": "b", "number": 4, "do": GARBAGE}], tmp_path)
    assert outcome.row == {"twice": 8} and outcome.error is None


def test_a_process_that_a_library_left_behind_does_not_outlive_the_work(program, tmp_path):
    do = "answer['pid'] = subprocess.Popen(['sleep', '600']).pid"
    fork = "pid = os.fork()\nif pid == 0:\n    time.sleep(600)\nanswer['pid'] = pid"  # holds the pipe of rows open
    for code in (do, fork):
        (outcome,) = outcomes(program, [{"id": "a", "do": code}], tmp_path)
        assert gone(outcome.row["pid"])


def test_who_stops_listening_ends_the_worker(program, tmp_path):
    items = [{"id": "a", "do": "answer['pid'] = os.getpid()"}, {"id": "b", "do": "time.sleep(600)"}]
    listening = work(program, items, tmp_path)
    pid = next(listening).row["pid"]
    assert alive(pid)
    listening.close()  # type: ignore[attr-defined]
    assert gone(pid)


STUCK = "ctypes.PyDLL(None).sleep(600)"  # holds the interpreter's lock: no thread of the worker can notice anything


@pytest.mark.parametrize("how", ["time.sleep(600)", STUCK], ids=["waiting", "stuck in C"])
def test_the_worker_does_not_outlive_a_parent_that_is_killed(program, tmp_path, how):
    parent = tmp_path / "parent.py"
    do = f"child = subprocess.Popen(['sleep', '600'])\nopen({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n{how}"
    parent.write_text(
        textwrap.dedent(f"""
        from pathlib import Path
        from rfbench.processes import Program, work
        program = Program(Path({sys.executable!r}), Path({str(program.runner)!r}), {dict(program.settings)!r}, 60, 600)
        list(work(program, [dict(id="a", do={do!r})], Path({str(tmp_path)!r})))
        """)
    )
    process = subprocess.Popen([sys.executable, str(parent)], env=os.environ | {"PYTHONPATH": str(processes.WORKER.parents[2])})
    until = time.monotonic() + 60
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert gone(pid), "the worker, and what it started"


def test_a_worker_that_does_not_start_is_one_sentence(program, tmp_path):
    settings = dict(program.settings)
    with pytest.raises(UserError, match=r"runner\.py does not start: it ended with exit code 3 \(ImportError: no torch\); its log is .*log\.txt"):
        outcomes(program, [{"id": "a"}], tmp_path, settings={**settings, "load": "raise ImportError('no torch')"})
    with pytest.raises(UserError, match=r"it took longer than the 1 s that it has to start \(noise on stdout\)"):
        outcomes(program, [{"id": "a"}], tmp_path, settings={**settings, "load": "time.sleep(600)"}, startup_s=1)
    with pytest.raises(UserError, match=r"/no/python does not start \(No such file or directory\)"):
        outcomes(program, [{"id": "a"}], tmp_path, python=Path("/no/python"))


def test_it_is_not_tried_for_ever(program, tmp_path):
    items = [{"id": str(i), "do": "os._exit(9)"} for i in range(6)]
    found = []
    with pytest.raises(
        UserError, match=r"runner\.py failed 3 times in a row \(the worker ended with exit code 9\), so that 3 of 6 were not tried; its log is"
    ) as raised:
        for outcome in work(program, items, tmp_path):
            found.append(outcome.id)
    assert found == ["0", "1", "2"] and raised.value.code == 1
    after = outcomes(program, [{"id": "fine"}, *items], tmp_path)
    assert [outcome.error is None for outcome in after] == [True] + [False] * 6, "what worked once is given up later"
    fine = [{"id": str(i), "do": "os._exit(9)" if i % 2 else ""} for i in range(8)]
    assert [outcome.error is None for outcome in outcomes(program, fine, tmp_path)] == [True, False] * 4, "but for as long as something gets done"


def test_the_worker_sees_nothing_of_ours(program, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(processes.WORKER.parents[2]))
    do = "answer.update(path=sys.path, cwd=os.getcwd(), x=os.environ['X'])"
    (outcome,) = outcomes(program, [{"id": "a", "do": do}], tmp_path, cwd=tmp_path, variables={"X": "1"})
    assert (outcome.row["cwd"], outcome.row["x"]) == (str(tmp_path), "1")
    ours = {str(processes.WORKER.parent), str(processes.WORKER.parents[2]), str(tmp_path), ""}
    assert not ours & set(outcome.row["path"])


def test_the_worker_speaks_old_pythons_too():
    """Upstream packages pin interpreters as old as 3.8."""
    import ast

    ast.parse(processes.WORKER.read_text(), feature_version=(3, 8))
