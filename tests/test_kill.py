"""SIGKILL at every step of a verb's work on disk and at random moments; the same command then ends with the same files.

The verbs run in forked children of this process, so a kill costs no new interpreter.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemReader

from rfbench import evaluate, generate, provenance, train
from tests import models
from tests.test_train import tiny, write

__all__ = ["tiny"]  # a fixture

CHANGING = ("started", "ended", "seconds", "recorded")  # of run.json and of a scorer's note


def child(work: Callable[[], Any], *, after: float | None = None) -> int:
    """Run `work` in a forked child and kill it `after` seconds; the signal that ended it, 0 for none."""
    process = os.fork()
    if process == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "the child failed, see its traceback"
    return 0


def dying(work: Callable[[], Any], at: int) -> Callable[[], Any]:
    """`work`, killed by its own hand right after the `at`-th rename, removal or flush to disk."""

    def run() -> None:
        count = 0

        def fatal(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def wrapper(*arguments: Any, **how: Any) -> Any:
                nonlocal count
                result = original(*arguments, **how)
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            setattr(owner, name, wrapper)

        fatal(Path, "replace")
        fatal(Path, "unlink")
        fatal(os, "fsync")
        work()

    return run


def files_of(folder: Path) -> dict[str, Any]:
    """Every file below, but for what only remembers times of files; JSON without what a second sitting changes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == ".seen.json":
            continue
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes()
        if path.suffix == ".json":
            found[name] = {key: value for key, value in json.loads(found[name]).items() if key not in CHANGING}
        if path.name == ".metadata":  # of a checkpoint: its bytes hold a number drawn by chance; what else it says is where the tensors lie
            metadata = FileSystemReader(path.parent).read_metadata()
            found[name] = metadata.state_dict_metadata, metadata.storage_data
    return found


def survive(folder: Path, work: Callable[[], Any]) -> None:
    """Compare an undisturbed run with ones that were killed, in `folder`, which `work` writes into."""
    work()  # in this process, so that its children find everything imported
    wanted = files_of(folder)
    assert not [name for name in wanted if "tmp" in name or "lock" in name]

    def restart() -> None:
        shutil.rmtree(folder)

    restart()
    begun = time.monotonic()
    assert child(work) == 0
    took = time.monotonic() - begun
    assert files_of(folder) == wanted
    for at in range(1, 1000):
        restart()
        if child(dying(work, at)) == 0:
            break
        assert child(work) == 0
        assert files_of(folder) == wanted, f"killed after event {at}"
    assert at > 5, "hardly any event was met: the test does not see the work"
    rng = random.Random(0)
    restart()
    for _ in range(6):  # each goes on where the one before was killed
        child(work, after=rng.random() * took)
    assert child(work) == 0
    assert files_of(folder) == wanted


@pytest.fixture
def home(folders: Path) -> Path:
    provenance.environment()  # asks git once, and not in every child
    return folders / "runs"


def test_generate_survives(home, tmp_path):
    baseline = models.write(tmp_path, sampler=models.STUDENT | {"steps": [1000]})
    survive(home, lambda: generate.generate(baseline, "smoke"))


def test_eval_survives(home, tmp_path):
    baseline = models.write(tmp_path, sampler=models.STUDENT | {"steps": [1000]})
    assert child(lambda: generate.generate(baseline, "smoke")) == 0
    run = home / "bench" / "student" / "smoke"

    def work() -> None:
        evaluate.evaluate(run, ["motion", "drift"])

    (run / "scores").mkdir()
    survive(run / "scores", work)


def test_train_survives(home, tmp_path):
    recipe = write(tmp_path, "ode", steps=3, checkpoint_every=1, log_every=1, ema={"decay": 0.5})
    survive(home, lambda: train.train(recipe))
