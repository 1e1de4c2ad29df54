"""`rfbench export`: a run as VBench's own tools and its leaderboard want it.

<folder>       `<list>/{prompt}-{i}.mp4`, links to the clips; temporal flickering's as many as there are, 0 to 24
<file>.json    results as VBench writes them: {dimension: [score, [{video_path, video_results}, ...]]}
<file>.zip     the same, whole, to be submitted
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from rfbench import records
from rfbench.errors import UserError
from rfbench.records import Clip, Run
from rfbench.vbench import staging
from rfbench.vbench.dimensions import T2V

SHOWN = 5  # findings in a sentence


def export(run: Path, out: Path, *, scorer: str = "vbench") -> Path:
    """Write a finished run as a folder of links, results or a submission, by the ending of `out`.

    Returns:
        `out`.

    Raises:
        UserError: not a run of clips; clips are missing, extra, alike or of another prompt; not scored, or not whole.
    """
    found = records.read_run(run)
    if found.verb != "generate":
        raise UserError(f"{run} is a {found.verb} run; only the clips of `rfbench generate` can be exported")
    records.refuse_unwritable(out if out.suffix in (".json", ".zip") else out / "x", str(out))
    clips = records.read_clips(run)
    suite = found.inputs["suite"]
    problems = staging.preflight(clips, suite, run)
    if problems:
        told = "; ".join(f"{one.kind} {one.clip}: {one.text}" for one in problems[:SHOWN])
        raise UserError(f"{run} cannot be exported for {len(problems)} reasons: {told}{'; ...' if len(problems) > SHOWN else ''}")
    named = staging.names(clips, suite)
    if out.suffix not in (".json", ".zip"):
        staging.stage(run, named, out)
        return out
    results = _results(run, found, {clip.id: name for name, clip in named.items()}, clips, scorer)
    if out.suffix == ".json":
        records.write_json(out, results)
        return out
    missing = [name for name in T2V.dimensions if name not in results]
    if missing:
        raise UserError(f"the leaderboard wants all dimensions, and {len(missing)} are missing ({', '.join(missing)}); it would count them as 0")
    with records.atomic(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        # no clock: the same results, the same file
        entry = zipfile.ZipInfo(f"{found.name.replace('/', '_')}_eval_results.json", (1980, 1, 1, 0, 0, 0))
        archive.writestr(entry, json.dumps(results, indent=4))
    return out


def _results(run: Path, found: Run, names: dict[str, str], clips: list[Clip], scorer: str) -> dict[str, Any]:
    """Scores as fractions; a clip's imaging quality, as there, of 100."""
    path = run / "scores" / f"{scorer}.json"
    if not path.exists():
        raise UserError(f"{run} has not been scored; run `rfbench eval {found.name} -s {scorer}`")
    note = records.read_json(path)
    summary = note.get("summary")
    if not summary or note.get("refused") or note.get("partial") or note.get("clips_sha256") != records.clips_sha256(clips):
        raise UserError(f"{run}: the scores are not of all its clips; run `rfbench eval {found.name} -s {scorer}`")
    details: dict[str, list[dict[str, Any]]] = {}
    for row in records.read_rows(run / "scores" / f"{scorer}.jsonl", records.Score):
        scale = 1 if row.metric == "imaging_quality" else 100
        value: Any = bool(row.value) if row.metric in ("dynamic_degree", "human_action") else row.value / scale
        details.setdefault(row.metric, []).append({"video_path": names[row.clip], "video_results": value})
    values = {name: one["value"] for name, one in summary["dimensions"].items() if one["value"] is not None}
    return {name: [value / 100, details[name]] for name, value in values.items()}
