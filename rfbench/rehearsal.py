"""`rfbench eval --check-setup`: every scorer goes over two tiny clips before hours are spent, and says what keeps it from that."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rfbench import evaluate, provenance, records, video, world
from rfbench.doctor import Check
from rfbench.errors import UserError
from rfbench.records import DONE, Clip, Run, Score
from rfbench.registry import pick
from rfbench.scorers.base import DRAWN, SCORERS, Comparing

PROMPTS = ("a red disc moves right quickly", "a blue square moves up slowly")  # which the toy world's scorers understand
FRAMES = 33  # two seconds


def rehearse(scorers: Sequence[str] = ()) -> list[Check]:
    """What becomes of each scorer: `ok` with its rows and time, or the reason and the fix. None of them stops the next.

    All if none is named, but for those that are rehearsals themselves.

    Raises:
        UserError: no such scorer.
    """
    for name in scorers:
        pick(SCORERS, name, what="scorer")
    with tempfile.TemporaryDirectory(prefix="rfbench-") as folder:
        run = _film(Path(folder))
        return [_try(name, run) for name in scorers or [name for name in SCORERS if name not in DRAWN]]


def _try(name: str, run: Path) -> Check:
    begun = time.monotonic()
    try:
        scorer = pick(SCORERS, name, what="scorer")
        evaluate.evaluate(run, [name], against=run if isinstance(scorer, Comparing) else None)
    except UserError as error:  # 2: something that it needs is not there; 1: it was there and did not work
        return Check(name, "missing" if error.code == 2 else "broken", str(error), "do what the sentence says, or leave the scorer out")
    except ImportError as error:
        return Check(name, "missing", str(error), f"pip install -c constraints.txt {error.name or ''}".strip())
    except Exception as error:  # whatever one scorer does, the others are tried
        return Check(name, "broken", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", f"rfbench eval RUN -s {name} shows where")
    count = len(records.read_rows(run / "scores" / f"{name}.jsonl", Score))
    return Check(name, "ok", f"{count} rows in {time.monotonic() - begun:.1f} s, version {scorer.version}")


def _film(folder: Path) -> Path:
    """A finished run of two clips of the toy world."""
    clips = []
    for number, prompt in enumerate(PROMPTS):
        frames = world.render(world.draw_scene(world.parse(prompt), np.random.default_rng(number)), FRAMES)
        path = folder / "videos" / f"{number:04}-0.mp4"
        with video.writing(path, fps=world.FPS, height=world.HEIGHT, width=world.WIDTH) as write:
            write((127.5 * (frames.transpose(0, 2, 3, 1) + 1)).round().clip(0, 255).astype(np.uint8))
        where = str(path.relative_to(folder))
        clips.append(Clip(path.stem, number, 0, prompt, prompt, 0, FRAMES, world.FPS, world.HEIGHT, world.WIDTH, where, records.sha256_of(path)))
    records.write_rows(folder / "clips.jsonl", clips)
    suite = {"name": "check-setup", "samples": 1, "prompts": [{"id": number, "text": prompt} for number, prompt in enumerate(PROMPTS)]}
    inputs = {"suite": suite}
    records.write_run(folder, Run("generate", "check/setup", inputs, records.fingerprint(inputs), provenance.environment(), DONE))
    return folder
