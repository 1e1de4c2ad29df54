"""Workers on a Ray cluster: batches in, results out, in whatever order they are done.

A worker loads once and then takes one batch after another, the next free worker the next batch. Workers only make things; the
process that asked keeps the books, alone. So a worker that dies costs the batch in its hands, which another one makes again,
and when the asking process dies the same command goes on from its books.

Workers and asker see the same file system. Ray starts a cluster on this machine unless RAY_ADDRESS names one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from rfbench.errors import UserError
from rfbench.progress import say
from rfbench.settings import settings_file

Item = TypeVar("Item")
Result = TypeVar("Result")

Engine = Literal["here", "ray"]  # who does the work: this process, or workers of a cluster
DEATHS = 3  # of workers over one batch, one after another: then it is the batch
STORE = 100 * 2**20  # bytes of Ray's shared memory: rows are small, videos go through the file system
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # a cluster of one machine: who takes its memory is for its kernel to judge
    "RAY_worker_niceness": "0",  # as urgent as whoever asked, where Ray would have them wait for everybody else
}


def spread(opener: Callable[[], Callable[[Item], Result]], batches: Sequence[Item], workers: int | None = None) -> Iterator[Result]:
    """What the function that `opener` opens in each worker makes of each batch.

    Without `workers` there is one for each GPU of the cluster, or where it has none for each processor core.

    Raises:
        UserError: Ray is not installed; what a worker raised; a batch over which workers died again and again (code 1).
    """
    with _cluster() as ray:
        gpus, cores = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        count = min(workers or gpus or cores, len(batches))
        each = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        kind = ray.remote(**each)(_Worker)
        due = deque(enumerate(batches))
        deaths = dict.fromkeys(range(len(batches)), 0)
        busy: dict[Any, tuple[Any, int]] = {}  # what is promised -> by whom, which batch
        threads = _threads()
        free = [kind.remote(opener, threads) for _ in range(count)]
        while due or busy:
            while free and due:
                number, batch = due.popleft()
                worker = free.pop()
                busy[worker.do.remote(batch)] = worker, number
            (done,), _ = ray.wait(list(busy), num_returns=1)
            worker, number = busy.pop(done)
            try:
                result: Result = ray.get(done)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                deaths[number] += 1
                which = f"batch {number + 1} of {len(batches)}"
                if deaths[number] == DEATHS:
                    why = str(error).strip().splitlines()[0]
                    raise UserError(f"{DEATHS} workers died over {which}, one after another: {why}", code=1) from None
                say(f"a worker died over {which}; another one takes it")
                due.appendleft((number, batches[number]))
                free.append(kind.remote(opener, threads))
                continue
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise
            free.append(worker)
            yield result


class _Worker:
    """The state of a worker: what it has loaded."""

    def __init__(self, opener: Callable[[], Callable[[Any], Any]], threads: int | None) -> None:
        if threads is not None:  # sums depend on how many threads add them up
            import torch

            torch.set_num_threads(threads)
        self.opener = opener
        self.work: Callable[[Any], Any] | None = None

    def do(self, batch: Any) -> Any:
        if self.work is None:  # here and not at its birth, so that what goes wrong is told as what it is
            self.work = self.opener()
        return self.work(batch)


@contextlib.contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, with the cluster that this process is in or RAY_ADDRESS names, or else one of this machine's own, which ends with the block."""
    os.environ.update({key: value for key, value in VARIABLES.items() if key not in os.environ})
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray, which is not installed; run `pip install 'rfbench[ray]'`") from None
    if ray.is_initialized():
        yield ray
        return
    own = "RAY_ADDRESS" not in os.environ
    file = settings_file()
    variables = {"RFBENCH_TOML": str(file)} if file is not None else {}
    ray.init(
        log_to_driver=False,
        include_dashboard=False if own else None,
        object_store_memory=STORE if own else None,
        runtime_env={"env_vars": variables},
        logging_level=logging.ERROR,
    )
    mine = threading.current_thread() is threading.main_thread()  # nobody else may say what a signal does
    if mine:  # SLURM's preemption is Ctrl-C; Ray would print where each of its threads is
        ours = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield ray
    finally:
        ray.shutdown()
        if mine:
            signal.signal(signal.SIGTERM, ours)


def _threads() -> int | None:
    """Threads that this process computes with, if it does."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()
