"""What more workers make of a table's work: the toy suite generated and scored by one process, by Ray's workers, and in two shards.

    python -m benchmarks.workers [SAMPLES [ROUNDS]]

Every process computes with one thread. Times are medians over the rounds, in which all take turns. "From start" is the whole command,
interpreters and clusters included, "at work" the clips per second between the first rows and the last ones; efficiency is the share of
perfect scaling over the lone process. Processor seconds are of a command and all processes below it, looked up every 0.1 s. The
shards are two plain processes; `rfbench eval` has none.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rfbench import records, suites

BASELINE, SCORER = "toy/ode-init", "motion"
PERIOD = 0.1  # seconds
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Way:
    """To make clips, by commands at the same time, and then to score them."""

    name: str
    workers: int
    clips: tuple[str, ...]  # options of `rfbench generate`, a string for each process
    scores: str = ""  # of `rfbench eval`


WAYS = (
    Way("one process", 1, ("",)),
    Way("Ray, 1 worker", 1, ("--engine ray --workers 1",), "--engine ray --workers 1"),
    Way("Ray, 2 workers", 2, ("--engine ray --workers 2",), "--engine ray --workers 2"),
    Way("shards 1/2 and 2/2", 2, ("--shard 1/2", "--shard 2/2")),
)


@dataclass(frozen=True)
class Took:
    """One command's time, or that of several at once."""

    wall: float
    processor: float
    pace: float  # rows per second


def took(commands: list[list[str]], folder: Path, run: Path, rows: str) -> Took:
    """Run commands at the same time to their ends, which write rows to files of a run."""
    variables = os.environ | {"RFBENCH_TOML": str(folder / "rfbench.toml"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    used: dict[tuple[int, str], int] = {}  # (process, when it began) -> ticks
    seen = [(begun := time.monotonic(), 0)]  # when there were how many rows
    with (folder / "log.txt").open("w") as log:
        running = [subprocess.Popen([sys.executable, "-m", "rfbench.cli", *command], env=variables, stdout=log, stderr=log) for command in commands]
        while any(process.poll() is None for process in running):
            look(used)
            there = sum(path.read_bytes().count(b"\n") for path in run.glob(rows))
            if there > seen[-1][1]:
                seen.append((time.monotonic(), there))
            time.sleep(PERIOD)
        wall = time.monotonic() - begun
    if any(process.returncode for process in running):
        sys.exit((folder / "log.txt").read_text())
    (first, few), (last, all_of_them) = seen[1], seen[-1]
    return Took(wall, sum(used.values()) / TICKS, (all_of_them - few) / (last - first) if last > first else math.nan)


def look(used: dict[tuple[int, str], int]) -> None:
    """Note what every process below this one has taken so far; those that were seen below it once belong to it."""
    parents, found = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        process = int(path.parent.name)
        parents[process] = int(fields[1])
        found[process] = (process, fields[19]), int(fields[11]) + int(fields[12])
    below = {key[0] for key in used} | {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in below} - below:
        below |= more
    used |= {key: ticks for process, (key, ticks) in found.items() if process in below and process != os.getpid()}


def go(way: Way, name: str, suite: Path, folder: Path) -> tuple[tuple[Took, Took], tuple[str, str]]:
    """Times of generating and scoring, and the rows that came out: of the clips and of the scores."""
    run = folder / "runs" / "bench" / name / suite.stem
    made = [["generate", BASELINE, "--suite", str(suite), "--name", name, *options.split()] for options in way.clips]
    judged = [["eval", str(run), "-s", SCORER, *way.scores.split()]]
    times = took(made, folder, run, "clips*.jsonl"), took(judged, folder, run, "scores/*.ledger.jsonl")
    rows = "".join(records.canonical(vars(clip)) + "\n" for clip in records.read_clips(run))
    return times, (rows, (run / "scores" / f"{SCORER}.jsonl").read_text())


def main() -> None:
    samples, rounds = (int(text) for text in (sys.argv[1:] + ["15", "1"][len(sys.argv) - 1 :]))
    found: dict[Way, list[tuple[tuple[Took, Took], tuple[str, str]]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rfbench.toml").touch()
        shutil.copy(suites.PROMPTS / "toy-short.jsonl", folder)
        suite = folder / "toy.yaml"
        suite.write_text(f"{{prompts: toy-short.jsonl, samples: {samples}}}")
        clips = len(suites.load_suite(str(suite)).items)
        for number in range(rounds):
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                found[way].append(go(way, f"{WAYS.index(way)}-{number}", suite, folder))
    print(f"{clips} clips, {rounds} rounds, {len(os.sched_getaffinity(0))} cores")
    for part, what in enumerate(("clips", "scores")):
        print(f"\n{what:20}{'from start':>12}{'efficiency':>12}{'at work':>12}{'efficiency':>12}{'processor':>12}   rows as of one process")
        lone: list[float] = []
        for way, each in found.items():
            if part and way.workers > 1 and not way.scores:
                continue
            wall, pace, processor = (median(getattr(times[part], key) for times, _ in each) for key in ("wall", "pace", "processor"))
            lone = lone or [wall, pace]
            same = all(rows[part] == found[WAYS[0]][0][1][part] for _, rows in each)
            shares = f"{wall:10.1f} s{lone[0] / wall / way.workers:12.0%}{pace:10.1f}/s{pace / lone[1] / way.workers:12.0%}{processor:10.1f} s"
            print(f"{way.name:20}{shares}   {'identical' if same else 'OTHERS'}")


if __name__ == "__main__":
    main()
