"""What the length of a video costs: whether a chunk late in a stream takes more time or memory than an early one.

A stream that is cut short by a slow machine and one that slows down by itself look alike in a single number. So chunk by
chunk the median over all streams is taken, then that over each of up to BLOCKS blocks of neighbouring chunks, so that neither a
disturbance nor chunks that resemble their neighbours count as evidence; through those goes a line, with the interval of its slope.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from rfbench.statistics import LEVEL, student
from rfbench.timing import Turn, steady

BLOCKS = 24
FEWEST = 4  # blocks for an interval
MORE = 100  # chunks: what a slope is told for


@dataclass(frozen=True)
class Trend:
    """A line through what the chunks of a stream take, in seconds or bytes; without `low` and `high`, `why` says what they lack."""

    chunks: int
    level: float  # of the line in the middle of the stream
    more: float  # what it rises over MORE chunks
    low: float | None
    high: float | None
    why: str = ""


def trend(values: Sequence[float]) -> Trend:
    """The least-squares line through the medians of blocks, and Student's 95 % interval of its rise.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"there is no line through {len(values)} chunks")
    size = math.ceil(len(values) / BLOCKS)
    count = len(values) // size
    skipped = len(values) - count * size  # the earliest
    heights = [median(values[place : place + size]) for place in range(skipped, len(values), size)]
    middle, level = (count - 1) / 2, fmean(heights)
    spread = sum((place - middle) ** 2 for place in range(count))
    slope = sum((place - middle) * height for place, height in enumerate(heights)) / spread
    scale = MORE / size
    more = slope * scale
    if count < FEWEST:
        return Trend(len(values), level, more, None, None, f"{len(values)} chunks, the least is {FEWEST}")
    off = sum((height - level - slope * (place - middle)) ** 2 for place, height in enumerate(heights))
    half = student(count - 2, LEVEL) * math.sqrt(off / (count - 2) / spread) * scale
    return Trend(len(values), level, more, more - half, more + half)


def trends(turns: Iterable[Turn]) -> dict[str, Trend]:
    """By `seconds` from chunk to chunk, and by `bytes` held when a chunk can be read, of a contender's streams; neither without a steady one."""
    seconds: dict[int, list[float]] = {}
    held: dict[int, list[float]] = {}
    for turn in turns:
        for before, chunk in itertools.pairwise(steady(turn.stream, turn.steady)):
            seconds.setdefault(chunk.index, []).append(chunk.readable - before.readable)
            if chunk.held_bytes is not None:
                held.setdefault(chunk.index, []).append(float(chunk.held_bytes))
    columns = {"seconds": seconds, "bytes": held}
    return {name: trend([median(found) for _, found in sorted(column.items())]) for name, column in columns.items() if len(column) > 1}
