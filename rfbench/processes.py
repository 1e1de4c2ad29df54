"""Work in another interpreter: items in, rows out, whatever happens over there. `runners/worker.py` is the other side.

    <folder>/job.json     what the worker was last asked: runner, settings, items
    <folder>/log.txt      everything that it and its libraries printed; rows have a pipe of their own, so nothing printed can tear them

An item that raises, crashes, runs out of memory or out of time is an outcome like another; the worker is started again for
the rest. The worker's whole process group ends with this process, however this one ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rfbench import envs, records
from rfbench.errors import UserError

WORKER = Path(__file__).parent / "runners" / "worker.py"
BARREN = 3  # workers in a row that got nothing done, while none has got anything done: then it is not the items
DEATHS = 16  # the same where something was done before: many items in a row may be too much, but not any number of them
LEAVE_S = 30.0  # for a worker to end after its last item


@dataclass(frozen=True)
class Program:
    """A runner file, and how it is run."""

    python: Path  # interpreter that has what the runner imports
    runner: Path  # has `load(settings)`, which returns `run(item)`, which returns a row
    settings: Mapping[str, Any]  # for `load`; JSON
    startup_s: float  # limit for `load`
    item_s: float  # limit for an item
    cwd: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of an item: its row, or why there is none."""

    id: str
    row: Any = None
    error: str | None = None  # one sentence
    seconds: float = 0.0
    log: str = ""  # of a failed item, the last lines that were printed meanwhile


def work(program: Program, items: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[Outcome]:
    """Have the items, each a JSON object with an `id` of its own, worked on in order; their outcomes, as they come.

    Closing the iterator ends the worker.

    Raises:
        UserError: the worker does not start, or several in a row got nothing done (code 1); what is left was not tried.
    """
    left = {str(item["id"]): item for item in items}
    if len(left) != len(items):
        raise ValueError("two items have the same id")
    barren, most = 0, BARREN
    while left:
        fruitful, last = False, "it ended without a word"
        for outcome in _session(program, list(left.values()), folder):
            del left[outcome.id]
            fruitful, last = fruitful or outcome.error is None, outcome.error or last
            yield outcome
        barren, most = (0, DEATHS) if fruitful else (barren + 1, most)
        if left and barren == most:
            raise UserError(
                f"{program.runner.name} failed {barren} times in a row ({last}), so that {len(left)} of {len(items)} were not tried; "
                f"its log is {folder / 'log.txt'}",
                code=1,
            )


def _session(program: Program, items: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[Outcome]:
    """The life of one worker: outcomes up to the last item, or to the one that it died of."""
    log = folder / "log.txt"
    with _Worker(program, items, folder) as worker:
        if "ready" not in (said := worker.listen(program.startup_s)):
            why = _why(said, program.startup_s, "to start")
            raise UserError(f"{program.runner.name} does not start: it {why} ({_last_line(log, worker.begun)}); its log is {log}", code=1)
        current: str | None = None
        since, printed = time.monotonic(), 0
        while True:
            said = worker.listen(program.item_s if current is not None else LEAVE_S)
            if "begin" in said:
                current, since, printed = said["begin"], time.monotonic(), said["log"]
            elif current is not None and said.get("done") == current:
                yield Outcome(current, said["row"], seconds=said["seconds"])
                current = None
            elif current is not None and said.get("failed") == current:
                yield Outcome(current, error=said["error"], seconds=time.monotonic() - since, log=_tail(log, printed, said["log"]))
                current = None
            else:
                if current is not None:
                    tail = _tail(log, printed)
                    memory = ", out of memory" if "out of memory" in tail.lower() else ""
                    why = _why(said, program.item_s, "for one item") + memory
                    yield Outcome(current, error=f"the worker {why}", seconds=time.monotonic() - since, log=tail)
                return


class _Worker:
    """A worker process, as long as the block lasts."""

    def __init__(self, program: Program, items: Sequence[Mapping[str, Any]], folder: Path) -> None:
        self.program, self.folder = program, folder
        self.job = {"runner": str(program.runner), "settings": dict(program.settings), "items": list(items)}
        self.lines: list[bytes] = [b""]  # the last one is not complete
        self.begun = 0  # bytes of the log that are not this worker's

    def __enter__(self) -> _Worker:
        records.write_json(self.folder / "job.json", self.job)
        self.rows, far = os.pipe()
        with (self.folder / "log.txt").open("ab") as log:
            self.begun = log.tell()
            command = [str(self.program.python), "-I", "-X", "faulthandler", str(WORKER), str(self.folder / "job.json"), str(far)]
            options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            try:  # its stdin is the lifeline: nothing is ever written to it, and it ends with this process
                self.process = subprocess.Popen(command, cwd=self.program.cwd, env=envs.environ(**self.program.variables), pass_fds=(far,), **options)
            except OSError as error:
                os.close(self.rows)
                raise UserError(f"{command[0]} does not start ({error.strerror}); build its environment again", code=1) from None
            finally:
                os.close(far)
        return self

    def listen(self, seconds: float) -> dict[str, Any]:
        """The next message; {"late": True} if none comes in time, {"end": None} if the worker is gone without one."""
        deadline = time.monotonic() + seconds
        while True:
            while len(self.lines) > 1:
                with contextlib.suppress(ValueError):  # a line that death tore
                    said = json.loads(self.lines.pop(0))
                    if isinstance(said, dict):
                        return said
            left = deadline - time.monotonic()
            if left <= 0:
                return {"late": True}
            if select.select([self.rows], [], [], min(left, 0.5))[0]:
                data = os.read(self.rows, 1 << 16)
                if not data:
                    return {"end": None}
                first, *others = data.split(b"\n")
                self.lines[-1] += first
                self.lines += others
            elif self.process.poll() is not None:
                return {"end": None}

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the group outlives its leader if a library left something behind
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        os.close(self.rows)


def _why(said: Mapping[str, Any], limit: float, what: str) -> str:
    """How a worker ended, as what it did."""
    if "late" in said:
        return f"took longer than the {limit:g} s that it has {what}"
    code = said.get("end")
    if code is None:
        return "was lost" if "end" in said else f"said what it must not say ({json.dumps(dict(said))[:100]})"
    if code > 128:
        name = signal.Signals(code - 128).name
        return f"was killed by {name}" + (", as happens when memory runs out" if name == "SIGKILL" else "")
    return f"ended with exit code {code}"


def _tail(log: Path, since: int, until: int | None = None, lines: int = 20) -> str:
    """The last lines of a part of the log."""
    with log.open("rb") as file:
        end = log.stat().st_size if until is None else until
        start = max(since, end - (1 << 14))
        file.seek(start)
        return "\n".join(file.read(end - start).decode(errors="replace").splitlines()[-lines:])


def _last_line(log: Path, since: int) -> str:
    return (_tail(log, since, lines=1) or "it printed nothing")[:300]
