"""Our side of `rfbench.vbench_worker`, which runs in the environment `vbench`: a job file out, one JSON line per item back.

The worker may die of a clip. What it had answered is kept, and the rest is given to new workers in halves, until the clip is alone;
then that clip has a reason instead of a value, and every other its value. The fast driver also says which clip it turns to: if then
nothing comes for too long, that clip has its reason and the rest a new worker. vbench's own functions say nothing before they are
done with all clips of a dimension, and are waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rfbench import envs, records
from rfbench.errors import UserError

MODULE = "rfbench.vbench_worker"
BARREN = 16  # workers in a row that answered nothing: more halvings than any suite has clips for
PATIENCE = {"cuda": 900.0, "cpu": 7200.0}  # seconds for one dimension of one clip, its networks' loading included
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
            clip = next(item["path"] for item in group if item["id"] == stuck.item)
            for item in [item for item in left.values() if item["path"] == clip]:
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
    """A worker that was ended because nothing had come for too long since it turned to an item."""

    def __init__(self, item: str, seconds: float) -> None:
        super().__init__(f"VBench's worker was at it for {seconds:.0f} s and was ended")
        self.item = item


def _session(python: Path, items: Sequence[Item], job: Mapping[str, Any], folder: Path) -> Iterator[Line]:
    """The answers of one worker, whole lines only, up to its end.

    Raises:
        _StuckError: it was ended over an item.
    """
    patience, at, late = PATIENCE[job["device"]], "", threading.Event()
    records.write_json(folder / "job.json", {**job, "items": list(items)})
    with (folder / "log.txt").open("w") as log:
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log, "text": True, "start_new_session": True, "env": _environment()}
        with subprocess.Popen([str(python), "-m", MODULE, str(folder / "job.json")], **options) as process:
            assert process.stdout is not None

            def end() -> None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None

            def give_up() -> None:
                late.set()
                end()

            watch: threading.Timer | None = None
            try:
                for line in process.stdout:
                    if watch is not None:
                        watch.cancel()
                    told = json.loads(line) if line.endswith("\n") else {}
                    if "turns_to" in told:
                        at, watch = told["turns_to"], threading.Timer(patience, give_up)
                        watch.start()
                    elif told:
                        yield told
            finally:
                if watch is not None:
                    watch.cancel()
                end()
    if late.is_set():
        raise _StuckError(at, patience)
    if process.returncode == 2:  # it refused the job, in one sentence
        raise UserError(_last((folder / "log.txt").read_text(encoding="utf-8", errors="replace")))


def _environment() -> dict[str, str]:
    """Only our own package beside those of the environment."""
    return envs.environ(PYTHONPATH=str(Path(__file__).resolve().parents[2]))


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing"
