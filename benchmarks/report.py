"""What the report of a large table costs: 50 systems on VBench's 946 prompts, 5 clips of each, 16 dimensions.

    python -m benchmarks.report [SYSTEMS] [--dense]

Each prompt is for the dimensions that VBench asks of it; with `--dense` every clip has all 16. The report is made three times, each
time by a process of its own: from run directories, whose videos are hashed, once more with records of them, and from the records.
Processor seconds are told apart: reading, statistics (cells and ranks), films (run directories alone have videos) and pages. Hashing
and films take both of two cores. Memory is the most there was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rfbench import records
from rfbench.records import Clip, Run, fingerprint
from rfbench.suites import clip_id, clip_seed

SUITE, SAMPLES, FRAMES, FPS, HEIGHT, WIDTH = "many", 5, 17, 16, 96, 128
GROUPS: dict[str, int] = {  # dimensions that VBench asks of the same prompts, and of how many
    "subject_consistency dynamic_degree motion_smoothness": 72,
    "temporal_flickering": 75,
    "aesthetic_quality imaging_quality overall_consistency": 93,
    "object_class": 79,
    "multiple_objects": 82,
    "human_action": 100,
    "color": 85,
    "spatial_relationship": 84,
    "background_consistency scene": 86,
    "appearance_style": 90,
    "temporal_style": 100,
}
DIMENSIONS = " ".join(GROUPS).split()


def asked_of(prompts: int, *, dense: bool) -> list[list[str]]:
    """The dimensions of each prompt."""
    found = [names.split() for names, count in GROUPS.items() for _ in range(count)]
    assert len(found) == prompts
    return [DIMENSIONS] * prompts if dense else found


def fill(runs: Path, systems: int, *, dense: bool) -> None:
    """Runs of so many systems, as `generate` and `eval` write them. Every clip of a system is one video under many names."""
    from rfbench.video import writing

    prompts = [{"id": i, "text": f"a prompt of about eighty characters, as long as those of VBench are at most, number {i}"} for i in range(946)]
    dimensions = asked_of(len(prompts), dense=dense)
    suite = {"prompts": prompts, "samples": SAMPLES, "frames": FRAMES, "fps": FPS, "seed": 0}
    hard = np.random.default_rng(0).normal(size=(len(prompts), len(DIMENSIONS)))
    metrics = {name: {"higher_is_better": True, "unit": "%", "text": f"What {name} says."} for name in DIMENSIONS}
    for system in range(systems):
        rng = np.random.default_rng([1, system])
        directory = runs / "bench" / "scale" / f"system-{system:02d}" / SUITE
        (directory / "videos").mkdir(parents=True)
        first = directory / "videos" / f"{clip_id(0, 0)}.mp4"
        with writing(first, fps=FPS, height=HEIGHT, width=WIDTH) as write:
            write(np.full((FRAMES, HEIGHT, WIDTH, 3), 4 * system, np.uint8))
        sha256, clips = records.sha256_of(first), []
        for prompt in prompts:
            number, text = int(str(prompt["id"])), str(prompt["text"])
            for sample in range(SAMPLES):
                name = clip_id(number, sample)
                with contextlib.suppress(FileExistsError):
                    os.link(first, directory / "videos" / f"{name}.mp4")
                seed = clip_seed(0, number, sample)
                clips.append(Clip(name, number, sample, text, text, seed, FRAMES, FPS, HEIGHT, WIDTH, f"videos/{name}.mp4", sha256))
        records.write_rows(directory / "clips.jsonl", clips)
        noise = rng.normal(size=(len(clips), len(DIMENSIONS)))
        better = rng.normal(size=len(DIMENSIONS))
        values = np.clip(70 + 3 * better + 8 * np.repeat(hard, SAMPLES, 0) + 4 * noise, 0, 100)
        lines = []
        for row, clip in enumerate(clips):
            for name in dimensions[clip.prompt_id]:
                value = float(values[row, DIMENSIONS.index(name)])
                lines.append(records.canonical({"clip": clip.id, "metric": name, "segment": None, "value": value}) + "\n")
        records.write_text(directory / "scores" / "vbench.jsonl", "".join(lines))
        note = {"scorer": "vbench", "version": "1", "metrics": metrics, "clips": len(clips), "clips_sha256": records.clips_sha256(clips)}
        note["rows_sha256"] = records.sha256_of(directory / "scores" / "vbench.jsonl")
        records.write_json(directory / "scores" / "vbench.json", note)
        baseline = {
            "title": f"System {system}",
            "backbone": "toy",
            "weights": {"file": "weights.safetensors"},
            "sampler": {"steps": [1000, 750, 500, 250], "shift": 5.0, "cache": {"policy": "full", "rope": "absolute"}},
            "license": {"code": "apache-2.0", "weights": "apache-2.0"},
        }
        inputs = {
            "baseline": baseline,
            "weights_sha256": fingerprint({"of": system}),
            "suite": {"name": SUITE, "sha256": fingerprint(suite), **suite},
        }
        code = {"version": "0", "commit": "c0ffee" * 6 + "c0ff", "dirty": False}
        run = Run("generate", f"scale/system-{system:02d}/{SUITE}", inputs, fingerprint(inputs), {"code": code, "baseline": baseline})
        records.write_run(directory, dataclasses.replace(run, status=records.DONE, started="2026-01-01T00:00:00Z", seconds=60.0))


def measure(folder: Path, kind: str) -> None:
    """The report of what lies there, and a line of what it took."""
    from rfbench import report
    from rfbench.report import evidence, film, leaderboard, sources

    os.chdir(folder)
    spent = {"reading": 0.0, "films": 0.0, "board": 0.0}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            begun = time.process_time()
            try:
                return call(*arguments, **named)
            finally:
                spent[name] += time.process_time() - begun

        return wrapped

    evidence.run_of = timed("reading", evidence.run_of)
    evidence.read_bench = timed("reading", evidence.read_bench)
    evidence.read_scores = timed("reading", evidence.read_scores)
    film.scenes = timed("films", film.scenes)
    leaderboard.read_runs = timed("board", leaderboard.read_runs)
    from_runs = sources.all_runs(folder / "runs")
    found = from_runs if kind != "records" else sorted((folder / "reports" / "records").rglob("*.json"))
    wall, begun = time.perf_counter(), time.process_time()
    report.report(found, study=None, out=folder / "reports" / kind, record=kind == "runs+record")
    wall, whole = time.perf_counter() - wall, time.process_time() - begun
    statistics, pages = spent["board"] - spent["reading"], whole - spent["board"] - spent["films"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"from {kind:11s} {wall:6.1f} s, of processor time {whole:5.1f} s: reading {spent['reading']:.1f}, statistics {statistics:.1f}, "
        f"films {spent['films']:.1f}, {'records and ' * (kind == 'runs+record')}pages {pages:.1f}; at most {memory:.0f} MB"
    )


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--measure"]:
        measure(Path(arguments[1]), arguments[2])
        return
    dense = "--dense" in arguments
    systems = int(next((text for text in arguments if text.isdigit()), "50"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun = time.perf_counter()
        fill(folder / "runs", systems, dense=dense)
        (folder / "rfbench.toml").write_text('[paths]\nruns = "runs"\nreports = "reports"\n')
        print(json.dumps({"systems": systems, "dense": dense, "filled_s": round(time.perf_counter() - begun, 1)}), flush=True)
        for kind in ("runs", "runs+record", "records"):
            subprocess.run([sys.executable, "-m", "benchmarks.report", "--measure", name, kind], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
