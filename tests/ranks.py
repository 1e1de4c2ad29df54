"""Several processes that train together, for tests: forked, so that they cost no new interpreter, and joined by gloo."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfbench.errors import UserError


@dataclass(frozen=True)
class End:
    """How a process ended: 0, the code of a UserError or SystemExit, minus a signal; and what it said on stderr."""

    code: int
    said: str


def launched(
    size: int, work: Callable[[], Any], folder: Path, *, local: int | None = None, kill: tuple[Sequence[int], float] | None = None
) -> list[End]:
    """Run `work` in `size` processes with the environment that torchrun gives them, `local` on each node; `kill` (ranks, seconds) ends some."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(local or size)}
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"stderr.{rank}" for rank in range(size)]
    children = [_child(work, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank % (local or size))}, files[rank]) for rank in range(size)]
    if kill is not None:
        time.sleep(kill[1])
        for rank in kill[0]:
            os.kill(children[rank], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [End(code, file.read_text()) for code, file in zip(codes, files, strict=True)]


def _child(work: Callable[[], Any], environment: dict[str, str], stderr: Path) -> int:
    process = os.fork()
    if process:
        return process
    os.environ.update(environment)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w")  # not the one that pytest has put in its place
    code = 0
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.code
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stderr.flush()
    os._exit(code)
