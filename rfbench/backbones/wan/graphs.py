"""Passes that are recorded once and replayed: a CUDA graph starts a thousand kernels at the price of one.

A recording reads and writes fixed memory, so what a pass takes in is copied to where its recording looks for it, and what comes
out is copied away. No recording has been made on a GPU yet; tests remember the function instead.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Pass = Callable[[Sequence[Tensor]], Tensor | None]
Record = Callable[[Callable[[], Tensor | None]], Callable[[], Tensor | None]]  # takes down what is done without doing it; -> how to do it


@dataclass
class Recording:
    """What a pass reads, what was last copied there, and how to run it again."""

    inputs: list[Tensor]
    sources: list[Tensor | None]
    replay: Callable[[], Tensor | None]


class Graphs:
    """The recordings of one model; a pass is recorded when it comes for the second time, after which everything it needs is there."""

    def __init__(self, record: Record | None = None) -> None:
        self.record = record or Cuda()
        self.seen = set[Hashable]()
        self.recordings: dict[Hashable, Recording] = {}

    def run(self, key: Hashable, work: Pass, fresh: Sequence[Tensor], constant: Sequence[Tensor]) -> Tensor | None:
        """`work` on both lists of tensors in one. Passes of one key have inputs of the same shapes and touch the same other memory.

        Args:
            fresh: tensors that are others in every pass.
            constant: tensors that nobody writes to, so that those that were copied before need not be copied again.
        """
        given = [*fresh, *constant]
        if key not in self.seen:
            self.seen.add(key)
            return work(given)
        if key not in self.recordings:
            inputs = [tensor.clone() for tensor in given]
            self.recordings[key] = Recording(inputs, [None] * len(given), self.record(lambda: work(inputs)))
        found = self.recordings[key]
        for place, (kept, tensor) in enumerate(zip(found.inputs, given, strict=True)):
            if place < len(fresh) or found.sources[place] is not tensor:
                kept.copy_(tensor)
                found.sources[place] = None if place < len(fresh) else tensor
        result = found.replay()
        return None if result is None else result.clone()


class Cuda:
    """Records CUDA graphs, all in one pool of memory: they never run side by side."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, work: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = work()
        self.pool = graph.pool()

        def replay() -> Tensor | None:
            graph.replay()
            return result

        return replay
