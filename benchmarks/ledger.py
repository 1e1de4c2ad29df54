"""What 100 000 clips cost when a command finds them there, as whole commands: the start of Python, imports and all.

    python -m benchmarks.ledger [CLIPS]

Rows are as long as those of VBench with rewritten prompts, and no two texts alike; videos are a few bytes, so that reading them is not
what is measured. Status is `rfbench generate BASELINE --suite SUITE --dry-run`. Each line is the median of REPEATS processes, one after another;
memory is the most that one of them had resident. Of a run that lacks a clip it is the part before that clip: until the books are read and
torch is imported, and until the sampler begins.

On two cores of which others used one and a half, in November 2026 (before: when every command imported torch and held all rows in memory):

    status                               1.5 s, 198 MB    (3.9 s, 398 MB)
    asked for again, all there           1.9 s,  99 MB    (4.7 s, 434 MB)
    scored again, all there              1.7 s, 212 MB    (2.9 s, 200 MB; 1.6 s of it computing, now as then)
    gone on with, one clip is not there  1.6 s,  89 MB to read the books; 3.0 s, 276 MB with torch and the model, which take 1.4 s of any run
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rfbench import records
from rfbench.records import Clip, Score
from rfbench.suites import PROMPTS, clip_id, clip_seed, declared, load_suite, suite_sha256

BASELINE = "toy/ode-init"
REPEATS = 5
BEGUN = "RFBENCH_LEDGER_BEGUN"  # for a process: when it was started


def fill(folder: Path, clips: int) -> None:
    """A suite of so many clips, and a run of it that has them all and was cut short before it could say so."""
    from rfbench import baselines, provenance

    prompts = shutil.copy(PROMPTS / "toy-short.jsonl", folder)
    samples = -(-clips // len(Path(prompts).read_text().splitlines()))
    (folder / "big.yaml").write_text(f"{{prompts: toy-short.jsonl, samples: {samples}}}")
    asked, directory = load_suite(str(folder / "big.yaml")), _run(folder)
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
    print(f"{len(asked.items):,} rows")


def score(folder: Path) -> None:
    """Scores of all clips, as the scorer would have given them if there were something to see."""
    from rfbench import evaluate
    from rfbench.scorers.base import Answer
    from rfbench.scorers.motion import SCORER

    def answers(_: object, clips: list[Clip], __: Path) -> list[Answer]:
        return [Answer(clip.id, tuple(Score(clip.id, metric, 0.5) for metric in SCORER.metrics)) for clip in clips]

    type(SCORER).score = answers  # type: ignore[assignment,method-assign]
    evaluate.evaluate(_run(folder), ["motion"])


def before_the_first_clip(folder: Path) -> None:
    """Go on with a run until the sampler would begin, and tell when the books were read and when that was."""
    from rfbench import generate

    check = generate.Native.check

    def told(*given: object) -> None:
        print(f"{time.time() - float(os.environ[BEGUN]):.2f} s and {_memory():.0f} MB to read the books,", end=" ")
        check(*given)  # type: ignore[arg-type]
        from rfbench import filming

        filming.film = begin  # type: ignore[assignment]

    def begin(*_: object) -> None:
        print(f"{time.time() - float(os.environ[BEGUN]):.2f} s and {_memory():.0f} MB with torch and the model")
        raise SystemExit

    generate.Native.check = told  # type: ignore[method-assign,assignment]
    generate.generate(BASELINE, str(folder / "big.yaml"))


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _run(folder: Path) -> Path:
    return folder / "runs" / "bench" / BASELINE / "big"


def measure(arguments: list[str]) -> str:
    """A whole command, several times: medians of its seconds, and the most memory."""
    walls, seconds, memory = list[float](), list[float](), 0.0
    for _ in range(REPEATS):
        begun = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0, arguments
        walls.append(time.monotonic() - begun)
        seconds.append(used.ru_utime + used.ru_stime)
        memory = max(memory, used.ru_maxrss / 2**10)
    return f"{statistics.median(walls):.2f} s, {statistics.median(seconds):.2f} s of it computing, at most {memory:.0f} MB"


def main() -> None:
    if len(sys.argv) > 2:  # a process of its own, whose memory is its own as well
        folder = Path(sys.argv[2])
        if sys.argv[1] == "fill":
            fill(folder, int(sys.argv[3]))
        else:
            {"score": score, "first": before_the_first_clip}[sys.argv[1]](folder)
        return
    clips = sys.argv[1] if len(sys.argv) > 1 else "100000"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rfbench.toml").touch()
        os.environ["RFBENCH_TOML"] = f"{name}/rfbench.toml"
        os.chdir(folder)
        asked = ["rfbench.cli", "generate", BASELINE, "--suite", f"{name}/big.yaml"]

        def once(*arguments: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.ledger", *arguments],
                capture_output=True,
                text=True,
                env=os.environ | {BEGUN: str(time.time())},
                check=True,
            )
            return done.stdout.strip()

        print(f"{clips} clips: {once('fill', name, clips)}")
        begun = time.monotonic()
        subprocess.run([sys.executable, "-m", *asked], check=True, capture_output=True)
        print(f"its videos read for the first time   {time.monotonic() - begun:.2f} s")
        print(f"status                               {measure([*asked, '--dry-run'])}")
        print(f"asked for again, all there           {measure(asked)}")
        once("score", name)
        print(f"scored again, all there              {measure(['rfbench.cli', 'eval', f'{BASELINE}/big', '-s', 'motion'])}")
        with (_run(folder) / "clips.jsonl").open("rb+") as rows:  # not all of it in memory, which a process that is started from here would inherit
            rows.seek(-2000, os.SEEK_END)
            rows.truncate(rows.tell() + rows.read()[:-1].rindex(b"\n") + 1)
        for _ in range(REPEATS):
            print(f"gone on with, one clip is not there  {once('first', name)}")


if __name__ == "__main__":
    main()
