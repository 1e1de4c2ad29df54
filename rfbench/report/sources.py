"""Where a board is read from: run directories by where they lie or by what they say, or the records that are left of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from rfbench import config
from rfbench.config import Study
from rfbench.errors import UserError
from rfbench.report import claims, evidence, leaderboard
from rfbench.report.cells import Problems
from rfbench.report.claims import Finding
from rfbench.report.leaderboard import Board
from rfbench.report.record import KINDS

Lookups = tuple[leaderboard.Find, Callable[[str], list[str]]]
FOLDERS = {"generate": "bench", "profile": "profile", "train": "train"}


def study_board(name: str, lookups: Lookups, gaps: Problems | None = None) -> tuple[Board, tuple[Finding, ...]]:
    """The board of a study and what it makes of the claims; `gaps` is why some of it was not there when it was recorded."""
    study = config.load(Study, name)
    board = leaderboard.read_study(study, name, *lookups, gaps or {})
    return board, claims.judge(board, study)


def below(folder: Path) -> Lookups:
    """Runs by where they lie."""

    def find(verb: str, name: str) -> Path | None:
        directory = folder / FOLDERS[verb] / name
        return directory if (directory / "run.json").exists() else None

    def hardware_of(name: str) -> list[str]:
        return sorted(path.parent.name for path in (folder / "profile" / name).glob("*/run.json"))

    return find, hardware_of


def kept(store: Path, among: Iterable[str] | None = None) -> Lookups:
    """Records by where they lie below `store`; with `among` only these of them."""
    names = {str(path.relative_to(store)) for path in store.rglob("*.json")} if among is None else set(among)

    def find(verb: str, name: str) -> Path | None:
        place = f"{KINDS[verb]}{name}.json"
        return store / place if place in names else None

    def hardware_of(name: str) -> list[str]:
        folder = f"{KINDS['profile']}{name}/"
        return sorted(Path(place).stem for place in names if place.startswith(folder) and "/" not in place.removeprefix(folder))

    return find, hardware_of


def among(sources: Iterable[Path]) -> Lookups:
    """Runs by what they say they are."""
    found = {(run.verb, run.name): source for source in sources for run in [evidence.run_of(source)]}

    def hardware_of(name: str) -> list[str]:
        return sorted(run.rpartition("/")[2] for verb, run in found if verb == "profile" and run.rpartition("/")[0] == name)

    return lambda verb, name: found.get((verb, name)), hardware_of


def lies_here(study: str, lookups: Lookups) -> bool:
    """Whether there is any run or record of a study's contenders."""
    find, _ = lookups
    rows = leaderboard.study_rows(config.load(Study, study), config.name_of(study))
    suites = map(leaderboard.suite_name, config.load(Study, study).suites)
    return any(find("generate", f"{run}/{suite}") for suite in suites for row in rows for run in row.runs)


def all_runs(folder: Path) -> list[Path]:
    """Every run there is.

    Raises:
        UserError: none.
    """
    found = [path.parent for kind in FOLDERS.values() for path in sorted((folder / kind).rglob("run.json"))]
    if not found:
        raise UserError(f"there are no runs in {folder}; make some with `rfbench generate` or `rfbench reproduce`")
    return found
