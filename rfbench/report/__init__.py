"""`rfbench report`: what the runs say, as Markdown, CSV, LaTeX, a picture and one HTML page.

    reports/{README.md, index.html, overview.png, clips.webp, leaderboard.csv, leaderboard.tex, claims.csv}
    reports/records/<baseline>/<suite>.json      with `record`: the evidence without the videos, small enough to commit

The same runs give the same bytes: nothing of the present (clock, machine, order of a directory) gets into a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from rfbench import config, records
from rfbench.config import Study
from rfbench.errors import UserError
from rfbench.records import Run
from rfbench.report import account, claims, evidence, film, leaderboard, page, picture, tables
from rfbench.report.claims import Finding
from rfbench.report.leaderboard import Board
from rfbench.settings import settings

RECORDED = ("code", "packages", "machine", "device", "threads", "attention")  # of a run, what a record keeps
SCHEMA = 1  # of a record


def report(runs: list[Path], *, study: str | None, out: Path, record: bool = False, check: bool = False) -> Path:
    """Write the report of some runs, or of a study's, into `out`; without both, of all runs there are.

    With `check` nothing is written: the report is made in memory and compared byte for byte with what is there.

    Returns:
        the page.

    Raises:
        UserError: a run is not whole (under a study: all of them are missing), a claim is about nobody, a file cannot be
            written (code 1), or `check` found a file that is not what the runs say (code 1).
    """
    board, findings = _study_board(study, runs) if study is not None else (leaderboard.read_runs(runs or _all_runs()), ())
    files = build(board, findings)
    if record:
        files |= {f"records/{name}.json": text.encode() for name, text in condensed(board).items()}
    if check:
        what = f"--study {study}" if study else " ".join(map(str, runs))
        _compare(files, out, f"rfbench report {what}{' --record' if record else ''} --out {out}")
    else:
        for name, content in files.items():
            with records.atomic(out / name) as temporary:
                temporary.write_bytes(content)
    return out / "index.html"


def build(board: Board, findings: tuple[Finding, ...]) -> dict[str, bytes]:
    """Every file of a report: name -> content."""
    summary, commands = account.summary(board), account.commands(board)
    scenes = film.scenes(board)
    files = {
        "index.html": page.to_html(board, findings, scenes, summary, commands),
        "README.md": tables.to_markdown(board, findings, summary, commands),
        "leaderboard.csv": tables.to_csv(board),
        "leaderboard.tex": tables.to_latex(board),
    }
    if findings:
        files["claims.csv"] = tables.claims_csv(findings)
    pictures = {tables.PICTURE: picture.overview(board, findings, scenes), tables.CLIPS: film.animation(board, scenes)}
    return {name: text.encode() for name, text in files.items()} | pictures


def condensed(board: Board) -> dict[str, str]:
    """`<baseline>/<suite>` -> a record: what was asked, by which code, every clip's hash and every score; no paths, no videos."""
    found = {}
    for (run, suite), bench in board.benches.items():
        scored = {item.scorer: {"version": item.version, "values": item.values, "segments": item.segments} for item in board.scores[run, suite]}
        record = {
            "schema": SCHEMA,
            "run": _plain(bench.run),
            "clips": {clip.id: clip.sha256 for clip in bench.clips},  # an id is <prompt>-<sample>
            "scores": scored,
        }
        found[f"{run}/{suite}"] = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return found


def _plain(run: Run) -> dict[str, Any]:
    """A run without what belongs to one machine's disk."""
    recorded = {key: value for key, value in run.recorded.items() if key in RECORDED}
    return {"name": run.name, "fingerprint": run.fingerprint, "inputs": _without_paths(run.inputs), "recorded": _without_paths(recorded)}


def _without_paths(value: Any) -> Any:
    """The same JSON with every absolute path cut down to its last part."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _study_board(name: str, runs: list[Path]) -> tuple[Board, tuple[Finding, ...]]:
    """The board of a study from its runs in the runs folder, or from the given ones only, and what it makes of the claims."""
    study = config.load(Study, name)
    find, hardware_of = _among(runs) if runs else _below(settings().runs)
    board = leaderboard.read_study(study, name, find, hardware_of)
    return board, claims.judge(board, study)


Lookups = tuple[leaderboard.Find, Callable[[str], list[str]]]


def _below(folder: Path) -> Lookups:
    """Runs by where they lie."""
    kinds = {"generate": "bench", "profile": "profile", "train": "train"}

    def find(verb: str, name: str) -> Path | None:
        directory = folder / kinds[verb] / name
        return directory if (directory / "run.json").exists() else None

    def hardware_of(name: str) -> list[str]:
        return sorted(path.parent.name for path in (folder / "profile" / name).glob("*/run.json"))

    return find, hardware_of


def _among(directories: Iterable[Path]) -> Lookups:
    """Runs by what they say they are."""
    found = {(run.verb, run.name): directory for directory in directories for run in [records.read_run(directory)]}

    def hardware_of(name: str) -> list[str]:
        return sorted(run.rpartition("/")[2] for verb, run in found if verb == "profile" and run.rpartition("/")[0] == name)

    return lambda verb, name: found.get((verb, name)), hardware_of


def _all_runs() -> list[Path]:
    folder = settings().runs
    found = [path.parent for kind in ("bench", "profile", "train") for path in sorted((folder / kind).rglob("run.json"))]
    if not found:
        raise UserError(f"there are no runs in {folder}; make some with `rfbench generate` or `rfbench reproduce`")
    return found


def _compare(files: Mapping[str, bytes], out: Path, again: str) -> None:
    """Whether every file is there as it would be written now.

    Raises:
        UserError: one is not (code 1).
    """
    missing = [name for name in files if not (out / name).is_file()]
    changed = [name for name in files if name not in missing and (out / name).read_bytes() != files[name]]
    if missing or changed:
        told = [f"{', '.join(names)} {what}" for names, what in ((changed, "not what the runs say"), (missing, "missing")) if names]
        raise UserError(f"in {out}: {'; '.join(told)}; write the report again with `{again.strip()}` and look at the difference", code=1)


__all__ = ["build", "condensed", "evidence", "report"]
