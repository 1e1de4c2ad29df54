"""`python -m rfbench.vbench_worker JOB.json`: one JSON line per item, and one when it turns to some.

`--check [DIMENSION ...]`: one per dimension, exit code 1 if one cannot run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from rfbench import records
from rfbench.errors import UserError
from rfbench.vbench_worker import networks, torchvision_ops
from rfbench.vbench_worker.jobs import DRIVERS, Item, Job


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rfbench.vbench_worker", description=__doc__)
    parser.add_argument("job", nargs="?", type=Path, help="a JSON file: items, driver, device, random")
    parser.add_argument("--check", nargs="*", metavar="DIMENSION", help="say what can run here, and what to do about the rest")
    parser.add_argument("--driver", choices=DRIVERS, default="fast", help="whose versions --check tells")
    parser.add_argument("--random", type=int, metavar="SEED", help="check for drawn weights")
    chosen = parser.parse_args(arguments)
    write = only_rows_on_stdout()
    torchvision_ops.declare()
    try:
        networks.supply_words()
        if chosen.check is not None:
            ready = networks.check(chosen.check or list(networks.NEEDS), chosen.driver, chosen.random)
            for answer in ready:
                write(dataclasses.asdict(answer))
            return 0 if all(answer.version for answer in ready) else 1
        if chosen.job is None:
            parser.error("name a job file, or --check")
        job = read(chosen.job)
        for answer in networks.check(sorted({item.dimension for item in job.items}), job.driver, job.random, versions=False):
            if answer.problem:
                raise UserError(f"VBench's {answer.dimension} cannot run here: {answer.problem}; {answer.fix}")
        from rfbench.vbench_worker.work import work

        for row in work(job, lambda ids: write({"turns_to": ids})):
            write(dataclasses.asdict(row))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


def read(path: Path) -> Job:
    """A job file.

    Raises:
        UserError: not a job, or one that asks for what there is not.
    """
    value = records.read_json(path)
    items = tuple(records.from_fields(Item, item, where=f"{path} item {number}") for number, item in enumerate(value.get("items", [])))
    job = records.from_fields(Job, value | {"items": items}, where=str(path))
    unknown = sorted({item.dimension for item in items} - set(networks.NEEDS))
    if unknown or job.driver not in DRIVERS:
        raise UserError(f"{path} asks for {f'the dimension {unknown[0]}' if unknown else f'the driver {job.driver}'}, which there is not")
    return job


def only_rows_on_stdout() -> Any:
    """A function that writes a row to stdout; whatever else is printed goes to stderr, as vbench prints much."""
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(row: Any) -> None:
        rows.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        rows.flush()

    return write


if __name__ == "__main__":
    sys.exit(main())
