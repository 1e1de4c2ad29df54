"""The official driver: vbench's own functions as they are, on the clips that can be read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rfbench.vbench_worker import networks
from rfbench.vbench_worker.fast import Result
from rfbench.vbench_worker.jobs import Item
from rfbench.vbench_worker.video import Footage, UnreadableError

FRAME_WEIGHTED = {"subject_consistency": -1, "background_consistency": -1, "appearance_style": 0}  # frames of a clip that count, less its length


def score(
    dimension: str, items: Sequence[Item], device: torch.device, turns_to: Callable[[Sequence[str]], None] = lambda items: None
) -> Iterator[tuple[Item, Result | str]]:
    """Every item's result, or why there is none; `turns_to` as in `work`.

    vbench stops at the first clip that it cannot score: then the clips are given to it one by one, and only that one is lost.
    """
    readable, frames = [], {}
    for item in items:
        turns_to([item.id])
        try:
            if item.begin or item.end is not None or item.at is not None:
                raise UnreadableError("vbench's own functions score whole files, not segments; use the fast driver")
            frames[item.id] = len(Footage(Path(item.path), frames=item.frames).bgr)
            readable.append(item)
        except UnreadableError as error:
            yield item, str(error)
    groups = [readable] if readable else []
    while groups:
        group = groups.pop(0)
        turns_to([item.id for item in group])
        try:
            found = _compute(dimension, group, device)
        except Exception as error:
            if len(group) == 1:
                yield group[0], f"vbench's {dimension} fails: {type(error).__name__}: {error}"
            else:
                groups += [[item] for item in group]
            continue
        for item, value in zip(group, found, strict=True):
            weight = _weight(dimension, frames[item.id])
            yield item, Result(value, 0 if value is None else weight)


def _weight(dimension: str, frames: int) -> int:
    if dimension in FRAME_WEIGHTED:
        return frames + FRAME_WEIGHTED[dimension]
    return 16 if dimension in ("object_class", "multiple_objects", "spatial_relationship", "scene") else 1


@torch.no_grad()  # changes no number; without it the captions of one clip take 17 GB
def _compute(dimension: str, items: Sequence[Item], device: torch.device) -> list[float | None]:
    """vbench's value of each clip; None for a clip that it leaves out of the mean."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [_staged(Path(folder), number, item, dimension) for number, item in enumerate(items)]
        if dimension == "static":
            return _static(paths, device)
        rows = [
            {"prompt_en": item.prompt, "dimension": [dimension], "video_list": [path], "auxiliary_info": {dimension: dict(item.about)}}
            for item, path in zip(items, paths, strict=True)
        ]
        info = Path(folder) / "full_info.json"
        info.write_text(json.dumps(rows), encoding="utf-8")
        compute = getattr(networks.module(dimension), f"compute_{dimension}")
        try:
            _, found = compute(str(info), device, networks.submodules(dimension))
        except ZeroDivisionError:
            if dimension != "color":
                raise
            found = []  # the mean over no clip at all
    values = {row["video_path"]: float(row["video_results"]) for row in found}
    if dimension == "imaging_quality":
        values = {path: value / 100.0 for path, value in values.items()}
    if dimension != "color" and len(values) < len(paths):
        raise ValueError("it left a clip out without a word")
    return [values.get(path) for path in paths]


def _staged(folder: Path, number: int, item: Item, dimension: str) -> str:
    """A link to the clip under the name that vbench expects; only human_action reads anything from it."""
    name = f"{item.prompt}-0.mp4" if dimension == "human_action" else "clip.mp4"
    path = folder / str(number) / name
    if path.parent != folder / str(number):
        raise ValueError(f"the prompt {item.prompt!r} cannot be a file name")
    path.parent.mkdir()
    os.symlink(Path(item.path).resolve(), path)
    return str(path)


def _static(paths: Sequence[str], device: torch.device) -> list[float | None]:
    from easydict import EasyDict

    home: Any = networks.module("static")
    home.DEVICE = device
    args = EasyDict(model=networks.submodules("dynamic_degree")["model"], small=False, mixed_precision=False, alternate_corr=False)
    judge = home.StaticFilter(args, device=device)
    return [float(judge.infer(path)) for path in paths]
