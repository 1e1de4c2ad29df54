"""The worker: items in, rows out as they come, clip by clip."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from rfbench.registry import pick
from rfbench.vbench_worker import networks, official
from rfbench.vbench_worker.fast import Dimension, Networks, Result
from rfbench.vbench_worker.jobs import Item, Job, Row
from rfbench.vbench_worker.video import Footage, UnreadableError

DIMENSIONS = {
    "subject_consistency": "rfbench.vbench_worker.fast:SubjectConsistency",
    "background_consistency": "rfbench.vbench_worker.fast:BackgroundConsistency",
    "temporal_flickering": "rfbench.vbench_worker.fast:TemporalFlickering",
    "motion_smoothness": "rfbench.vbench_worker.flow:MotionSmoothness",
    "dynamic_degree": "rfbench.vbench_worker.flow:DynamicDegree",
    "aesthetic_quality": "rfbench.vbench_worker.fast:AestheticQuality",
    "imaging_quality": "rfbench.vbench_worker.fast:ImagingQuality",
    "object_class": "rfbench.vbench_worker.objects:ObjectClass",
    "multiple_objects": "rfbench.vbench_worker.objects:MultipleObjects",
    "human_action": "rfbench.vbench_worker.fast:HumanAction",
    "color": "rfbench.vbench_worker.objects:Color",
    "spatial_relationship": "rfbench.vbench_worker.objects:SpatialRelationship",
    "scene": "rfbench.vbench_worker.captions:Scene",
    "appearance_style": "rfbench.vbench_worker.fast:AppearanceStyle",
    "temporal_style": "rfbench.vbench_worker.fast:OverallConsistency",
    "overall_consistency": "rfbench.vbench_worker.fast:OverallConsistency",
    "static": "rfbench.vbench_worker.flow:Static",
}
READERS = {
    "temporal_flickering": "bgr",
    "motion_smoothness": "rgb",
    "dynamic_degree": "rgb",
    "static": "rgb",
    "scene": "decord_384",
}


def work(job: Job, turns_to: Callable[[Sequence[str]], None] = lambda items: None) -> Iterator[Row]:
    """One row per item, in the order in which they get done; a clip that fails costs its own rows only.

    `turns_to` is called with the ids of those that are answered next, before their clips are waited for: whoever listens knows what is to blame.
    """
    device = torch.device(job.device)
    weights = contextlib.nullcontext() if job.random is None else _random(job.random)
    with weights:
        versions = {name: networks.version(name, job.driver, job.random) for name in sorted({item.dimension for item in job.items})}
        if job.driver == "official":
            for name in versions:
                yield from _official(name, [item for item in job.items if item.dimension == name], device, versions[name], turns_to)
        else:
            yield from _fast(job.items, device, versions, turns_to)


def _random(seed: int) -> Any:
    from rfbench.vbench_worker.random_weights import random_weights

    return random_weights(seed)


def _official(name: str, items: Sequence[Item], device: torch.device, version: str, turns_to: Callable[[Sequence[str]], None]) -> Iterator[Row]:
    begun = time.perf_counter()
    for item, result in official.score(name, items, device, turns_to):
        yield _row(item, version, result, (time.perf_counter() - begun) / len(items))


def _fast(items: Iterable[Item], device: torch.device, versions: dict[str, str], turns_to: Callable[[Sequence[str]], None]) -> Iterator[Row]:
    """Clips that are wanted for the same dimensions one after another, so that a network is in memory only as long as it is needed."""
    clips = [list(group) for _, group in groupby(sorted(items, key=_clip), key=_clip)]
    clips.sort(key=lambda group: sorted({item.dimension for item in group}))
    nets = Networks(device)
    scorers: dict[str, Dimension] = {}
    current: list[str] = []
    with ThreadPoolExecutor(1) as reader:
        ahead: list[Future[Footage | str]] = []
        for number, group in enumerate(clips):
            names = sorted({item.dimension for item in group}, key=list(DIMENSIONS).index)
            if names != current:
                nets.forget()
                scorers, current = {}, names
            ahead += [reader.submit(_read, clips[k]) for k in range(number + len(ahead), min(number + 2, len(clips)))]
            footage: Footage | str | None = None
            for item in sorted(group, key=lambda item: names.index(item.dimension)):
                begun = time.perf_counter()
                turns_to([item.id])
                footage = ahead.pop(0).result() if footage is None else footage
                result: Result | str
                if isinstance(footage, str):
                    result = footage
                else:
                    if item.dimension not in scorers:
                        scorers[item.dimension] = pick(DIMENSIONS, item.dimension, what="VBench dimension")(nets)
                    result = _attempt(scorers[item.dimension], footage, item)
                yield _row(item, versions[item.dimension], result, time.perf_counter() - begun)


def _clip(item: Item) -> tuple[str, int, int, tuple[int, ...]]:
    return item.path, item.begin, -1 if item.end is None else item.end, tuple(item.at or ())


def _read(group: Sequence[Item]) -> Footage | str:
    """Decode a clip as its dimensions will want it, ahead of them; a reader that fails will say so to the dimensions that use it."""
    first = group[0]
    try:
        footage = Footage(Path(first.path), first.begin, first.end, first.frames, first.at)
    except UnreadableError as error:
        return str(error)
    for attribute in sorted({READERS.get(item.dimension, "decord") for item in group}):
        with contextlib.suppress(UnreadableError):
            getattr(footage, attribute)
    return footage


@torch.no_grad()
def _attempt(scorer: Any, footage: Footage, item: Item) -> Result | str:
    try:
        return scorer(footage, item.prompt, item.about)
    except UnreadableError as error:
        return str(error)
    except Exception as error:  # a network that cannot take this clip; the next clip is none the worse for it
        if isinstance(error, MemoryError) or "CUDA" in str(error):
            raise  # the next one might be: better a new process
        return f"{item.dimension} fails: {type(error).__name__}: {error}"


def _row(item: Item, version: str, result: Result | str, seconds: float) -> Row:
    if isinstance(result, str):
        return Row(item.id, item.dimension, version, None, reason=result, seconds=seconds)
    if result.value is not None and not math.isfinite(result.value):
        return Row(item.id, item.dimension, version, None, reason=f"{item.dimension} gives no number (NaN)", seconds=seconds)
    return Row(item.id, item.dimension, version, result.value, result.weight, None, seconds, _plain(result.extra))


def _plain(value: Any) -> Any:
    """A value as JSON has it: what is no number becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
