"""What the worker is asked and what it answers. Standard library only.

A job is a JSON file: {"driver": "fast", "device": "cpu", "random": null, "items": [...]}; the answer to each item is one JSON line.
Before it begins with items, it also writes {"turns_to": [THEIR IDS]}: one with the fast driver, all of a dimension with the official one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DRIVERS = ("fast", "official")


@dataclass(frozen=True)
class Item:
    """One number that is wanted: a dimension of a clip, of its frames [begin, end), or of some."""

    id: str  # returned as it is
    path: str
    dimension: str  # "static" is the filter in front of temporal_flickering
    prompt: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)  # auxiliary_info[dimension] of VBench_full_info.json
    begin: int = 0
    end: int | None = None
    frames: int | None = None  # of the file, if known: another length is refused
    at: Sequence[int] | None = None  # these frames of the file alone; not together with `begin` and `end`


@dataclass(frozen=True)
class Job:
    items: tuple[Item, ...]
    driver: str = "fast"
    device: str = "cpu"
    random: int | None = None  # a seed: weights are drawn and not loaded, and every row says so


@dataclass(frozen=True)
class Row:
    """The answer to an item. A dimension's score is the mean of its rows' values weighted with `weight`.

    `value` is a fraction or a cosine, None with weight 0 for a clip that VBench leaves out of the mean (a colour that no frame
    names), and None with a `reason` for a clip that cannot be scored.
    """

    id: str
    dimension: str
    version: str
    value: float | None
    weight: float = 0
    reason: str | None = None
    seconds: float = 0.0  # of this dimension on this clip; what dimensions share is counted for the first of them
    extra: Mapping[str, Any] = field(default_factory=dict)
