"""What a training step is doing at the moment: marks in the code that a profile listens to; without a listener they do nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

PHASES = {
    "forward": "the pass of a method that learns from given clips",
    "rollout": "the student makes clips, or denoises given ones",
    "decode": "latents of clips become pixels for the reward",
    "reward": "the reward looks at them",
    "scores": "teacher and critic judge noised clips; the student's loss",
    "critic": "the critic's loss",
    "backward": "gradients; recomputed activations, and the reduction of gradients between processes, which goes on meanwhile",
    "communication": "weights and figures are brought together before and after the passes",
    "optimiser": "clipping, steps, rounding, average",
}
_LISTENER: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


def phase(name: str) -> None:
    """What follows, up to the next mark, is one of PHASES."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(name)


@contextlib.contextmanager
def heard(listener: Callable[[str], None]) -> Iterator[None]:
    """Tell somebody of every mark."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
