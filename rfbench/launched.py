"""Which of the processes of a launch this one is: torchrun and `accelerate launch` say so in the environment, which is read for it here alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rfbench.errors import UserError


@dataclass(frozen=True)
class Place:
    """A process among those that were launched together; one that nobody launched is alone."""

    rank: int = 0
    size: int = 1  # processes on all nodes
    local_rank: int = 0  # on its node
    local_size: int = 1
    launched: bool = False

    @property
    def first(self) -> bool:
        """Whether it is the one that speaks."""
        return self.rank == 0


def place() -> Place:
    """Where this process is.

    Raises:
        UserError: the environment says only a part of it, or what it says is no number.
    """
    if "RANK" not in os.environ:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but there is no RANK; unset it, or start this with torchrun")
        return Place()
    size = _number("WORLD_SIZE", 1)
    return Place(_number("RANK", 0), size, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", size), True)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} is '{text}', which is not a number; unset it, or start this with torchrun")
    return int(text)
