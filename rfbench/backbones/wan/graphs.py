"""Passes that are recorded once and replayed: a CUDA graph starts a thousand kernels at the price of one.

A recording reads and writes fixed memory: the cache that it was made with, inputs to which what a pass takes in is copied, and what comes
out, which is copied away. It lives as long as that cache. Before it is used, it proves itself: its first replay has to leave the same bits
as the pass that was made just before without it, from the same inputs and the same cache.

No recording has been made on a GPU yet; tests remember the function instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rfbench.proof import leave_out, left_out

Pass = Callable[[Sequence[Tensor]], Tensor | None]
Work = Callable[[], Tensor | None]


class Memory(Protocol):
    """What passes keep from one to the next: `rfbench.cache.KVCache`."""

    def memory(self) -> list[Tensor]: ...


class Recorder(Protocol):
    def aside(self, work: Work) -> Tensor | None:
        """Do it, where recordings are made."""

    def record(self, work: Work) -> Work:
        """Take down what is done without doing it; -> how to do it."""


class Inputs:
    """Tensors at fixed places, and what was last copied there."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.places: list[Tensor] = [tensor.clone() for tensor in given]
        self.sources: list[Tensor | None] = [None] * len(given)

    def take(self, given: Sequence[Tensor], *, anew: bool = False) -> None:
        """Copy what is another tensor than before, or all of it."""
        for number, (place, tensor) in enumerate(zip(self.places, given, strict=True)):
            if anew or self.sources[number] is not tensor:
                place.copy_(tensor)
                self.sources[number] = None if anew else tensor


@dataclass(frozen=True)
class Recording:
    """What a pass reads, and how to run it again."""

    fresh: Inputs
    constant: Inputs
    replay: Work


@dataclass(frozen=True)
class Recordings:
    """Of passes with one cache. A key without a recording was seen once."""

    made: dict[Hashable, Recording | None]
    shared: dict[Hashable, Inputs]  # inputs that are too large for each recording to have its own, by their sizes


class Graphs:
    """The recordings of one model; a pass is recorded when it comes for the second time, after which everything it needs is there.

    With `asked` a recording that fails is an error; without, passes go on without any.
    """

    def __init__(self, recorder: Recorder | None = None, *, asked: bool | None = None) -> None:
        self.recorder, self.asked = recorder or Cuda(), asked
        self.of: weakref.WeakKeyDictionary[Memory, Recordings] = weakref.WeakKeyDictionary()

    def run(
        self, memory: Memory, key: Hashable, work: Pass, fresh: Sequence[Tensor], constant: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> Tensor | None:
        """`work` on all three lists of tensors in one. Passes of one key and memory have inputs of the same shapes and touch the same other memory.

        Args:
            fresh: tensors that are others in every pass.
            constant: tensors that nobody writes to, so that those that were copied before need not be copied again.
            shared: such tensors that passes of other keys read as well.

        Raises:
            UserError: recordings are asked for, and this one cannot be made or gives something else (code 1).
        """
        given = [*fresh, *constant, *shared]
        if "graphs" in left_out and not self.asked:
            self.of.clear()
            return work(given)
        known = self.of.setdefault(memory, Recordings({}, {}))
        if key not in known.made:
            known.made[key] = None
            return work(given)
        size = tuple((tensor.shape, tensor.dtype) for tensor in shared)
        text = known.shared.get(size) or known.shared.setdefault(size, Inputs(shared))
        text.take(shared)
        found = known.made[key]
        if found is None:
            return self._recorded(memory, known, key, work, (Inputs(fresh), Inputs(constant), text))
        found.fresh.take(fresh, anew=True)
        found.constant.take(constant)
        result = found.replay()
        return None if result is None else result.clone()

    def _recorded(self, memory: Memory, known: Recordings, key: Hashable, work: Pass, inputs: tuple[Inputs, Inputs, Inputs]) -> Tensor | None:
        """Make the pass, which also brings whatever it takes for the first time in that place, then its recording, and compare them."""
        fresh, constant, shared = inputs
        held, places = memory.memory(), [*fresh.places, *constant.places, *shared.places]
        try:
            before = [tensor.clone() for tensor in held]
        except torch.OutOfMemoryError:
            leave_out("graphs", "needs memory for a second cache while a recorded pass proves itself, and there is none", asked=self.asked)
            return work(places)
        wanted = self.recorder.aside(lambda: work(places))
        try:
            replay = self.recorder.record(lambda: work(places))
        except Exception as error:  # of a driver, whose errors have no common kind
            leave_out("graphs", f"fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}", asked=self.asked)
            return wanted
        exchange(held, before)
        found = replay()
        pairs = zip((*held, found), (*before, wanted), strict=True)
        if all(ours is theirs is None or (ours is not None and theirs is not None and equal(ours, theirs)) for ours, theirs in pairs):
            known.made[key] = Recording(fresh, constant, replay)
        else:
            exchange(held, before)
            leave_out("graphs", "gives other bits when a recorded pass is replayed", asked=self.asked)
        del before
        torch.cuda.empty_cache()  # of which the copies were a part: what is held in reserve is measured
        return wanted


def exchange(ours: Sequence[Tensor], theirs: list[Tensor]) -> None:
    """Each has what the other had."""
    for number, tensor in enumerate(ours):
        then = tensor.clone()
        tensor.copy_(theirs[number])
        theirs[number] = then


def equal(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors have the same bits, also where they are no numbers."""
    return torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


class Cuda:
    """Records CUDA graphs, all in one queue and one pool of memory: they never run side by side.

    Other threads may go on meanwhile (`thread_local`), as one that locks memory for a copy.
    """

    def __init__(self) -> None:
        self.queue = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def aside(self, work: Work) -> Tensor | None:
        """cuBLAS has a workspace for each queue, which has to be there before a recording, or it would be part of that."""
        current = torch.cuda.current_stream()
        self.queue.wait_stream(current)
        with torch.cuda.stream(self.queue):
            result = work()
        current.wait_stream(self.queue)
        return None if result is None else result.clone()  # in memory of the current queue

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        back = torch.cuda.stream(torch.cuda.current_stream())  # to which a recording that fails would not return
        with back, torch.cuda.graph(graph, pool=self.pool, stream=self.queue, capture_error_mode="thread_local"):
            result = work()

        def replay() -> Tensor | None:
            graph.replay()
            return result

        return replay
