"""What one dimension found in one clip, and how such rows become the value of the dimension.

VBench in one process walks over all clips with running sums; in several it averages what each has found, by other rules. Here
every clip leaves a row with its value and its weight, and a dimension is the weighted mean of its rows, by the rule of one
process: so the number of workers, their order and a restart change nothing. PROTOCOL.md tells which of VBench's habits are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rfbench.errors import UserError
from rfbench.vbench.dimensions import T2V
from rfbench.vbench.prompts import SAMPLES

STATIC = "static"  # not a dimension: 1 for a clip that temporal flickering may be measured on, else 0
BETWEEN = {"subject_between": "subject_consistency", "background_between": "background_consistency"}  # of the first frames of a video's clips
MAY_DROP = {"color"}  # a clip in which the object was never seen with a colour does not count
TEXT_FREE = (
    *("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness"),
    *("dynamic_degree", "aesthetic_quality", "imaging_quality"),
)
CUSTOM = (*TEXT_FREE, "temporal_style", "overall_consistency")  # can be asked of any prompt: they need no auxiliary information


@dataclass(frozen=True)
class Row:
    """`value` is a fraction or a cosine, None where the clip does not count. `weight` is what the clip adds to the
    denominator of its dimension: pairs of frames for subject and background consistency, frames for what is averaged over all
    frames, else 1. `asked` is the text that the clip was compared with: the same bytes may be asked about twice. `begin` and
    `end` are the frames of a segment, [begin, end); `extra` is what the worker tells beside it, such as values of single frames.
    """

    sha256: str  # of the clip
    dimension: str
    version: str
    value: float | None
    weight: float
    asked: str = ""
    begin: int | None = None
    end: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


Question = tuple[str, str, int | None, int | None]  # sha256, text, begin, end
Key = tuple[str, str, str, str, int | None, int | None]


@dataclass(frozen=True)
class Asked:
    """A question to a clip, and whose it is: the answer is the row with the same sha256, dimension and text."""

    clip: str  # id
    prompt: int
    sample: int
    sha256: str
    text: str = ""
    begin: int | None = None  # of a segment, as in Row
    end: int | None = None

    @property
    def question(self) -> Question:
        return self.sha256, self.text, self.begin, self.end


@dataclass(frozen=True)
class Value:
    """A dimension in percent; `partial` unless every clip that was asked has answered."""

    percent: float
    clips: int  # that count
    asked: int
    partial: bool
    note: str = ""


def key(row: Row) -> Key:
    """What a row is the answer to. A row that is there need not be made again."""
    return row.sha256, row.dimension, row.version, row.asked, row.begin, row.end


def of_version(rows: Iterable[Row], dimension: str, version: str) -> dict[Question, Row]:
    """The rows of a dimension by what they answer.

    Raises:
        UserError: two rows answer the same question differently, or one is no possible answer (code 1).
    """
    found: dict[Question, Row] = {}
    for row in rows:
        if (row.dimension, row.version) != (dimension, version):
            continue
        _check(row)
        first = found.setdefault((row.sha256, row.asked, row.begin, row.end), row)
        if first != row:
            raise UserError(f"clip {row.sha256[:12]}... has two different values for {dimension}; score it again with --fresh", code=1)
    return found


def value(dimension: str, asked: Sequence[Asked], rows: Mapping[Question, Row], *, partial: bool = False, distributed: bool = False) -> Value:
    """A dimension over the clips that were asked: sum of weight times value, by the sum of weights.

    `distributed` is VBench in several processes: subject consistency is the mean of the clips' means, and appearance style
    that of the clips' last frames.

    Raises:
        UserError: a clip has no row and `partial` was not asked for, or none counts (code 1).
    """
    silent = [one.clip for one in asked if one.question not in rows]
    if (silent and not partial) or len(silent) == len(asked):
        which = f" (not {', '.join(silent[:3])}{', ...' if len(silent) > 3 else ''})" if silent else ""
        raise UserError(f"{dimension}: of {len(asked)} clips {len(asked) - len(silent)} have a value{which}; score them", code=1)
    terms = [_term(rows[one.question], distributed) for one in asked if one.question in rows]
    weight = math.fsum(term[1] for term in terms)
    if weight == 0:
        raise UserError(f"{dimension} says something about none of {len(terms)} clips, so it has no value", code=1)
    mean = math.fsum(term[0] * term[1] for term in terms) / weight
    dropped = sum(term[1] == 0 for term in terms)
    note = f"{dropped} clips do not count: the object was never seen in a colour" if dropped else ""
    return Value(100 * mean, len(terms) - dropped, len(asked), bool(silent), note)


def static(asked: Sequence[Asked], rows: Mapping[Question, Row], *, partial: bool = False) -> tuple[list[Asked], int]:
    """The clips that temporal flickering is measured on: of each prompt the first five static ones, and how many prompts have fewer.

    First is by file name, as VBench sorts them: 0, 1, 10, 11, ..., 2, 20, ...

    Raises:
        UserError: a clip was not filtered and `partial` was not asked for (code 1).
    """
    kept: dict[int, list[Asked]] = {one.prompt: [] for one in asked}
    for one in sorted(asked, key=lambda one: f"{one.sample}."):
        row = rows.get(one.question)
        if row is None and not partial:
            raise UserError(f"clip {one.clip} has not been through the static filter; score it", code=1)
        if row is not None and row.value == 1 and len(kept[one.prompt]) < SAMPLES:
            kept[one.prompt].append(one)
    return [one for clips in kept.values() for one in clips], sum(len(clips) < SAMPLES for clips in kept.values())


def dimension(
    name: str, asked: Mapping[str, Sequence[Asked]], there: Iterable[Row], versions: Mapping[str, str], *, partial: bool = False
) -> dict[str, Any]:
    """A dimension of all clips as VBench in one process counts it, as a note tells it: in percent, with what several processes would find.

    Raises:
        UserError: as `value` and `static`.
    """
    there = list(there)
    questions, mine, note = asked[name], of_version(there, name, versions[name]), ""
    if name == "temporal_flickering" and STATIC in asked:
        questions, short = static(asked[STATIC], of_version(there, STATIC, versions[STATIC]), partial=partial)
        note = f"{short} prompts have fewer than five static clips" if short else ""
    one = value(name, questions, mine, partial=partial)
    other = value(name, questions, mine, partial=partial, distributed=True)
    found: dict[str, Any] = {"value": one.percent, "clips": one.clips, "asked": one.asked}
    if partial:
        found["partial"] = True
    if other.percent != one.percent:
        found["in_several_processes"] = other.percent
    if note or one.note:
        found["note"] = note or one.note
    return found


def _term(row: Row, distributed: bool) -> tuple[float, float]:
    if distributed and row.dimension == "appearance_style":
        return row.extra["frames"][-1], 1.0
    if distributed and row.dimension == "subject_consistency":
        return row.value or 0.0, 1.0
    return row.value or 0.0, row.weight


def _check(row: Row) -> None:
    """A value and a positive weight, or neither where a dimension may drop clips."""
    what = f"clip {row.sha256[:12]}...: {row.dimension}"
    if row.dimension not in (*T2V.dimensions, STATIC, *BETWEEN):
        raise UserError(f"{what} is no dimension of VBench", code=1)
    if row.value is None or row.weight == 0:
        if row.value is not None or row.weight != 0 or row.dimension not in MAY_DROP:
            raise UserError(f"{what} has no value or no weight", code=1)
        return
    one = T2V.dimensions.get(row.dimension)
    slack = 1e-5  # a cosine of float32 vectors
    possible = (one.least if one else 0) - slack <= row.value <= 1 + slack
    if not (possible and math.isfinite(row.weight) and row.weight > 0):
        raise UserError(f"{what} is {row.value} with weight {row.weight}, which cannot be", code=1)
