"""Everything that wants a GPU, in one call of a few minutes: `python -m benchmarks.gpu`, or `--small` on any machine to see that this script works.

It checks every kernel against float32, attention by everything that is there, copies, and recorded passes against plain ones, and climbs
the ladder of a Wan2.1 student with random weights, whose rungs carry the exactness gate: chunk 0, chunk 3, and the last chunk of a long
clip whose others are given. Then it writes one record, JSON with whatever was found, also when something failed. It has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rfbench import hardware, ladder, provenance

BASELINE = "wan/reward-forcing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a small network of the same architecture, on whatever device there is")
    parser.add_argument("--out", type=Path, default=Path("reports/records/hardware"), help="folder of the record")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if not arguments.small and not torch.cuda.is_available():
        sys.exit("there is no CUDA device; --small runs on the CPU, to see that this script works")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"small": arguments.small, "machine": provenance.machine(), "software": hardware.software(device), "parts": {}}
    found["state before"] = hardware.state(device)
    failed = [name for name, part in PARTS.items() if not tried(found["parts"], name, functools.partial(part, arguments))]
    found["state after"] = hardware.state(device)
    path = arguments.out / f"{hardware.name(device)}{'-small' if arguments.small else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(path)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def tried(parts: dict[str, Any], name: str, part: Callable[[], Any]) -> bool:
    """Do one part and note what came of it and how long it took; what goes wrong in one is no reason to leave out the next."""
    begun = time.perf_counter()
    try:
        parts[name] = {"result": part(), "ok": True}
    except Exception as error:
        parts[name] = {"error": f"{type(error).__name__}: {error}", "ok": False}
    parts[name]["seconds"] = round(time.perf_counter() - begun, 1)
    print(f"{name}: {'ok' if parts[name]['ok'] else parts[name]['error']} ({parts[name]['seconds']} s)", file=sys.stderr, flush=True)
    return bool(parts[name]["ok"])


def kernels(arguments: argparse.Namespace) -> str:
    """The tests of kernels, attention, copies and recorded passes, on this device and not in Triton's interpreter where it is a GPU."""
    asked = ["tests/test_kernels.py", "tests/test_attention.py", "tests/test_transfer.py"] + ([] if arguments.small else ["tests/test_lean.py"])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *asked], capture_output=True, text=True, timeout=180, cwd=Path(__file__).resolve().parent.parent
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError("\n".join(lines[-20:]))
    return lines[-1]


def climbed(arguments: argparse.Namespace) -> dict[str, Any]:
    """The ladder at 480x832 with random weights."""
    directory = ladder.profile(
        BASELINE, [], name="gpu", chunks=arguments.chunks, repeats=arguments.repeats, random_weights=True, reduced=arguments.small, fresh=True
    )
    document = ladder.document(directory)
    for row in ladder.table(document):
        print("  ".join(f"{cell:>24}" if place else f"{cell:16}" for place, cell in enumerate(row.values())), file=sys.stderr)
    return document


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {"kernels": kernels, "ladder": climbed}


if __name__ == "__main__":
    main()
