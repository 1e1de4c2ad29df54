"""What has been printed about systems, table by table, contradictions included: the only place where a published number stands.

    published/<source>.yaml      a paper, leaderboard or thread with its tables, each number as it is printed: 80.00 is not 80.0
    published/systems.yaml       what the rows are about
    published/claims.yaml        what the paper claims, and which two of these numbers each claim is about

A reader of these files makes no judgement; `rfbench.report.audit` asks which of the numbers follow from others.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rfbench.config import Claim
from rfbench.errors import UserError, did_you_mean
from rfbench.strict import build, load_plain

FOLDER = Path(__file__).resolve().parent
SYSTEMS, CLAIMS = "systems", "claims"  # files that are no source
NONE = "-"  # where a table prints nothing


@dataclass(frozen=True)
class System:
    """What a printed row is about, and who made it."""

    title: str
    by: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of a printed table: the numbers of a system in the order of the columns, separated by spaces, digits as printed."""

    columns: tuple[str, ...]  # what is printed, by the name that it has here: `vbench.total`, `fps`
    rows: dict[str, str]
    where: str = ""  # unless it is the source's
    protocol: str = ""
    notes: dict[str, str] = field(default_factory=dict)  # of a column or of a row
    details_of: str | None = None  # table of the same source that has the totals of these rows
    suite: str | None = None  # of ours, where the protocol is that of it: for all that no note is on
    counts: dict[str, int] = field(default_factory=dict)  # of whole-numbered scores (yes or no, ratings) that a column is the mean of


@dataclass(frozen=True)
class Source:
    """A paper, leaderboard or thread."""

    where: str
    by: str
    tables: dict[str, Table]
    independent: bool = False  # has no contender of its own
    month: str | None = None  # "2025-03", when it was there for others to take numbers from; None: as its number on arXiv says, if it has one

    @property
    def since(self) -> str | None:
        number = re.match(r"arXiv:(\d\d)(\d\d)\.", self.where)
        return self.month or (f"20{number[1]}-{number[2]}" if number else None)


@dataclass(frozen=True)
class Reported:
    """A number that somebody printed about a system."""

    system: str
    metric: str
    text: str  # as printed
    by: str
    where: str
    table: str  # <source>/<table>
    protocol: str  # prompts, hardware, what is counted
    whose: str  # "own", "competitor" or "independent": who measured it, seen from the system
    suite: str | None = None  # of ours whose protocol it followed

    @property
    def value(self) -> float:
        return float(self.text)

    @property
    def low(self) -> float:
        return behind(self.text)[0]

    @property
    def high(self) -> float:
        return behind(self.text)[1]


def behind(text: str) -> tuple[float, float]:
    """The least and the most that a printed number may stand for: rounded, or cut off as some tables do."""
    unit = 10.0 ** -len(text.partition(".")[2])
    return float(text) - unit / 2, float(text) + unit


@dataclass(frozen=True)
class Pair:
    """The two printed numbers that a claim compares."""

    table: str  # <source>/<table>
    metric: str
    better: str  # system
    than: str
    by: str | None = None  # how much better, where that is printed as well, and in what:
    unit: str = "points"  # points | times | percent


@dataclass(frozen=True)
class Statement:
    """A claim of the paper, in our words, and the printed numbers that it is about."""

    text: str
    said: str  # where: abstract, Table 2, ...
    published: Pair


@functools.cache
def systems() -> Mapping[str, System]:
    """Every system that a row may be about."""
    found = load_plain(FOLDER / f"{SYSTEMS}.yaml", (), System)
    return {name: build(System, value, where=f"{SYSTEMS}.yaml, {name}") for name, value in found.items()}


@functools.cache
def sources() -> Mapping[str, Source]:
    """Every source by the name of its file.

    Raises:
        UserError: a file does not have these fields, a row is about no known system, or has not as many numbers as its table columns.
    """
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        if path.stem not in (SYSTEMS, CLAIMS):
            found[path.stem] = build(Source, load_plain(path, (), Source), where=path.name)
            for name, table in found[path.stem].tables.items():
                _check(table, f"{path.name}, {name}", found[path.stem])
    return found


@functools.cache
def reported() -> tuple[Reported, ...]:
    """Every printed number."""
    found = []
    for source_name, source in sources().items():
        for name, table in source.tables.items():
            for system, row in table.rows.items():
                for metric, text in zip(table.columns, row.split(), strict=True):
                    notes = (table.protocol, table.notes.get(metric, ""), table.notes.get(system, ""))
                    whose = "independent" if source.independent else "own" if systems()[system].by == source.by else "competitor"
                    told = "; ".join(note for note in notes if note)
                    if text != NONE:
                        where = table.where or source.where
                        same = None if metric in table.notes or system in table.notes else table.suite
                        found.append(Reported(system, metric, text, source.by, where, f"{source_name}/{name}", told, whose, same))
    return tuple(found)


def about(system: str | None) -> tuple[Reported, ...]:
    """What has been printed about a system."""
    return tuple(row for row in reported() if row.system == system)


def system_of(baseline: str) -> str | None:
    """The system that a baseline of this name is, if anything has been printed about it."""
    name = baseline.rpartition("/")[2].removesuffix(".yaml")
    return name if name in systems() else None


def cell(table: str, system: str, metric: str) -> Reported:
    """One printed number.

    Raises:
        UserError: it is not there.
    """
    found = [row for row in reported() if (row.table, row.system, row.metric) == (table, system, metric)]
    if not found:
        known = [row.system for row in reported() if (row.table, row.metric) == (table, metric)]
        raise UserError(f"published table '{table}' has no '{metric}' of '{system}'{did_you_mean(system, known)}")
    return found[0]


@functools.cache
def statements() -> Mapping[str, Statement]:
    """The paper's claims by id.

    Raises:
        UserError: a claim is about numbers that no table has.
    """
    found = {}
    for name, value in load_plain(FOLDER / f"{CLAIMS}.yaml", (), Statement).items():
        found[name] = build(Statement, value, where=f"{CLAIMS}.yaml, {name}")
        pair(found[name])
    return found


def pair(statement: Statement) -> tuple[Reported, Reported]:
    """The two printed numbers of a claim."""
    asked = statement.published
    return cell(asked.table, asked.better, asked.metric), cell(asked.table, asked.than, asked.metric)


def statement_of(claim: Claim) -> Statement | None:
    """What the paper says to a study's claim.

    Raises:
        UserError: the claim is said to be one of the paper's, which it is not; or it is none and has no text of its own.
    """
    if claim.says is not None and claim.says not in statements():
        raise UserError(f"claim '{claim.id}' says '{claim.says}', which is no claim of the paper{did_you_mean(claim.says, statements())}")
    found = statements().get(claim.says or claim.id)
    if found is None and not claim.text:
        raise UserError(f"claim '{claim.id}' needs a 'text', or an id or 'says' of one of the paper's claims{did_you_mean(claim.id, statements())}")
    return found


def _check(table: Table, where: str, source: Source) -> None:
    for system, row in table.rows.items():
        if system not in systems():
            raise UserError(f"{where}: there is no system '{system}' in {SYSTEMS}.yaml{did_you_mean(system, systems())}")
        texts = row.split()
        if len(texts) != len(table.columns):
            raise UserError(f"{where}: '{system}' has {len(texts)} numbers for {len(table.columns)} columns; write {NONE} where none is printed")
        for text in texts:
            if text != NONE and not re.fullmatch(r"-?\d+(\.\d+)?", text):
                raise UserError(f"{where}: '{text}' of '{system}' is no printed number")
    for note in table.notes:
        if note not in table.columns and note not in table.rows:
            raise UserError(f"{where}: the note on '{note}' is about no column and no row{did_you_mean(note, [*table.columns, *table.rows])}")
    for column in table.counts:
        if column not in table.columns:
            raise UserError(f"{where}: 'counts' names '{column}', which is no column{did_you_mean(column, table.columns)}")
    if table.details_of is not None and table.details_of not in source.tables:
        raise UserError(f"{where}: there is no table '{table.details_of}'{did_you_mean(table.details_of, source.tables)}")
