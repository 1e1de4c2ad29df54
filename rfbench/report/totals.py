"""VBench's totals with an interval, though they are no mean over clips: a table of prompts whose mean is the total.

A total is linear in the dimensions, each of which is the mean over the clips of its own prompts. So what one prompt adds to the
error of a total is, summed over the dimensions that it is asked for, slope * (sum of its values - mean * number of its clips) /
number of all clips. With the total itself as centre these are a Sample like that of any metric: resampling its prompts is to
resample each dimension's prompts, dimensions of the same prompts together, and two contenders are compared prompt by prompt.
The centre is the total as the scorer tells it, by VBench's rule of which clips count.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from rfbench import statistics
from rfbench.report.evidence import Bench, Scores
from rfbench.statistics import Sample
from rfbench.vbench import totals


def known(metric: str) -> bool:
    """Whether a metric is a total of VBench's dimensions."""
    return metric.startswith("vbench") and metric.partition(".")[2] in totals.slopes()


def sample(runs: Sequence[tuple[Hashable, Bench, Scores]], metric: str) -> Sample | None:
    """The table of a total from runs and their training seeds; None where it is not one of VBench's, or a dimension has no values."""
    scorer, _, name = metric.partition(".")
    slopes = totals.slopes()[name] if known(metric) else None
    prompts = list(dict.fromkeys(clip.prompt_id for _, bench, _ in runs[:1] for clip in bench.clips))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    values: list[float] = []
    for _, bench, scores in runs:
        if slopes is None or not all(scores.values.get(f"{scorer}.{dimension}") for dimension in slopes):
            return None
        influence = np.zeros(len(prompts))
        for dimension, slope in slopes.items():
            column = scores.values[f"{scorer}.{dimension}"]
            there, found = [number[bench.prompts[clip]] for clip in column], np.fromiter(column.values(), np.float64)
            influence += slope * np.bincount(there, found - found.mean(), len(prompts)) / len(found)
        values += (scores.whole[metric] + len(prompts) * influence).tolist()
    return statistics.sample(values, prompts * len(runs), [seed for seed, *_ in runs for _ in prompts])
