"""Everything that wants a GPU, in one call of less than eight minutes: `python -m benchmarks.gpu`, or `--small` on any machine to see that
this script works.

It checks every kernel against float32, then products, attention and convolutions by everything that is there, at full size; climbs the
ladder of a Wan2.1 student with random weights, whose rungs carry the exactness gate (chunk 0, chunk 3, and the last chunk of a long clip
whose others are given); and times streams: frame rates, time to first frame, memory, energy. Each part is a process of its own with a limit
in seconds, and the record, JSON with whatever was found, is written after each: a part that fails, hangs or takes the GPU with it leaves
the others alone, and the raw times of the ladder's turns lie in its run directory as they come. It has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from rfbench import attention, hardware, ladder, profiling, provenance
from rfbench.backbones.wan import float8
from rfbench.backbones.wan.dit import Eight

BASELINE = "wan/reward-forcing"
HOME = Path(__file__).resolve().parent.parent
Arguments = argparse.Namespace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a small network of the same architecture, on whatever device there is")
    parser.add_argument("--out", type=Path, default=Path("reports/records/hardware"), help="folder of the record")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--part", choices=PARTS, help="this one alone, whose result goes to stdout")
    arguments = parser.parse_args()
    if arguments.part is not None:
        print(json.dumps(PARTS[arguments.part][0](arguments)))
        return
    if not arguments.small and not torch.cuda.is_available():
        sys.exit("there is no CUDA device; --small runs on the CPU, to see that this script works")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    found: dict[str, Any] = {"small": arguments.small, "machine": provenance.machine(), "software": hardware.software(device), "parts": {}}
    found["state before"] = hardware.state(device)
    path = arguments.out / f"{hardware.name(device)}{'-small' if arguments.small else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, (_, limit) in PARTS.items():
        found["parts"][name] = alone([sys.executable, "-m", "benchmarks.gpu", "--part", name, *sys.argv[1:]], limit)
        told = found["parts"][name]
        print(f"{name}: {'ok' if told['ok'] else told['error']} ({told['seconds']} s)", file=sys.stderr, flush=True)
        found["state after"] = hardware.state(device)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(path)
    failed = [name for name, part in found["parts"].items() if not part["ok"]]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def alone(command: list[str], limit: float) -> dict[str, Any]:
    """What a process says in its last line, or what became of it; what goes wrong in one is no reason to leave out the next."""
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=HOME)
        print(done.stderr, file=sys.stderr, end="")
        found: dict[str, Any] = {"result": json.loads(done.stdout.strip().splitlines()[-1])} if done.stdout.strip() else {}
        why = "; ".join(done.stderr.strip().splitlines()[-3:])
        found |= {"error": f"exit {done.returncode}: {why}", "ok": False} if done.returncode else {"ok": True}
    except subprocess.TimeoutExpired:
        found = {"error": f"took longer than {limit} s", "ok": False}
    return found | {"seconds": round(time.perf_counter() - begun, 1)}


def kernels(arguments: Arguments) -> str:
    """The tests of kernels, attention, copies, 8-bit floats and recorded passes, on this device: not in Triton's interpreter where it is a GPU."""
    names = ["kernels", "attention", "transfer", *([] if arguments.small else ["lean", "float8", "float8_attention"])]
    asked = [f"tests/test_{name}.py" for name in names]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *asked], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        sys.exit("\n".join(lines[-20:]))
    return lines[-1]


def questions(arguments: Arguments) -> list[dict[str, Any]]:
    """One row for each way to make a product, attention or a convolution of a chunk: milliseconds, TFLOP/s, relative L2 distance to float32;
    then one for each launch of a Triton kernel: milliseconds beside the least bytes that it moves, and GB/s."""
    device, rows = torch.device("cuda" if torch.cuda.is_available() else "cpu"), list[dict[str, Any]]()
    shrink = 16 if arguments.small else 1

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    def ask(what: str, by: str, flop: float, way: Callable[[], Tensor], exact: Tensor | None = None) -> None:
        try:
            found = way().float()
            ms = milliseconds(way, device, 1 if arguments.small else 20)
            apart = None if exact is None else float((found - exact).norm() / exact.norm())
            rows.append({"what": what, "by": by, "ms": ms, "tflops": flop / ms / 1e9, "apart": apart})
        except Exception as error:  # that something is not there is an answer too
            rows.append({"what": what, "by": by, "error": f"{type(error).__name__}: {error}"[:300]})
        print(rows[-1], file=sys.stderr)

    def launched(launch: Any, times: int) -> None:
        about = {"what": f"kernel {launch.name}", "by": "triton", "times": times, "bytes": launch.least}
        try:
            ms = milliseconds(launch.ready(device), device, 1 if arguments.small else 20, cold=True)
            rows.append(about | {"ms": ms, "gb_s": launch.least / ms / 1e6})
        except Exception as error:
            rows.append(about | {"error": f"{type(error).__name__}: {error}"[:300]})
        print(rows[-1], file=sys.stderr)

    with torch.no_grad():
        for tokens in (4680 // shrink, 9360 // shrink):
            for outer, inner in ((4608, 1536), (1536, 1536), (8960, 1536), (1536, 8960)):
                linear = nn.Linear(inner // shrink, outer // shrink, device=device, dtype=torch.bfloat16)
                x, what = drawn(tokens, inner // shrink), f"product {tokens} x {inner // shrink} x {outer // shrink}"
                exact = functional.linear(x.float(), linear.weight.float(), linear.bias.float())
                flop = 2 * tokens * linear.weight.numel()
                ask(what, "bfloat16", flop, lambda linear=linear, x=x: linear(x), exact)  # type: ignore[misc]
                eight, before = float8.product(linear), float8.quantised(x)
                ask(what, "8-bit, rows quantised before", flop, lambda eight=eight, before=before: eight(before), exact)  # type: ignore[misc]
        for keys in (4680 // shrink, 9360 // shrink, 14040 // shrink):
            q, k, v = (drawn(1, tokens, 12, 128) for tokens in (4680 // shrink, keys, keys))
            exact = attention.KERNELS["torch-sdpa"](q.float(), k.float(), v.float(), None)
            for name, kernel in attention.KERNELS.items():
                if (why := attention.missing(name, device)) is not None:
                    rows.append({"what": f"attention to {keys}", "by": name, "error": why})
                elif name != "math" or arguments.small:  # which would take all memory
                    ask(f"attention to {keys}", name, 4 * q.shape[1] * keys * 1536, lambda kernel=kernel, qkv=(q, k, v): kernel(*qkv, None), exact)  # type: ignore[misc]
            if (why := float8.missing("attention", device)) is not None:
                rows.append({"what": f"attention to {keys}", "by": "8-bit", "error": why})
                continue
            heads, alone = [float8.quantised_heads(x) for x in (q, k, v)], float8.by_package if q.is_cuda else float8.emulated
            ways: dict[str, Callable[[], Tensor]] = {
                "8-bit, heads quantised before": functools.partial(alone, *heads),
                "8-bit, by kernels": lambda qkv=(q, k, v): float8.attend(*qkv, quantise=import_module("rfbench.kernels").quantised_heads),  # type: ignore[misc]
            }
            for name, way in ways.items():
                ask(f"attention to {keys}", name, 4 * q.shape[1] * keys * 1536, way, exact)
        for channels, frames, height, width in ((384, 6, 120, 208), (192, 12, 240, 416), (96, 12, 480, 832)):
            size = (1, channels // shrink, frames + 2, height // shrink, width // shrink)
            for layout in (torch.contiguous_format, torch.channels_last_3d):
                conv: Any = nn.Conv3d(size[1], size[1], 3, padding=(0, 1, 1), device=device, dtype=torch.bfloat16)
                conv, x, flop = (
                    conv.to(memory_format=layout),
                    drawn(*size).to(memory_format=layout),
                    2 * 27 * size[1] ** 2 * frames * size[3] * size[4],
                )
                ask(f"convolution {size}", str(layout), flop, lambda conv=conv, x=x: conv(x))  # type: ignore[misc]
        if importlib.util.find_spec("triton") is not None:
            module = importlib.import_module("benchmarks.launches")
            eights = tuple(what for what in get_args(Eight) if float8.missing(what, device) is None)
            noted = [each for eight in ((), eights) for each in module.noted(eight=eight, reduced=arguments.small)]
            for launch, often in {launch.kernel if arguments.small else launch.key: (launch, often) for launch, often in noted}.values():
                launched(launch, often)
    return rows


def milliseconds(way: Callable[[], Any], device: torch.device, times: int, *, cold: bool = False) -> float:
    """Median time of a call on the device, after some that do not count. `cold`: its cache holds nothing of what is read, and the host is ahead."""
    taken, other = list[float](), torch.empty(2**28 if cold and device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    warm = 3 if device.type == "cuda" else 0
    for _ in range(warm + times):
        other.zero_()
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            way()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end))
        else:
            begun = time.perf_counter()
            way()
            taken.append(1000 * (time.perf_counter() - begun))
    return median(taken[warm:])


def shown(rows: list[dict[str, str]]) -> None:
    """A table for people."""
    for row in rows:
        print("  ".join(f"{cell:>24}" if place else f"{cell:16}" for place, cell in enumerate(row.values())), file=sys.stderr)


def climbed(arguments: Arguments) -> dict[str, Any]:
    """The ladder at 480x832 with random weights."""
    asked: dict[str, Any] = {"chunks": arguments.chunks, "repeats": arguments.repeats, "random_weights": True, "fresh": True}
    directory = ladder.profile(BASELINE, [], name="gpu", reduced=arguments.small, **asked)
    document = ladder.document(directory)
    shown(ladder.table(document))
    if document["failed"]:
        print(json.dumps(document))
        sys.exit(document["failed"])
    return document


def streamed(arguments: Arguments) -> dict[str, Any]:
    """One process of `rfbench profile`, as this machine's rfbench.toml has it; which shortcuts were taken, and why one was not, is in it."""
    asked: dict[str, Any] = {"chunks": 2 * arguments.chunks, "repeats": 2, "random_weights": True, "fresh": True}
    document = profiling.document(profiling.profile(["toy/ode-init" if arguments.small else BASELINE], name="gpu", **asked))
    shown(profiling.table(document))
    return document


PARTS: dict[str, tuple[Callable[[Arguments], Any], float]] = {
    "kernels": (kernels, 100),
    "questions": (questions, 50),
    "ladder": (climbed, 250),
    "stream": (streamed, 75),
}


if __name__ == "__main__":
    main()
