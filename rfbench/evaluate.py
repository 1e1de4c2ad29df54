"""`rfbench eval`: scorers over the clips of a run.

    <run>/scores/<scorer>.jsonl          one Score per line, clips in order
    <run>/scores/<scorer>.json           with what and over which clips; it is there only when every clip was answered for or refused
    <run>/scores/<scorer>/               what a scorer keeps for itself
    <run>/scores/<scorer>.ledger.jsonl   an answer per line as it came, by clip, sha256 of its video and version of the scorer

What the ledger holds is not asked again: a scorer that was killed goes on, a clip that was made again is scored alone. Only a
scorer that looks at clips together begins anew. A clip that cannot be scored is refused by name, and the note keeps the reason;
the other clips have their scores, and a report does without all of them until the clip is mended.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfbench import fleet, provenance, records
from rfbench.errors import UserError
from rfbench.progress import Progress
from rfbench.records import Clip, Score
from rfbench.registry import pick
from rfbench.scorers.base import LIGHT, SCORERS, Answer, Comparing, Divisible, Scorer, Summarising

AT_ONCE = 8  # clips that a worker of a cluster takes at a time


@dataclass(frozen=True)
class Kept:
    """A line of a ledger: what a scorer of this version said of these bytes."""

    clip: str
    sha256: str
    version: str
    rows: tuple[Score, ...]


def evaluate(
    run: Path,
    scorers: Sequence[str] = (),
    *,
    against: Path | None = None,
    partial: bool = False,
    engine: fleet.Engine = "here",
    workers: int | None = None,
    fresh: bool = False,
) -> Path:
    """Score a finished run, or with `partial` what there is of an unfinished one and what can run here; by light scorers if none is named.

    `against` is the run that scorers which compare are to compare with. With engine "ray" the `workers` of a cluster judge the clips,
    but for scorers that look at them together or sum them up; the scores are the same. Every scorer has its turn, whatever becomes of the one before.

    Returns:
        the directory of the scores.

    Raises:
        UserError: no such scorer, or one that lacks something; not a run of `generate`, not finished. With code 1: a clip that
            could not be scored, or a scorer that does not do its work.
    """
    chosen: list[Scorer] = [pick(SCORERS, name, what="scorer") for name in dict.fromkeys(scorers or LIGHT)]
    if against is not None:
        if not any(isinstance(scorer, Comparing) for scorer in chosen):
            raise UserError("--against is for a scorer that compares: add -s reference, or leave it out")
        chosen = [scorer.beside(against) if isinstance(scorer, Comparing) else scorer for scorer in chosen]
    if partial:
        chosen = [scorer.partly() if isinstance(scorer, Divisible) else scorer for scorer in chosen]
    found = records.read_run(run)
    if found.verb != "generate":
        raise UserError(f"{run} is a {found.verb} run; only the clips of `rfbench generate` can be scored")
    clips = records.read_clips(run)
    unfinished = found.status != records.DONE
    if unfinished and not partial:
        raise UserError(f"{run} is not finished: {len(clips)} clips are there; run `rfbench generate` for it again, or score them with --partial")
    if not clips:
        raise UserError(f"{run} has no clips to score yet")
    versions = {scorer.name: scorer.version for scorer in chosen}  # what a scorer lacks must come out before hours are spent on another
    failed: list[UserError] = []
    with provenance.alone(run / "scores"):
        for scorer in chosen:
            about = {"version": versions[scorer.name], "fingerprint": found.fingerprint, "partial": unfinished}
            try:
                _score(scorer, run, clips, about, fresh, partial, _spreading(engine, workers))
            except UserError as error:
                failed.append(error)
    if len(failed) > 1:
        raise UserError("; ".join(map(str, failed)), code=1)
    if failed:
        raise failed[0]
    return run / "scores"


Judge = Callable[[Scorer, list[Clip], Path], Iterable[Answer]]


def _spreading(engine: fleet.Engine, workers: int | None) -> Judge:
    """How a scorer is asked about clips: here, or by workers that take a few clips at a time.

    A scorer that sums up keeps books of its own beside its scores, which are for one process to write.
    """

    def asked(scorer: Scorer, clips: list[Clip], run: Path) -> Iterable[Answer]:
        if engine == "here" or scorer.together or isinstance(scorer, Summarising):
            return scorer.score(clips, run)
        batches = [clips[start : start + AT_ONCE] for start in range(0, len(clips), AT_ONCE)]
        return itertools.chain.from_iterable(fleet.spread(functools.partial(_judge, scorer, run.resolve()), batches, workers))

    return asked


def _judge(scorer: Scorer, run: Path) -> Callable[[list[Clip]], list[Answer]]:
    """What a worker does."""
    return lambda clips: list(scorer.score(clips, run))


def _score(scorer: Scorer, run: Path, clips: list[Clip], about: dict[str, Any], fresh: bool, partial: bool, judge: Judge) -> None:
    """Run one scorer over the clips that it has not answered for.

    Raises:
        UserError: it refuses a clip; its answers are not whole (code 1).
    """
    note, rows, ledger = (run / "scores" / f"{scorer.name}{ending}" for ending in (".json", ".jsonl", ".ledger.jsonl"))
    wanted = {
        "scorer": scorer.name,
        "metrics": {name: dataclasses.asdict(metric) for name, metric in scorer.metrics.items()},
        "clips": len(clips),
        "clips_sha256": records.clips_sha256(clips),
        "refused": {},
        **about,
    }
    if fresh:
        ledger.unlink(missing_ok=True)
        shutil.rmtree(run / "scores" / scorer.name, ignore_errors=True)
    elif note.exists() and rows.exists():
        there = records.read_json(note)
        if {key: there.get(key) for key in wanted} == wanted and there.get("rows_sha256") == records.sha256_of(rows):
            return
    note.unlink(missing_ok=True)  # before the rows change: a note stands for complete rows
    begun = time.monotonic()
    answers = {} if scorer.together else _kept(ledger, clips, about["version"])
    refused: dict[str, str] = {}
    todo = [clip for clip in clips if clip.id not in answers]
    with records.appending(ledger) as append, Progress(f"{scorer.name} on {run.parent.name}/{run.name}", len(clips), done=len(answers)) as progress:
        for clip, answer in _asked(scorer, todo, run, judge):
            if answer.refused is not None:
                refused[clip.id] = answer.refused
            else:
                answers[clip.id] = answer.rows
                if not scorer.together:
                    append(Kept(clip.id, clip.sha256, about["version"], answer.rows))
            progress.advance()
    scored = [clip for clip in clips if clip.id in answers]
    scores = [row for clip in scored for row in answers[clip.id]]
    try:
        check(scores, scored, scorer)
    except UserError:
        ledger.unlink()  # answers that do not go together would not the next time either
        raise
    records.write_rows(rows, scores)
    told: dict[str, Any] = {
        "refused": refused,
        "rows_sha256": records.sha256_of(rows),
        "weights": dict(scorer.weights),
        "recorded": provenance.environment(),
    }
    if isinstance(scorer, Summarising):
        missing = about["partial"] or bool(refused)
        together = scorer.summary(clips, run, partial=missing) if partial or not missing else None
        told |= {"sparse": sorted(scorer.sparse), "summary": together, "whole": {} if missing or together is None else together.get("totals") or {}}
    records.write_json(note, wanted | told | {"seconds": round(time.monotonic() - begun, 3)})
    if scorer.together:
        ledger.unlink()
    if refused:
        first, reason = next(iter(refused.items()))
        which = f"clip {first}" if len(refused) == 1 else f"{len(refused)} of {len(clips)} clips, first {first}"
        raise UserError(f"scorer '{scorer.name}' could not score {which} ({reason}); the others are kept: mend it and run this again", code=1)


def _kept(ledger: Path, clips: list[Clip], version: str) -> dict[str, tuple[Score, ...]]:
    """Clip id -> rows that the ledger holds for these bytes in this version."""
    wanted = {(clip.id, clip.sha256, version) for clip in clips}
    lines = records.read_rows(ledger, Kept)
    return {line.clip: tuple(Score(**row) for row in line.rows) for line in lines if (line.clip, line.sha256, line.version) in wanted}  # type: ignore[arg-type]


def _asked(scorer: Scorer, clips: list[Clip], run: Path, judge: Judge) -> Iterator[tuple[Clip, Answer]]:
    """The scorer's answers, one for each clip; rows that hold no number are a refusal.

    Raises:
        UserError: an answer to what was not asked, of what was not declared, or none (code 1).
    """

    def mistaken(what: str) -> UserError:
        return UserError(f"scorer '{scorer.name}' {what}; mend the scorer and run this again: what it had said of other clips is kept", code=1)

    waiting = {clip.id: clip for clip in clips}
    for answer in judge(scorer, clips, run) if clips else ():
        clip = waiting.pop(answer.clip, None)
        if clip is None:
            raise mistaken(f"spoke of clip {answer.clip}, which it was not asked for or had answered for")
        seen = set()
        for row in answer.rows:
            if row.clip != clip.id or row.metric not in scorer.metrics:
                raise mistaken(f"gave '{row.metric}' of clip {row.clip} for clip {clip.id}, which it was not asked for or did not declare")
            if (row.metric, row.segment) in seen:
                raise mistaken(f"gave '{row.metric}' of clip {clip.id} twice")
            seen.add((row.metric, row.segment))
        if not answer.rows and answer.refused is None:
            raise mistaken(f"said nothing about clip {clip.id}")
        empty = next((row for row in answer.rows if not math.isfinite(row.value)), None)
        if empty is not None:
            answer = Answer(clip.id, refused=f"clip {clip.id}: '{empty.metric}' came out as {empty.value}")
        yield clip, answer
    if waiting:
        raise mistaken(f"said nothing about clip {min(waiting)}")


def check(scores: Sequence[Score], clips: Sequence[Clip], scorer: Scorer) -> None:
    """Refuse answers that do not go together.

    A metric may say nothing about a prompt (there is no direction in "a red disc"), but then, unless it is sparse, about none of
    its clips; segments are counted from 0 and equally many for every clip.

    Raises:
        UserError: names the scorer, the clip and the metric (code 1).
    """

    def refuse(what: str) -> UserError:
        return UserError(f"scorer '{scorer.name}' {what}; nothing of it was kept: mend the scorer and run this again", code=1)

    prompt_of = {clip.id: clip.prompt_id for clip in clips}
    seen: dict[tuple[str, bool], dict[str, list[int | None]]] = {}  # (metric, in segments) -> clip -> segments
    for score in scores:
        seen.setdefault((score.metric, score.segment is not None), {}).setdefault(score.clip, []).append(score.segment)
    sparse = scorer.sparse if isinstance(scorer, Summarising) else ()
    for (metric, in_segments), found in seen.items():
        silent = [clip for clip, prompt in prompt_of.items() if clip not in found and prompt in {prompt_of[other] for other in found}]
        if silent and metric not in sparse:
            raise refuse(f"has no '{metric}' for clip {silent[0]}, but for another clip of the same prompt")
        count = len(next(iter(found.values())))
        for clip, segments in found.items():
            if in_segments and sorted(segments, key=lambda part: part or 0) != list(range(count)):
                raise refuse(f"gave other segments of '{metric}' for clip {clip} than for the first")
