"""What 100 000 clips cost when a command finds them there: reading their rows, seeing that their videos are the ones that were made, and what
`rfbench generate` does before its first clip.

    python -m benchmarks.ledger [CLIPS]

Rows are as long as those of VBench with rewritten prompts; videos are a few bytes, so that reading them is not what is measured.
Status is `rfbench generate BASELINE --suite SUITE --dry-run`. A run is resumed when its clips are there and it is not done, and asked for
again when it is. Seconds are of processor time without the imports, one process for each line.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rfbench import records
from rfbench.records import Clip
from rfbench.suites import PROMPTS, clip_id, clip_seed, declared, load_suite, suite_sha256

BASELINE = "toy/ode-init"


def fill(folder: Path, clips: int) -> str:
    """A suite of so many clips, and a run of it that has them all and was cut short before it could say so."""
    from rfbench import baselines, provenance

    prompts = shutil.copy(PROMPTS / "toy-short.jsonl", folder)
    samples = -(-clips // len(Path(prompts).read_text().splitlines()))
    (folder / "big.yaml").write_text(f"{{prompts: toy-short.jsonl, samples: {samples}}}")
    asked, directory = load_suite(str(folder / "big.yaml")), folder / "runs" / "bench" / BASELINE / "big"
    inputs = baselines.prepare(BASELINE, reduced=True).inputs() | {"suite": declared(asked) | {"sha256": suite_sha256(asked)}}
    with provenance.session(directory, "generate", f"{BASELINE}/big", inputs) as run:
        run.complete = False
    (directory / "videos").mkdir()
    with records.appending(directory / "clips.jsonl") as append:
        for prompt, sample in asked.items:
            name, content = clip_id(prompt.id, sample), f"{prompt.id} {sample}".encode()
            (directory / "videos" / f"{name}.mp4").write_bytes(content)
            texts = f"{prompt.text}, as long as the prompts of VBench are at most, which is eighty", f"{'long words, ' * 50}{name}"
            sha256 = hashlib.sha256(content).hexdigest()
            append(Clip(name, prompt.id, sample, *texts, clip_seed(0, prompt.id, sample), 81, 16, 480, 832, f"videos/{name}.mp4", sha256))
    return f"{len(asked.items):,} rows"


def measure(what: str, folder: Path) -> str:
    """A line of the table."""
    if what != "ledger":
        from rfbench import generate
    directory = folder / "runs" / "bench" / BASELINE / "big"

    def ledger() -> None:
        clips = records.read_clips(directory)
        assert len(records.intact(directory, clips)) == len(clips)

    def command(dry_run: bool) -> None:
        generate.generate(BASELINE, str(folder / "big.yaml"), dry_run=dry_run)

    work: Callable[[], None] = {"ledger": ledger, "status": lambda: command(True), "run": lambda: command(False)}[what]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    begun, began = time.process_time(), time.monotonic()
    work()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return f"{time.process_time() - begun:6.2f} s ({time.monotonic() - began:.2f} s of wall), at most {memory:.0f} MB, {before:.0f} of them imports"


STEPS = (
    ("rows and videos, at first", "ledger"),
    ("rows and videos, again", "ledger"),
    ("status", "status"),
    ("resumed, nothing left to make", "run"),
    ("asked for again", "run"),
    ("status", "status"),
)


def main() -> None:
    if len(sys.argv) > 3:  # a process of its own for each measurement, and for what comes before them, whose memory they would inherit
        what, folder, clips = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
        print(fill(folder, clips) if what == "fill" else measure(what, folder))
        return
    clips = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "rfbench.toml").touch()
        for text, what in (("written", "fill"), *STEPS):
            command = [sys.executable, "-m", "benchmarks.ledger", what, name, str(clips)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"RFBENCH_TOML": f"{name}/rfbench.toml"})
            print(f"{clips} clips, {text:30}{done.stdout.strip() or done.stderr}")


if __name__ == "__main__":
    main()
