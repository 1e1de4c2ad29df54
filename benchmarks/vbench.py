"""VBench's two drivers on the same clip with the same drawn weights: time, and how far the scores are apart.

    RFBENCH_VBENCH_PYTHON=... python benchmarks/vbench.py [DIMENSION ...] [--height 240] [--width 416] [--frames 17]

Without RFBENCH_VBENCH_PYTHON it takes the environment that `rfbench env vbench --with detectron2` built. vbench's own functions get a
process for each dimension; the fast driver one for each group of dimensions that it is usually asked for at once. Imports and building
the networks are counted for neither. What several dimensions share is counted for the first of them; what each costs alone stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT = "A person is running"
ABOUT = {
    "object_class": {"object": "cat"},
    "multiple_objects": {"object": "cat and cat red cat"},
    "color": {"color": "red"},
    "spatial_relationship": {"spatial_relationship": {"object_a": "cat", "object_b": "cat red cat", "relationship": "on the left of"}},
    "scene": {"scene": {"scene": "alley"}},
    "appearance_style": {"appearance_style": "Van Gogh style"},
}
PROMPTS = {"color": "red"}  # a red nothing: the labels of drawn weights are often empty
GROUPS = [
    ["temporal_flickering"],
    ["subject_consistency", "motion_smoothness", "dynamic_degree"],
    ["background_consistency", "scene"],
    ["aesthetic_quality", "imaging_quality", "temporal_style", "overall_consistency"],
    ["object_class", "multiple_objects", "spatial_relationship"],
    ["color"],
    ["human_action"],
    ["appearance_style"],
]
SHARED = {"overall_consistency": "temporal_style", "multiple_objects": "object_class", "spatial_relationship": "object_class"}
WHY = {
    "temporal_flickering": "differences of frames; one decode, checked for its length",
    "subject_consistency": "DINO; several frames at once",
    "motion_smoothness": "AMT; several pairs at once",
    "dynamic_degree": "RAFT; no pair once the verdict is settled, no full-size flow but the last",
    "background_consistency": "CLIP B/32; several frames at once",
    "scene": "Tag2Text; only the frames that a caption is of, keys and values kept from word to word",
    "aesthetic_quality": "CLIP L/14",
    "imaging_quality": "MUSIQ; without the patches that it masks",
    "temporal_style": "ViCLIP; 2056 places of 8 frames",
    "overall_consistency": "the same cosine",
    "object_class": "GRiT; boxes once instead of twice, each read once and not for every word",
    "multiple_objects": "the same boxes",
    "spatial_relationship": "the same boxes",
    "color": "GRiT; boxes once instead of twice, each read once and not for every word",
    "human_action": "UMT; attention without its matrix",
    "appearance_style": "CLIP B/32; the style read once, several frames at once",
}


def clip(path: Path, height: int, width: int, frames: int) -> None:
    """A texture that drifts."""
    import cv2
    import numpy as np

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 16, (width, height))
    texture = cv2.resize(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8), (width + 3 * frames, height + 2 * frames))
    for frame in range(frames):
        writer.write(np.ascontiguousarray(texture[2 * frame : 2 * frame + height, 3 * frame : 3 * frame + width]))
    writer.release()


def measure(job_file: str) -> None:
    """In vbench's interpreter: the rows of a job, each with the wall and processor time up to it, less that of building networks."""
    from rfbench.vbench_worker import networks, torchvision_ops
    from rfbench.vbench_worker.__main__ import only_rows_on_stdout, read

    write = only_rows_on_stdout()
    torchvision_ops.declare()
    networks.supply_words()
    from rfbench.registry import pick
    from rfbench.vbench_worker.fast import Networks
    from rfbench.vbench_worker.random_weights import random_weights
    from rfbench.vbench_worker.work import DIMENSIONS, work

    job = read(Path(job_file))
    with random_weights(0):  # imports are counted for neither driver
        for item in job.items:
            networks.module(item.dimension)
            pick(DIMENSIONS, item.dimension, what="VBench dimension")
    begun = now()
    building = [0.0, 0.0]
    keep = Networks.keep

    def timed(self: Networks, key: str, make: Any) -> Any:
        def make_timed() -> Any:
            before, start = list(building), now()
            made = make()
            building[:] = [b + end - s for b, s, end in zip(before, start, now(), strict=True)]
            return made

        return keep(self, key, make_timed)

    Networks.keep = timed  # type: ignore[method-assign]
    if job.driver == "official":  # what vbench calls once its networks are built
        home = networks.module(job.items[0].dimension)
        first_call = "build_dict" if job.items[0].dimension == "human_action" else "load_dimension_info"
        call = getattr(home, first_call)

        def marked(*args: Any, **named: Any) -> Any:
            building[:] = [end - start for start, end in zip(begun, now(), strict=True)]
            return call(*args, **named)

        setattr(home, first_call, marked)
    told = [0.0, 0.0]
    for row in work(job):
        spent = [end - start - built for start, end, built in zip(begun, now(), building, strict=True)]
        cost = {"wall": spent[0] - told[0], "processor": spent[1] - told[1]}
        told = spent
        write({"dimension": row.dimension, "value": row.value, "reason": row.reason, **cost})


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def run(python: Path, folder: Path, driver: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Rows by dimension."""
    items = [
        {"id": name, "path": str(folder / "clip.mp4"), "dimension": name, "prompt": PROMPTS.get(name, PROMPT), "about": ABOUT.get(name, {})}
        for name in names
    ]
    (folder / "job.json").write_text(json.dumps({"driver": driver, "random": 0, "items": items}))
    variables = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "VBENCH_CACHE_DIR": str(folder)}
    command = [str(python), "-P", "-W", "ignore", __file__, "--measure", str(folder / "job.json")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return {row["dimension"]: row for row in map(json.loads, done.stdout.splitlines())}


def compare(python: Path, folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """What each dimension costs by either driver, one line printed for each."""
    lines: list[dict[str, Any]] = []
    for group in GROUPS:
        wanted = [name for name in group if name in names]
        if not wanted:
            continue
        fast = run(python, folder, "fast", wanted)
        for name in wanted:
            slow = run(python, folder, "official", [name])[name]
            failed = slow["reason"] or fast[name]["reason"]
            first = fast.get(SHARED.get(name, name), fast[name])
            same = None not in (slow["value"], fast[name]["value"])
            lines.append(
                {
                    "dimension": name,
                    "official": slow,
                    "fast": fast[name],
                    "alone": {clock: max(first[clock], fast[name][clock]) for clock in ("wall", "processor")},
                    "apart": abs(slow["value"] - fast[name]["value"]) if same else 0.0 if slow["value"] is fast[name]["value"] else float("inf"),
                }
            )
            if failed:
                sys.exit(f"{name}: {failed}")
            print(row(lines[-1]), flush=True)
    return lines


HEAD = """| dimension | official, s | fast, s | ratio | alone, s | ratio | score | apart | the network, and what the fast driver does differently |
|---|---:|---:|---:|---:|---:|---:|---:|---|"""


def row(line: dict[str, Any]) -> str:
    slow, fast, alone = (line[which]["processor"] for which in ("official", "fast", "alone"))
    value = line["official"].get("value")
    score = "" if value is None else f"{value:.4f}"
    apart = "" if "apart" not in line else f"{line['apart']:.0e}" if line["apart"] else "0"
    ratios = [f"{slow / one:.1f}" if one >= 0.005 else "" for one in (fast, alone)]
    cells = (line["dimension"], f"{slow:.2f}", f"{fast:.2f}", ratios[0], f"{alone:.2f}", ratios[1], score, apart, WHY.get(line["dimension"], ""))
    return f"| {' | '.join(cells)} |"


def total(lines: list[dict[str, Any]], clock: str) -> dict[str, Any]:
    sums = {which: {"processor": sum(line[which][clock] for line in lines)} for which in ("official", "fast", "alone")}
    return {"dimension": f"all {len(lines)}, {clock} time", **sums}


def main(arguments: argparse.Namespace) -> None:
    from rfbench.envs import python

    chosen = os.environ.get("RFBENCH_VBENCH_PYTHON")
    interpreter = Path(chosen) if chosen else python("vbench")
    known = [name for group in GROUPS for name in group]
    unknown = set(arguments.dimensions) - set(known)
    if unknown:
        sys.exit(f"{unknown.pop()} is no dimension of VBench")
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as name:
        clip(Path(name) / "clip.mp4", arguments.height, arguments.width, arguments.frames)
        lines = compare(interpreter, Path(name), arguments.dimensions or known)
    for clock in ("processor", "wall"):
        print(row(total(lines, clock)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("dimensions", nargs="*", metavar="DIMENSION")
        parser.add_argument("--height", type=int, default=240)
        parser.add_argument("--width", type=int, default=416)
        parser.add_argument("--frames", type=int, default=17)
        main(parser.parse_args())
