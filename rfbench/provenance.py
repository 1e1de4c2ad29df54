"""Who made a number: the code, packages and machine of a run, and the life of a run directory from first byte to `done`.

Every verb works inside `session`. It creates the directory or continues it, refuses other inputs in the same place, keeps
other processes out, and leaves `run.json` in a state from which the same command goes on: a process that is killed leaves
`running`, and its locks go with it. torch is described if somebody has imported it, never imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import fnmatch
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rfbench
from rfbench import mirror
from rfbench.errors import UserError
from rfbench.records import DONE, FAILED, RUNNING, Run, canonical, fingerprint, read_run, run_name, write_run
from rfbench.settings import HOME

PACKAGES = (
    *("torch", "numpy", "pandas", "omegaconf", "typer", "rich", "imageio", "av", "safetensors", "matplotlib", "jinja2"),
    *("flash-attn", "vbench", "transformers", "accelerate"),
)
LOCK = ".lock"  # held by whoever writes into the directory; gone when nobody does


def now() -> str:
    """The present in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.cache
def code() -> dict[str, Any]:
    """Version of rfbench, commit of its checkout and whether tracked files differ from it; None where there is no checkout.

    Generated tables under reports/ are not code and do not make a checkout dirty.
    """
    commit, dirty = None, None
    if (HOME / ".git").exists():
        commit = _git("rev-parse", "HEAD")
        status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!reports")
        dirty = None if status is None else bool(status)
    return {"version": rfbench.__version__, "commit": commit, "dirty": dirty}


def _git(*arguments: str) -> str | None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # a hook sets GIT_DIR of another repository
    try:
        done = subprocess.run(["git", "-C", str(HOME), *arguments], capture_output=True, text=True, env=environment, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def packages() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """What a result may depend on of this machine, without its name or paths; memory in GiB, torch's view if it is loaded."""
    described: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        described["threads"] = torch.get_num_threads()
        described["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        described["cuda"] = torch.version.cuda
    return described


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the next line knows less
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What `Run.recorded` says of the code and the machine."""
    return {"code": code(), "packages": packages(), "machine": machine()}


class RunHandle:
    """A run directory that this process may write into, while it may."""

    def __init__(self, directory: Path, run: Run, *, resumed: bool) -> None:
        self.directory = directory
        self.run = run
        self.resumed = resumed  # somebody worked here before with the same inputs
        self.result: dict[str, Any] = {}  # becomes `Run.result` when the session ends well
        self.complete = True  # a writer of a shard sets it to False while clips of other shards are missing
        self._begun = time.monotonic()

    @property
    def done(self) -> bool:
        """Nothing is left to do; the session will leave run.json as it is."""
        return self.run.status == DONE

    def reopen(self) -> None:
        """Work again on a run that is done, because an artefact of it is gone."""
        self._update(lambda run: dataclasses.replace(run, status=RUNNING, ended=None))

    def record(self, **facts: Any) -> None:
        """Add facts that are recorded and not hashed, such as the attention kernel that `auto` resolved to."""
        self._update(lambda run: dataclasses.replace(run, recorded=run.recorded | facts))

    def begin(self) -> None:
        """Say that somebody works here now; a code or machine other than the first session's is kept beside it."""
        here = environment()

        def change(run: Run) -> Run:
            others = run.recorded.get("continued_on", [])
            if here not in ({key: run.recorded.get(key) for key in here}, *others):
                run = dataclasses.replace(run, recorded=run.recorded | {"continued_on": [*others, here]})
            return dataclasses.replace(run, status=RUNNING, error=None, ended=None)

        self._update(change)

    def end(self, status: str, error: str | None = None) -> None:
        """Add this session's seconds and say how it ended; `running` if somebody has to go on."""

        def change(run: Run) -> Run:
            run = dataclasses.replace(run, seconds=round(run.seconds + time.monotonic() - self._begun, 3))
            if status == RUNNING:
                return run
            return dataclasses.replace(
                run, status=status, error=error, ended=now(), result=run.result | self.result if status == DONE else run.result
            )

        self._update(change)

    def _update(self, change: Callable[[Run], Run]) -> None:
        """Read, change and write run.json while no other writer does."""
        with _locked(self.directory / f"{LOCK}-run", wait=True):
            self.run = change(read_run(self.directory))
            write_run(self.directory, self.run)


@contextlib.contextmanager
def session(
    directory: Path, verb: str, name: str, inputs: Mapping[str, Any], *, fresh: bool = False, writer: str | None = None, begin: bool = True
) -> Iterator[RunHandle]:
    """Create or continue a run directory; in the block this process may write into it.

    `inputs` are what was asked for and make the fingerprint. `writer` names one of several processes that share the
    directory (a shard); each writer works in files of its own. A run that is done stays as it is unless the verb calls
    `reopen`. Without `begin` it is for the verb to call that, once it has found something to do and torch is there to be
    described. The end of the block marks the run done, an exception marks it failed with one line, and Ctrl-C leaves it
    `running`: in each case the same command goes on from what is there.

    Raises:
        UserError: the directory holds a run with other inputs, or things that are no run; somebody else writes there (code 1).
    """
    run_name(name)
    plain = json.loads(canonical(inputs))
    if fresh:
        if writer is not None:
            raise UserError("--fresh together with --shard would remove what other shards have made; remove the run first, then start the shards")
        _remove(directory)
        mirror.forget(directory)
    with _writing(directory, writer):
        handle = _open(directory, Run(verb, name, plain, fingerprint(plain), recorded={}, started=now()))
        if begin and not handle.done:
            handle.begin()
        try:
            yield handle
        except Exception as error:
            if not handle.done:
                with contextlib.suppress(UserError):  # a full disk may be what failed: then it stays `running`, which is as good
                    handle.end(FAILED, _one_line(error))
            raise
        except BaseException:
            if not handle.done:
                handle.end(RUNNING)
            raise
        if not handle.done:
            handle.end(DONE if handle.complete else RUNNING)


def _open(directory: Path, wanted: Run) -> RunHandle:
    """The run of the directory if it is the wanted one, created if there is none."""
    with _locked(directory / f"{LOCK}-run", wait=True):
        if not (directory / "run.json").exists():
            if not _blank(directory):
                raise UserError(f"{directory} holds files but no run.json, so it is not a run; choose another --name or remove it yourself")
            wanted = dataclasses.replace(wanted, recorded=environment())
            write_run(directory, wanted)
            return RunHandle(directory, wanted, resumed=False)
        run = read_run(directory)
    if run.verb != wanted.verb:
        raise UserError(f"{directory} holds a {run.verb} run, not a {wanted.verb} run; choose another --name")
    if run.fingerprint != wanted.fingerprint:
        raise UserError(
            f"{directory} holds a run with other inputs ({said(differences(run.inputs, wanted.inputs))}); "
            "add --fresh to replace it, or give this one a --name of its own"
        )
    return RunHandle(directory, run, resumed=True)


def _blank(directory: Path) -> bool:
    return all(path.name.startswith(".") for path in directory.iterdir())


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, as `dotted.path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        found = [differences(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}" if path else key) for key in keys]
        return [line for lines in found for line in lines]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = [differences(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True))]
        return [line for lines in found for line in lines]
    return [] if _spelled(old) == _spelled(new) else [f"{path}: {_short(old)} -> {_short(new)}"]


_ABSENT = object()


def _spelled(value: Any) -> str:
    """Text that two JSON values share exactly when they are the same (1 and 1.0 and true are not)."""
    return "absent" if value is _ABSENT else canonical(value)


def _short(value: Any, limit: int = 40) -> str:
    text = _spelled(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def said(found: list[str], limit: int = 5) -> str:
    """The first of them in one line."""
    return "; ".join(found[:limit]) + (f"; and {len(found) - limit} more" if len(found) > limit else "")


def _one_line(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")[:limit]


@contextlib.contextmanager
def _writing(directory: Path, writer: str | None) -> Iterator[None]:
    """Make the directory and hold it: alone, or as one of several named writers."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"could not make {directory}: {error.strerror}; free space or fix permissions, then run it again", code=1) from error
    with _locked(directory / LOCK, shared=writer is not None, last_out=lambda: _sweep(directory)), contextlib.ExitStack() as stack:
        if writer is not None:
            stack.enter_context(_locked(directory / f"{LOCK}-{writer}"))
        else:
            for path in directory.parent.glob(f".{directory.name}.old-*"):  # somebody was killed while removing it
                shutil.rmtree(path, ignore_errors=True)
        stack.enter_context(mirror.following(directory, writer))
        yield


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold a directory that is no run of its own, such as the scores of a run.

    Raises:
        UserError: another process writes there (code 1).
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / LOCK, last_out=lambda: _sweep(directory)), mirror.following(directory, None):
        yield


def _sweep(directory: Path) -> None:
    """Remove what writers that were killed had not finished."""
    for folder, folders, files in os.walk(directory):
        for name in fnmatch.filter(folders, ".*.tmp*"):
            shutil.rmtree(Path(folder, name))
        for name in fnmatch.filter(files, ".*.tmp*"):
            Path(folder, name).unlink(missing_ok=True)


def _remove(directory: Path) -> None:
    """Take a run away as a whole: under its name there is all of it or nothing, whenever this process dies."""
    if not directory.exists():
        return
    if not (directory / "run.json").exists() and not _blank(directory) and not any(directory.glob(mirror.REMEMBERED.format("*"))):
        raise UserError(f"{directory} holds files but no run.json, so --fresh does not remove it; remove it yourself")
    with _locked(directory / LOCK):
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old-", dir=directory.parent))
        directory.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)  # the next session of this directory tries again


@contextlib.contextmanager
def _locked(path: Path, *, shared: bool = False, wait: bool = False, last_out: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an advisory lock that the kernel releases when this process dies; its last holder calls `last_out` and removes the file.

    Raises:
        UserError: another process holds it and `wait` is False (code 1).
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip()
                raise UserError(
                    f"{path.parent} is being written by process {holder or 'of another session'}; wait for it, or end it and run this again", code=1
                ) from None
            if not _is(file.fileno(), path):
                continue  # its last holder removed it between our opening and locking it
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                with contextlib.suppress(BlockingIOError):  # others share it: the last of them removes it
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is(file.fileno(), path):
                        last_out()
                        path.unlink()
            return


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
