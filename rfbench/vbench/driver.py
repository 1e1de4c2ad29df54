"""Our side of `rfbench.vbench_worker`, which runs in the environment `vbench`: a job file out, one JSON line per item back.

The worker may die of a clip. What it had answered is kept, and the rest is given to new workers in halves, until the clip is alone;
then that clip has a reason instead of a value, and every other its value.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rfbench import envs, records
from rfbench.errors import UserError

MODULE = "rfbench.vbench_worker"
BARREN = 16  # workers in a row that answered nothing: more halvings than any suite has clips for
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
        for line in _session(python, group, job, folder):
            if left.pop(line["id"], None) is not None:
                yield line
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


def _session(python: Path, items: Sequence[Item], job: Mapping[str, Any], folder: Path) -> Iterator[Line]:
    """The lines of one worker, whole ones only, up to its end."""
    records.write_json(folder / "job.json", {**job, "items": list(items)})
    with (folder / "log.txt").open("w") as log:
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log, "text": True, "start_new_session": True, "env": _environment()}
        with subprocess.Popen([str(python), "-m", MODULE, str(folder / "job.json")], **options) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if line.endswith("\n"):
                        yield json.loads(line)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    if process.returncode == 2:  # it refused the job, in one sentence
        raise UserError(_last((folder / "log.txt").read_text(encoding="utf-8", errors="replace")))


def _environment() -> dict[str, str]:
    """Only our own package beside those of the environment."""
    return envs.environ(PYTHONPATH=str(Path(__file__).resolve().parents[2]))


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing"
