"""VBench's drivers on the same clips, dimension by dimension: processor time of one thread, and how far the scores are apart.

    python benchmarks/vbench.py [DIMENSION ...]      builds nothing: `rfbench env vbench` comes first

Weights are drawn from a seed, as none are needed to measure. Imports and building the networks are counted for neither driver. The
clip has 16 frames of 128 x 128, a texture that drifts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CLIPS, FRAMES, SIZE = 1, 16, 128
ABOUT = {
    "object_class": {"object": "person"},
    "multiple_objects": {"object": "dog and cat"},
    "color": {"color": "red"},
    "spatial_relationship": {"spatial_relationship": {"object_a": "dog", "object_b": "cat", "relationship": "on the left of"}},
    "scene": {"scene": {"scene": "alley"}},
    "appearance_style": {"appearance_style": "Van Gogh style"},
}


def clips(folder: Path) -> list[str]:
    import cv2
    import numpy as np

    paths = []
    for number in range(CLIPS):
        path = str(folder / f"{number}.mp4")
        writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), 16, (SIZE, SIZE))
        texture = cv2.resize(np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8), (2 * SIZE, 2 * SIZE))
        for frame in range(FRAMES):
            writer.write(np.ascontiguousarray(texture[2 * frame : 2 * frame + SIZE, 3 * frame : 3 * frame + SIZE]))
        writer.release()
        paths.append(path)
    return paths


def measure(job_file: str) -> None:
    """In vbench's interpreter: the rows of a job and the processor time of each, less that of building networks."""
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
    built = 0.0
    keep = Networks.keep

    def timed(self: Networks, key: str, make: Any) -> Any:
        return keep(self, key, lambda: _timed(make))

    def _timed(make: Any) -> Any:
        nonlocal built
        before, begun = built, time.process_time()
        made = make()
        built = before + time.process_time() - begun
        return made

    Networks.keep = timed  # type: ignore[method-assign]
    name = job.items[0].dimension
    begun = time.process_time()
    if job.driver == "official" and name != "static":  # what vbench calls once its networks are built
        home = networks.module(name)
        first_call = "build_dict" if name == "human_action" else "load_dimension_info"
        call = getattr(home, first_call)

        def marked(*args: Any, **named: Any) -> Any:
            nonlocal built
            built = time.process_time() - begun
            return call(*args, **named)

        setattr(home, first_call, marked)
    rows = list(work(job))
    seconds = time.process_time() - begun - built
    for row in rows:
        write({"id": row.id, "dimension": row.dimension, "value": row.value, "reason": row.reason, "seconds": seconds})


def run(python: Path, folder: Path, driver: str, names: list[str], paths: list[str]) -> list[dict[str, Any]]:
    items = [
        {"id": f"{name} {path}", "path": path, "dimension": name, "prompt": "A person is running", "about": ABOUT.get(name, {})}
        for path in paths
        for name in names
    ]
    (folder / "job.json").write_text(json.dumps({"driver": driver, "random": 0, "items": items}))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "VBENCH_CACHE_DIR": str(folder)}
    command = [str(python), "-P", "-W", "ignore", __file__, "--measure", str(folder / "job.json")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(names: list[str]) -> None:
    from rfbench.envs import python

    interpreter = Path(os.environ["RFBENCH_VBENCH_PYTHON"]) if "RFBENCH_VBENCH_PYTHON" in os.environ else python("vbench")
    heads = ("official s/clip", "fast s/clip", "factor", "difference")
    print(f"{'dimension':24s}" + "".join(f"{head:>16s}" for head in heads), flush=True)
    totals = [0.0, 0.0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = clips(folder)
        # temporal_style and overall_consistency of one clip are one number: the fast driver is asked for both at once
        pair = ["temporal_style", "overall_consistency"]
        wanted = [[name] for name in names if name not in pair] + ([pair] if set(pair) <= set(names) else [[n] for n in pair if n in names])
        for group in wanted:
            official = [row for name in group for row in run(interpreter, folder, "official", [name], paths)]
            fast = run(interpreter, folder, "fast", group, paths)
            slow_s = sum({row["dimension"]: row["seconds"] for row in official}.values()) / len(paths)
            fast_s = fast[0]["seconds"] / len(paths)
            values = {row["id"]: row["value"] for row in fast}
            failed = next((row["reason"] for row in (*official, *fast) if row["reason"]), None)
            apart = max((abs(row["value"] - values[row["id"]]) for row in official if row["value"] is not None and not failed), default=0.0)
            totals = [totals[0] + slow_s, totals[1] + fast_s]
            shown = f"   {failed}" if failed else f"{apart:16.1e}"
            print(f"{'+'.join(group)[:24]:24s}{slow_s:16.2f}{fast_s:16.2f}{slow_s / max(fast_s, 1e-9):16.1f}{shown}", flush=True)
    print(f"{'all':24s}{totals[0]:16.2f}{totals[1]:16.2f}{totals[0] / totals[1]:16.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2])
    else:
        from rfbench.vbench_worker.networks import NEEDS

        main(sys.argv[1:] or [name for name in NEEDS if name != "static"])
