"""`rfbench report`: what the runs say, as Markdown, CSV, LaTeX, a picture and one HTML page.

    reports/{README.md, index.html, overview.png, clips.webp, leaderboard.csv, leaderboard.tex, claims.csv}
    reports/{evidence.json, records/<baseline>/<suite>.json}      with `record`: the evidence without the videos, to be committed

The same runs give the same bytes: nothing of the present (clock, machine, order of a directory) gets into a file.
"""

from __future__ import annotations

from pathlib import Path

from rfbench import records
from rfbench.errors import UserError
from rfbench.progress import say
from rfbench.report import account, checking, evidence, film, leaderboard, page, picture, sources, tables
from rfbench.report.claims import Finding
from rfbench.report.leaderboard import Board
from rfbench.settings import settings


def report(runs: list[Path], *, study: str | None, out: Path, record: bool = False, check: bool = False, embed: bool = False) -> Path:
    """Write the report of some runs, or of a study's, into `out`; without both, of all runs there are.

    With `embed` the page holds the videos that it shows, instead of small pictures of them and links.
    Of a study none of whose runs is here, its records are read instead: that makes all but what shows videos. With `check`
    nothing is written: the committed records and reports are checked, of a study only its own report.

    Returns:
        the page, or with `check` the folder that was checked.

    Raises:
        UserError: a run is not whole (under a study: all of them are missing), a claim is about nobody, a file cannot be
            written (code 1), or `check` found something (code 1; each finding is a line on stderr).
    """
    store = settings().reports / "records"
    if check:
        return _check(out if study else None)
    records.refuse_unwritable(out / checking.PAGE, f"--out {out}")
    findings: tuple[Finding, ...] = ()
    if study is None:
        board = leaderboard.read_runs(runs or sources.all_runs(settings().runs))
    else:
        lookups = sources.among(runs) if runs else sources.below(settings().runs)
        if not runs and not sources.lies_here(study, lookups) and sources.lies_here(study, sources.kept(store)):
            say(f"no run of study '{study}' is here: its tables are made from its records, and what shows videos stays as it is")
            lookups = sources.kept(store)
        board, findings = sources.study_board(study, lookups)
    files = build(board, findings, out, embed=embed)
    written = {out / name: content for name, content in files.items()}
    if record:
        kept = checking.condensed(board)
        written |= {store / place: text.encode() for place, text in kept.items()}
        there = {name: (out / name).read_bytes() for name in (tables.PICTURE, tables.CLIPS) if name not in files and (out / name).is_file()}
        written[out / checking.MANIFEST] = checking.manifest(board, kept, there | files).encode()
    for path, content in written.items():
        with records.atomic(path) as temporary:
            temporary.write_bytes(content)
    return out / checking.PAGE


def build(board: Board, findings: tuple[Finding, ...], folder: Path | None = None, *, embed: bool = False) -> dict[str, bytes]:
    """Every file of a report that will lie in `folder`: name -> content; without videos those that need none."""
    scenes = film.scenes(board)
    told = account.summary(board), account.commands(board)
    made = checking.texts(board, findings) | {checking.PAGE: page.to_html(board, findings, scenes, *told, folder=folder, embed=embed)}
    pictures = {tables.PICTURE: picture.overview(board, findings, scenes), tables.CLIPS: film.animation(board, scenes)} if scenes else {}
    return {name: text.encode() for name, text in made.items()} | pictures


def _check(only: Path | None) -> Path:
    """Say what is wrong with the committed reports.

    Raises:
        UserError: something is (code 1).
    """
    reports = settings().reports
    found = checking.check(reports, settings().runs, only)
    for sentence in () if only else checking.unchecked(reports):
        say(sentence)
    for sentence in found:
        say(sentence)
    if found:
        raise UserError(f"{len(found)} finding{'s' * (len(found) > 1)} in {reports}: do what each line above says and check again", code=1)
    return reports


__all__ = ["build", "evidence", "report"]
