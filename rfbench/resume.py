"""What a training run goes on from: checkpoints of all of its tensors, complete or not there at all.

A checkpoint is a folder in the format of torch.distributed.checkpoint, into which every process writes what it holds of the split networks;
as many or fewer processes read it as wrote it. Beside that lies `about.json`: plain facts, and the sizes of the other files.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import save as write

from rfbench import records
from rfbench.errors import UserError
from rfbench.parallel import Ranks

KEPT = 2  # checkpoints; the older one is there in case the newer one's disk goes bad
ABOUT = "about.json"


def save(folder: Path, step: int, tensors: Mapping[str, Any], facts: Mapping[str, Any], ranks: Ranks) -> None:
    """Write the checkpoint of a step, then remove those before the last two. All processes call it, with what they hold.

    Raises:
        UserError: the disk is full or not writable (code 1); checkpoints that were there are still there.
    """
    path, partial = folder / f"step_{step:06d}", folder / f".step_{step:06d}.tmp"
    if ranks.first:
        _remove(partial)
        partial.mkdir(parents=True)
    ranks.wait()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process, where there is
            write(dict(tensors), checkpoint_id=partial, no_dist=ranks.size == 1)
    except CheckpointException as error:
        problem = next(iter(error.failures.values()))[0]
        raise UserError(f"could not write {path}: {problem}; free space or fix permissions, then run it again", code=1) from None
    if ranks.first:
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir()) if not file.name.startswith(".")}
        records.write_json(partial / ABOUT, {"step": step, **facts, "files": sizes})
        partial.replace(path)
        for old in sorted(folder.glob("step_*"))[:-KEPT]:
            _remove(old)
    ranks.wait()


def _remove(path: Path) -> None:
    """Take a checkpoint away; under its name there is all of it or nothing, whenever this process dies."""
    if path.exists():
        aside = path.replace(path.with_name(f".{path.name.strip('.')}.tmp-old"))
        shutil.rmtree(aside)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint and its facts, if there is one.

    Raises:
        UserError: something of it is gone or cut off.
    """
    found = sorted(folder.glob("step_*"))
    if not found:
        return None
    facts = records.read_json(found[-1] / ABOUT)
    if not all((file := found[-1] / name).is_file() and file.stat().st_size == size for name, size in facts["files"].items()):
        raise _unreadable(found[-1], "a file is missing or cut off")
    return found[-1], facts


def left(folder: Path) -> str:
    """What there is to go on from, for whoever is told that training broke down: a checkpoint may hold what led to it."""
    steps = [int(path.name.removeprefix("step_")) for path in sorted(folder.glob("step_*"))]
    if not steps:
        return "there is no checkpoint yet; a lower learning rate may help"
    older = f"remove it to go on from step {steps[-2]}, or " if len(steps) > 1 else ""
    return f"the checkpoint of step {steps[-1]} is kept; if training from there breaks down again, {older}take a lower learning rate"


def load(path: Path, tensors: Mapping[str, Any], ranks: Ranks) -> None:
    """Fill tensors with what a checkpoint has under their names.

    Raises:
        UserError: it can't be read, or is of other tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(dict(tensors), checkpoint_id=path, no_dist=ranks.size == 1)
    except (CheckpointException, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise _unreadable(path, next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error) from None


def _unreadable(path: Path, problem: object) -> UserError:
    reason = " ".join(str(problem).split())[:120]
    return UserError(f"{path} is not a readable checkpoint ({reason}); remove it, and the one before it serves, or add --fresh to start over")
