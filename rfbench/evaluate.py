"""`rfbench eval`: scorers over the clips of a run.

    <run>/scores/<scorer>.jsonl   one Score per line
    <run>/scores/<scorer>.json    with what and over which clips; it is there only when the rows are complete

A scorer that has been over the same clips in the same version is not run again; one that was killed begins anew, because a
scorer may look at all clips together.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rfbench import provenance, records
from rfbench.errors import UserError
from rfbench.progress import Progress
from rfbench.records import Clip, Score
from rfbench.registry import pick
from rfbench.scorers.base import LIGHT, SCORERS, Scorer


def evaluate(run: Path, scorers: Sequence[str] = (), *, partial: bool = False, fresh: bool = False) -> Path:
    """Score a finished run, or with `partial` what there is of an unfinished one; those that need no weights if none is named.

    Returns:
        the directory of the scores.

    Raises:
        UserError: no such scorer, not a run of `generate`, not finished; a video that is not the recorded one or a scorer
            that does not do its work (code 1).
    """
    chosen = [pick(SCORERS, name, what="scorer") for name in scorers or LIGHT]
    found = records.read_run(run)
    if found.verb != "generate":
        raise UserError(f"{run} is a {found.verb} run; only the clips of `rfbench generate` can be scored")
    clips = records.read_clips(run)
    unfinished = found.status != records.DONE
    if unfinished and not partial:
        raise UserError(f"{run} is not finished: {len(clips)} clips are there; run `rfbench generate` for it again, or score them with --partial")
    if not clips:
        raise UserError(f"{run} has no clips to score yet")
    with provenance.alone(run / "scores"):
        for scorer in chosen:
            _score(scorer, run, clips, {"fingerprint": found.fingerprint, "partial": unfinished}, fresh)
    return run / "scores"


def _score(scorer: Scorer, run: Path, clips: list[Clip], about: dict[str, Any], fresh: bool) -> None:
    """Run one scorer, unless what it would say is there."""
    note, rows = run / "scores" / f"{scorer.name}.json", run / "scores" / f"{scorer.name}.jsonl"
    wanted = {
        "scorer": scorer.name,
        "version": scorer.version,
        "metrics": {name: dataclasses.asdict(metric) for name, metric in scorer.metrics.items()},
        "clips": len(clips),
        "clips_sha256": records.clips_sha256(clips),
        **about,
    }
    if not fresh and note.exists() and rows.exists():
        there = records.read_json(note)
        if {key: there.get(key) for key in wanted} == wanted and there.get("rows_sha256") == records.sha256_of(rows):
            return
    note.unlink(missing_ok=True)  # before the rows change: a note stands for complete rows
    begun = time.monotonic()
    with Progress(f"{scorer.name} on {run.parent.name}/{run.name}", len(clips)) as progress:
        scores = list(_told(scorer.score(clips, run), progress))
    check(scores, clips, scorer)
    records.write_rows(rows, scores)
    records.write_json(
        note, wanted | {"rows_sha256": records.sha256_of(rows), "recorded": provenance.environment(), "seconds": round(time.monotonic() - begun, 3)}
    )


def _told(scores: Iterable[Score], progress: Progress) -> Iterator[Score]:
    """The same rows; every clip that appears in them advances the bar."""
    seen: set[str] = set()
    for score in scores:
        if score.clip not in seen:
            seen.add(score.clip)
            progress.advance()
        yield score


def check(scores: Sequence[Score], clips: Sequence[Clip], scorer: Scorer) -> None:
    """Refuse rows that are not a complete answer.

    Every clip has a number; a metric may say nothing about a prompt (there is no direction in "a red disc"), but then about
    none of its clips; segments are counted from 0 and equally many for every clip.

    Raises:
        UserError: names the scorer, the clip and the metric (code 1).
    """

    def refuse(what: str) -> UserError:
        return UserError(f"scorer '{scorer.name}' {what}; nothing of it was kept", code=1)

    prompt_of = {clip.id: clip.prompt_id for clip in clips}
    seen: dict[tuple[str, bool], dict[str, list[int | None]]] = {}  # (metric, in segments) -> clip -> segments
    for score in scores:
        if score.clip not in prompt_of or score.metric not in scorer.metrics:
            raise refuse(f"gave '{score.metric}' of clip {score.clip}, which it was not asked for or did not declare")
        if not math.isfinite(score.value):
            raise refuse(f"found {score.value} for '{score.metric}' of clip {score.clip}")
        segments = seen.setdefault((score.metric, score.segment is not None), {}).setdefault(score.clip, [])
        if score.segment in segments:
            raise refuse(f"gave '{score.metric}' of clip {score.clip} twice")
        segments.append(score.segment)
    for (metric, in_segments), found in seen.items():
        silent = [clip for clip, prompt in prompt_of.items() if clip not in found and prompt in {prompt_of[other] for other in found}]
        if silent:
            raise refuse(f"has no '{metric}' for clip {silent[0]}, but for another clip of the same prompt")
        count = len(next(iter(found.values())))
        for clip, segments in found.items():
            if in_segments and sorted(segments, key=lambda part: part or 0) != list(range(count)):
                raise refuse(f"gave other segments of '{metric}' for clip {clip} than for the first")
    unscored = prompt_of.keys() - {clip for found in seen.values() for clip in found}
    if unscored:
        raise refuse(f"said nothing about clip {min(unscored)}")
