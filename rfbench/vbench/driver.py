"""Our side of `rfbench.vbench_worker`, which runs in the environment `vbench`: a job file out, one JSON line per item back.

The worker may die of a clip. What it had answered is kept, and the rest is given to new workers in halves, until the clip is alone;
then that clip has a reason instead of a value, and every other its value. The worker also says which clips it turns to: the fast
driver to one, vbench's own functions to all that they are given at once. If these are not answered in time, a new worker gets the
rest; a clip that was alone has a reason, several are halved like those that a worker died of. An answer that came counts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rfbench import envs, records
from rfbench.errors import UserError

MODULE = "rfbench.vbench_worker"
BARREN = 16  # workers in a row that answered nothing: more halvings than any suite has clips for
PATIENCE = {"cuda": 900.0, "cpu": 7200.0}  # seconds for one dimension of each clip, its networks' loading included
Item = Mapping[str, Any]  # as rfbench.vbench_worker.jobs.Item
Line = dict[str, Any]  # as rfbench.vbench_worker.jobs.Row


def check(python: Path, dimensions: Sequence[str], job: Mapping[str, Any]) -> list[Line]:
    """What each dimension is or lacks on this machine: version, or problem and fix.

    Raises:
        UserError: the worker does not start (code 1).
    """
    drawn = [] if job["random"] is None else ["--random", str(job["random"])]
    command = [str(python), "-m", MODULE, "--check", *dimensions, "--driver", job["driver"], *drawn]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if len(lines) != len(dimensions):
        raise UserError(f"the environment 'vbench' does not work ({_last(done.stderr)}); build it again: rfbench env vbench --fresh", code=1)
    return lines


def answers(python: Path, items: Sequence[Item], job: Mapping[str, Any], folder: Path) -> Iterator[Line]:
    """The answer to every item, as they come; closing the iterator ends the worker.

    Raises:
        UserError: the worker refuses the job, or workers die again and again without an answer (code 1).
    """
    groups, barren = [list(items)], 0
    while groups:
        group = groups.pop()
        left = {item["id"]: item for item in group}
        try:
            for line in _session(python, group, job, folder):
                if left.pop(line["id"], None) is not None:
                    yield line
        except _StuckError as stuck:
            over = {item["path"] for item in group if item["id"] in stuck.items}
            if len(over) < 2:
                for item in [item for item in left.values() if item["path"] in over]:
                    yield {"id": left.pop(item["id"])["id"], "value": None, "weight": 0, "reason": str(stuck)}
                groups += [list(left.values())] if left else []
                continue
        if not left:
            barren = 0
            continue
        barren = barren + 1 if len(left) == len(group) else 0
        why = _last((folder / "log.txt").read_text(encoding="utf-8", errors="replace"))
        paths = list(dict.fromkeys(item["path"] for item in left.values()))
        if barren == BARREN:
            raise UserError(f"VBench's worker died {BARREN} times without an answer ({why}); its log is {folder / 'log.txt'}", code=1)
        if len(paths) == 1:
            for item in left.values():
                yield {"id": item["id"], "value": None, "weight": 0, "reason": f"VBench's worker died of it ({why})"}
            continue
        for half in (paths[len(paths) // 2 :], paths[: len(paths) // 2]):
            groups.append([item for item in left.values() if item["path"] in half])


class _StuckError(Exception):
    """A worker that was ended because items that it had turned to were not answered in time; they are none if the last answer just came."""

    def __init__(self, items: Sequence[str], seconds: float) -> None:
        super().__init__(f"VBench's worker was at it for {seconds:g} s and was ended")
        self.items = items


def _session(python: Path, items: Sequence[Item], job: Mapping[str, Any], folder: Path) -> Iterator[Line]:
    """The answers of one worker, whole lines only, up to its end.

    Raises:
        _StuckError: it was ended over items.
    """
    awaited, patience, deadline, late = list[str](), 0.0, math.inf, False
    records.write_json(folder / "job.json", {**job, "items": list(items)})
    with (folder / "log.txt").open("w") as log:
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log, "start_new_session": True, "env": _environment()}
        with subprocess.Popen([str(python), "-m", MODULE, str(folder / "job.json")], **options) as process:
            assert process.stdout is not None

            def end() -> None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None

            try:
                torn = b""
                while True:
                    left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
                    if not select.select([process.stdout], [], [], left)[0]:
                        end()
                        late, deadline = True, math.inf  # what it has written is still read
                        continue
                    if not (data := os.read(process.stdout.fileno(), 1 << 16)):
                        break
                    *whole, torn = (torn + data).split(b"\n")
                    for told in map(json.loads, whole):
                        if "turns_to" not in told:
                            yield told
                            awaited = [item for item in awaited if item != told["id"]]
                        elif not late:
                            awaited, patience = told["turns_to"], PATIENCE[job["device"]] * len(told["turns_to"])
                            deadline = time.monotonic() + patience
                    if not awaited:
                        deadline = math.inf
            finally:
                end()
    if late:
        raise _StuckError(awaited, patience)
    if process.returncode == 2:  # it refused the job, in one sentence
        raise UserError(_last((folder / "log.txt").read_text(encoding="utf-8", errors="replace")))


def _environment() -> dict[str, str]:
    """Only our own package beside those of the environment."""
    return envs.environ(PYTHONPATH=str(Path(__file__).resolve().parents[2]))


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing"
