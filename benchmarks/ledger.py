"""What 100 000 clips cost before any work: reading their rows, seeing that their videos are the ones that were made, at first and again.

    python -m benchmarks.ledger [CLIPS]

Rows are as long as those of VBench with rewritten prompts; videos are a few bytes, so that reading them is not what is measured.
Seconds are of processor time, one process for each line.
"""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rfbench import records
from rfbench.records import Clip

SAMPLES = 5


def fill(directory: Path, clips: int) -> None:
    """A run of so many clips."""
    (directory / "videos").mkdir(parents=True)
    with records.appending(directory / "clips.jsonl") as append:
        for number in range(clips):
            prompt, sample = divmod(number, SAMPLES)
            name, content = f"{prompt:05d}-{sample}", str(number).encode()
            (directory / "videos" / f"{name}.mp4").write_bytes(content)
            texts = (
                f"a prompt of about eighty characters, as long as those of VBench are at most, number {prompt}",
                f"{'long words, ' * 50}{prompt}",
            )
            sha256 = hashlib.sha256(content).hexdigest()
            append(Clip(name, prompt, sample, *texts, number, 81, 16, 480, 832, f"videos/{name}.mp4", sha256))


def measure(directory: Path) -> str:
    """A line of the table."""
    begun = time.process_time()
    clips = records.read_clips(directory)
    read = time.process_time()
    whole = records.intact(directory, clips)
    seen = time.process_time()
    assert len(whole) == len(clips)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return f"rows {read - begun:.2f} s, videos {seen - read:.2f} s, together {seen - begun:.2f} s, at most {memory:.0f} MB"


def main() -> None:
    if len(sys.argv) > 2:  # a process of its own for each measurement
        print(measure(Path(sys.argv[2])))
        return
    clips = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        fill(directory, clips)
        for what in ("at first", "again", "again"):
            line = subprocess.run([sys.executable, "-m", "benchmarks.ledger", "measure", str(directory)], capture_output=True, text=True, check=True)
            print(f"{clips} clips, {what}: {line.stdout.strip()}")


if __name__ == "__main__":
    main()
