"""Trackers: what TensorBoard reads back is what `log.jsonl` has, also of a run that was stopped; a tracker that can't be had is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from rfbench.settings import settings
from rfbench.train import train
from tests.test_cli import call
from tests.test_train import Interrupted, interrupt, tiny, write

__all__ = ["tiny"]  # a fixture


def events_of(directory: Path) -> dict[str, dict[int, float]]:
    """Figure -> step -> value, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory))
    found.Reload()
    shown = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert all(len(dict(rows)) == len(rows) for rows in shown.values())  # no step twice
    return {tag: dict(rows) for tag, rows in shown.items()}


def logged(directory: Path) -> dict[str, dict[int, Any]]:
    """The same of `log.jsonl`, but for histograms."""
    found: dict[str, dict[int, Any]] = {}
    for row in map(json.loads, (directory / "log.jsonl").read_text().splitlines()):
        step = row.pop("step")
        for key, value in row.items():
            if not isinstance(value, list):
                found.setdefault(key, {})[step] = pytest.approx(value, rel=1e-6)  # events are float32
    return found


def test_tensorboard_shows_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "redmd", steps=6, log_every=1, checkpoint_every=2)
    with monkeypatch.context() as patch:
        interrupt(patch, "redmd", 3)  # its third row is written anew
        with pytest.raises(Interrupted):
            train(path, tracker="tensorboard")
    directory = train(path, tracker="tensorboard")
    shown = events_of(directory / "redmd")
    assert shown == logged(directory) and {"loss", "reward", "weight_ess", "grad_norm_generator"} < set(shown)
    assert set(shown["critic_loss"]) == set(range(1, 7))


def test_a_tracker_that_cannot_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path, find = write(tmp_path, "flow"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    for name, sentence in (("tensorbord", "no tracker 'tensorbord'; choose from tensorboard, wandb, trackio"), ("wandb", "`pip install wandb`")):
        code, _, said = call(capsys, "train", path, "--track", name)
        assert code == 2 and sentence in " ".join(said.split()) and said.count("error:") == 1
    assert not (settings().runs / "train").exists()
