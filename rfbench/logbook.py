"""The log of a training run: figures of every step, as means in JSON Lines, and in a tracker where one is asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rfbench import records
from rfbench.errors import UserError
from rfbench.methods.redmd import effective_share

BINS = 10  # of timestep histograms, between 0 and 1000
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # of accelerate -> the package that it takes

Row = dict[str, float | list[float]]
Append = Callable[[int, Sequence[Row]], None]  # step, rows since the last time


@contextlib.contextmanager
def writing(directory: Path, name: str, step: int, *, tracker: str | None, about: Mapping[str, Any]) -> Iterator[Append]:
    """A function that logs the means of some rows; rows behind `step`, which are about to be made again, are dropped first.

    A tracker gets the same figures, and `about` as its configuration. Whatever it takes to reach it is its own affair and in none of our files.
    """
    log = directory / "log.jsonl"
    _keep_rows(log, step)
    with records.appending(log) as append, contextlib.ExitStack() as stack:
        track = stack.enter_context(_tracking(tracker, directory, name, step, about)) if tracker else None

        def write(step: int, rows: Sequence[Row]) -> None:
            found = means(rows)
            append({"step": step} | found)
            if track is not None:
                track(step, numbers(found))

        yield write


def check_tracker(name: str) -> None:
    """Refuse a tracker that is unknown or not installed.

    Raises:
        UserError: says what to do.
    """
    if name not in TRACKERS:
        raise UserError(f"there is no tracker '{name}'; choose from {', '.join(TRACKERS)}")
    if importlib.util.find_spec(TRACKERS[name]) is None:
        raise UserError(f"tracker '{name}' is not installed; `pip install {TRACKERS[name]}`, or leave --track out: log.jsonl is always written")


@contextlib.contextmanager
def _tracking(tracker: str, directory: Path, name: str, step: int, about: Mapping[str, Any]) -> Iterator[Callable[[int, dict[str, float]], None]]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[tracker]
    where = {"logging_dir": str(directory), "purge_step": step + 1} if tracker == "tensorboard" else {}
    found = kind(name.replace("/", "-"), **where)
    found.start()
    found.store_init_configuration(dict(about))
    try:
        yield lambda step, figures: found.log(figures, step=step)
    finally:
        found.finish()


def summary(stats: Mapping[str, Tensor]) -> Row:
    """Means of per-clip statistics, with spread and effective sample size where they decide something; of timesteps, a histogram."""
    row: Row = {}
    for key, value in stats.items():
        row[key] = (value.histc(BINS, 0, 1000) / len(value)).tolist() if key.endswith("timestep") else float(value.mean())
    if "weight" in stats:
        row["reward_std"] = float(stats["reward"].std(correction=0))
        row["weight_max"] = float(stats["weight"].max())
        row["weight_ess"] = effective_share(stats["weight"])
    return row


def means(rows: Sequence[Row]) -> Row:
    """Mean of every figure over the steps that have it: the generator's are there at its own steps alone."""
    found: Row = {}
    for key in sorted({key for row in rows for key in row}):
        there = [row[key] for row in rows if key in row]
        lists = [value if isinstance(value, list) else [value] for value in there]
        mean = [math.fsum(values) / len(values) for values in zip(*lists, strict=True)]
        found[key] = mean if isinstance(there[0], list) else mean[0]
    return found


def numbers(row: Row) -> dict[str, float]:
    """What of a row is one number, for a line of progress and for trackers."""
    return {key: value for key, value in row.items() if isinstance(value, float)}


def _keep_rows(log: Path, step: int) -> None:
    """Drop log rows of steps that are about to be taken again."""
    everything: list[dict[str, Any]] = records.read_rows(log, dict[str, Any])
    rows = [row for row in everything if row["step"] <= step]
    records.write_text(log, "".join(records.canonical(row) + "\n" for row in rows))
