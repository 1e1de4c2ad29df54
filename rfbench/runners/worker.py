"""The other side of rfbench.processes, in an interpreter that need not have anything of ours: standard library only, Python 3.8 or newer.

    python -I worker.py JOB [FD]      JOB is a JSON file {"runner": FILE, "settings": {...}, "items": [{"id": ...}, ...]}

The runner is a file with a function `load(settings)` that returns a function `run(item)`; what that returns, as JSON, is the
item's row. Messages go to file descriptor FD (else to stdout), one JSON document per line:

    {"ready": seconds}  {"begin": id, "log": bytes printed so far}  {"done": id, "row": ..., "seconds": s}
    {"failed": id, "error": "...", "log": bytes printed so far}  {"end": exit code}

This process forks at once: its child does the work, and it waits for either the child or the end of stdin, which whoever
started it holds open. Without him nothing of the process group survives, even if the child never comes back from a call.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import sys
import time
import traceback
from types import ModuleType
from typing import Any


def main(job_file: str, rows: int = 1) -> int:
    """Supervise; returns the child's exit code, or 128 and the number of the signal that ended it."""
    os.set_inheritable(rows, False)
    child = os.fork()
    if child == 0:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        work(job_file, rows)
        sys.stdout.flush()
        os._exit(0)
    watched = [0]
    while True:
        ready, _, _ = select.select(watched, [], [], 0.1)
        if ready and os.read(0, 4096) == b"":
            if rows != 1:  # somebody started this, and not by hand
                os.killpg(0, signal.SIGKILL)
            watched = []
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            os.write(rows, b"\n")  # whatever line the child was torn from
            say(rows, end=code)
            return code


def work(job_file: str, rows: int) -> None:
    """Load once, then item by item; what a runner raises costs its item, but for an error that leaves the device unusable."""
    try:
        begun = time.monotonic()
        with open(job_file, encoding="utf-8") as file:
            job = json.load(file)
        run = module(job["runner"]).load(job["settings"])
        say(rows, ready=time.monotonic() - begun)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(3)
    for item in job["items"]:
        say(rows, begin=item["id"], log=os.fstat(2).st_size)
        begun = time.monotonic()
        try:
            row = run(item)
            say(rows, done=item["id"], row=row, seconds=time.monotonic() - begun)
        except Exception as error:
            sys.stdout.flush()
            traceback.print_exc()
            sys.stderr.flush()
            why = "{}: {}".format(type(error).__name__, " ".join(str(error).split()))[:1000]
            say(rows, failed=item["id"], error=why, log=os.fstat(2).st_size)
            if spoils(error):
                os._exit(4)
        sys.stdout.flush()
        sys.stderr.flush()


def module(path: str) -> ModuleType:
    """A runner file as a module, without its folder on the import path: a runner may be called after its package."""
    spec = importlib.util.spec_from_file_location("runner", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["runner"] = found
    spec.loader.exec_module(found)
    return found


def spoils(error: Exception) -> bool:
    """Whether what comes after an error may differ from what a fresh process would make."""
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "CUDA" in str(error)


def say(rows: int, **message: Any) -> None:
    """One message, as one line; NaN is no JSON, so it is the item's error."""
    line = memoryview((json.dumps(message, allow_nan=False) + "\n").encode())
    while line:
        line = line[os.write(rows, line) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:3])))
