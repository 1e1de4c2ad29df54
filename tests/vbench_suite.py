"""A small VBench for tests: one prompt per list, in the published format, under the name of the published file."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rfbench import suites
from rfbench.records import Clip, sha256_of
from rfbench.vbench import prompts

ENTRIES: list[dict[str, Any]] = [
    {"prompt_en": "a bird", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "alley", "dimension": ["scene", "background_consistency"], "auxiliary_info": {"scene": {"scene": {"scene": "alley"}}}},
    {
        "prompt_en": "A beach, oil painting",
        "dimension": ["appearance_style"],
        "auxiliary_info": {"appearance_style": {"appearance_style": "oil painting"}},
    },
    {"prompt_en": "A beach, oil painting", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
    {"prompt_en": "a beach, oil painting", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
    {"prompt_en": "Petra's façades.", "dimension": ["temporal_style"]},
    {"prompt_en": "A person is clapping", "dimension": ["human_action"]},
    {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a car", "dimension": ["object_class"], "auxiliary_info": {"object_class": {"object": "car"}}},
    {"prompt_en": "a car and a cat", "dimension": ["multiple_objects"], "auxiliary_info": {"multiple_objects": {"object": "car and cat"}}},
    {
        "prompt_en": "a car on the left of a cat",
        "dimension": ["spatial_relationship"],
        "auxiliary_info": {
            "spatial_relationship": {"spatial_relationship": {"object_a": "car", "object_b": "cat", "relationship": "on the left of"}}
        },
    },
]
LONGER = [f"{entry['prompt_en']}, at length" for entry in ENTRIES]


def publish(monkeypatch) -> None:
    """Put the small lists where the published ones belong, and let their hashes be the published ones."""
    monkeypatch.setattr(prompts, "FULL_INFO", _saved(prompts.FULL_INFO, json.dumps(ENTRIES)))
    monkeypatch.setitem(prompts.EXTENDED, "self-forcing", _saved(prompts.EXTENDED["self-forcing"], "\n".join(LONGER) + "\n"))
    for name, header in suites.SUITES.items():
        if header.prompts == suites.VBENCH:
            monkeypatch.setitem(suites.SUITES, name, dataclasses.replace(header, first=len(ENTRIES)))


def _saved(listed: prompts.Listed, text: str) -> prompts.Listed:
    listed.path.parent.mkdir(parents=True, exist_ok=True)
    listed.path.write_text(text, encoding="utf-8")
    return dataclasses.replace(listed, sha256=sha256_of(listed.path))


def clip(prompt_id: int, sample: int, text: str, *, given: str | None = None, sha256: str | None = None, frames: int = 81) -> Clip:
    """A row of a clip whose file nobody looks at."""
    name = f"{prompt_id:04d}-{sample}"
    return Clip(name, prompt_id, sample, text, given or text, 1, frames, 16, 480, 832, f"videos/{name}.mp4", sha256 or f"{name}{'0' * 58}")
