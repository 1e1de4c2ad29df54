"""Answers like rfbench.vbench_worker, without any network: values follow from the bytes of the clip and what is asked of it.

A clip of the text "die" kills it, one of "torn" as well in the middle of a line, "slow" and "hang" hold it up, "broken" is refused. As
the official driver it says nothing before it is done with all clips of a dimension. With FAKE_LACKS a dimension cannot run; FAKE_VERSION is that of
the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def version(dimension: str) -> str:
    return f"0.1.5/{dimension}/{os.environ.get('FAKE_VERSION', 'weights')}"


def check(dimensions: list[str]) -> None:
    for name in dimensions:
        lacks = name == os.environ.get("FAKE_LACKS")
        problem = {"version": None, "problem": "not on this machine: it.pth", "fix": "curl it.pth"} if lacks else {"version": version(name)}
        print(json.dumps({"dimension": name, "problem": "", "fix": "", **problem}))


def answer(item: dict[str, Any]) -> dict[str, Any]:
    content, name = Path(item["path"]).read_text(), item["dimension"]
    row = {"id": item["id"], "dimension": name, "version": version(name), "seconds": 0.0, "reason": None, "extra": {}}
    if content == "broken":
        return {**row, "value": None, "weight": 0, "reason": "not a video"}
    digest = hashlib.sha256(f"{content} {name} {item['prompt']} {item['about']} {item.get('begin')} {item.get('at')}".encode()).digest()
    value, frames = digest[0] / 255, [digest[1] / 255] * len(item.get("at") or range(item["frames"]))
    if name == "static":
        return {**row, "value": float("static" in content and f"moving{item.get('begin')} " not in content), "weight": 1}
    if name == "color" and "unseen" in content:
        return {**row, "value": None, "weight": 0}
    if name == "appearance_style":
        return {**row, "value": value, "weight": item["frames"], "extra": {"frames": frames}}
    return {**row, "value": value, "weight": len(frames) - 1 if name.endswith("_consistency") and name != "overall_consistency" else 1}


def main(arguments: list[str]) -> None:
    if arguments[0] == "--check":
        check(arguments[1 : arguments.index("--driver")])
        return
    job = json.loads(Path(arguments[0]).read_text())
    with Path(arguments[0]).with_name("sessions.txt").open("a") as file:
        file.write(f"{len(job['items'])}\n")
    together: dict[str, list[dict[str, Any]]] = {}
    for item in job["items"]:
        together.setdefault(item["dimension"] if job["driver"] == "official" else item["id"], []).append(item)
    for items in together.values():
        print(json.dumps({"turns_to": [item["id"] for item in items]}), flush=True)
        for content in [Path(item["path"]).read_text() for item in items]:
            if content in ("slow", "hang"):
                time.sleep(600 if content == "hang" else 0.5)
            if content in ("die", "torn"):
                print('{"id": "' if content == "torn" else "", end="", flush=True)
                print("Segmentation fault", file=sys.stderr, flush=True)
                os._exit(139)
        for item in items:
            print(json.dumps(answer(item)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
