"""Total, Quality and Semantic from the dimensions, or a refusal: nothing that is missing or doubtful is filled in.

VBench's own script counts a dimension that is not there as zero and normalises that, which costs Wan2.1 without temporal
flickering 33 points and puts rows with a total of -57 on the leaderboard.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rfbench.errors import UserError, did_you_mean
from rfbench.vbench.dimensions import I2V, T2V, Board


def line(source: str, *, fractions: bool = False, i2v: bool = False, compat: bool = False) -> str:
    """The totals of a file of dimensions as one line of JSON; `source` and errors as in `read`, `compat` as in `as_released`."""
    board = I2V if i2v else T2V
    percent = read(source, fractions=fractions, board=board)
    points = as_released(percent, board) if compat else total(percent, board)
    return json.dumps({name: round(value, 6) if isinstance(value, float) else value for name, value in points.items()})


def total(percent: Mapping[str, float], board: Board = T2V) -> dict[str, float]:
    """Total and groups in points from one value per dimension in percent.

    Each group is the weighted mean of its normalised dimensions, the total that of the groups:
    (4 quality + semantic) / 5 for text to video, (i2v + quality) / 2 for image to video.

    Raises:
        UserError: a dimension is missing, unknown, not a number or out of its range.
    """
    _check(percent, board)
    groups = {}
    for group in board.groups:
        members = {name: one for name, one in board.dimensions.items() if one.group == group}
        shares = [one.weight * (percent[name] / 100 - one.low) / (one.high - one.low) for name, one in members.items()]
        groups[group] = 100 * math.fsum(shares) / math.fsum(one.weight for one in members.values())
    whole = math.fsum(weight * groups[group] for group, weight in board.groups.items()) / math.fsum(board.groups.values())
    return {"total": whole, **groups}


def as_released(percent: Mapping[str, float], board: Board = T2V) -> dict[str, Any]:
    """Totals as VBench's own script has them: a dimension that is missing counts as 0, and `missing_as_0` names it.

    Raises:
        UserError: a dimension is unknown, not a number or out of its range.
    """
    missing = [name for name in board.dimensions if name not in percent]
    return total({**percent, **dict.fromkeys(missing, 0.0)}, board) | ({"missing_as_0": missing} if missing else {})


@functools.cache
def slopes() -> Mapping[str, Mapping[str, float]]:
    """Total, quality and semantic of text to video -> what a point of each dimension that is part of it adds to it: all are linear."""
    none = dict.fromkeys(T2V.dimensions, 0.0)
    base = total(none)
    one = {name: total(none | {name: 1.0}) for name in T2V.dimensions}
    return {part: {name: slope for name in one if (slope := one[name][part] - base[part])} for part in base}


def _check(percent: Mapping[str, float], board: Board) -> None:
    """Every dimension of the board, each a possible percentage, and nothing else."""
    for name in percent:
        if name not in board.dimensions:
            raise UserError(f"'{name}' is no dimension of {board.title}{did_you_mean(name, board.dimensions)}")
    missing = [name for name in board.dimensions if name not in percent]
    if missing:
        count = f"{len(missing)} of its {len(board.dimensions)} dimensions are missing" if len(missing) > 1 else "one of its dimensions is missing"
        raise UserError(f"there is no {board.title} total: {count} ({', '.join(missing)}); evaluate {'them' if len(missing) > 1 else 'it'}")
    for name, value in percent.items():
        least = 100 * board.dimensions[name].least
        if not _is_number(value):
            raise UserError(f"'{name}' is {_shown(value)}, which is not a number; write its value in percent")
        if not math.isfinite(value) or not least <= value <= 100:
            raise UserError(f"'{name}' is {value} %, and it can only be from {least:g} to 100; look at how it was evaluated")


def read(source: str, *, fractions: bool = False, board: Board = T2V) -> dict[str, float]:
    """The dimensions of a JSON file, or of standard input for "-", in percent.

    Percentages and fractions are never guessed apart: without `fractions`, a value above 0 and up to 1 is taken for a
    fraction by mistake and refused; with it, one above 1.

    Raises:
        UserError: there is no such file; it is not one JSON object of names and numbers; a name is there twice; percent and
            fractions are mixed up.
    """
    where = "standard input" if source == "-" else source
    try:
        text = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        found = json.loads(text.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _once(pairs, where), parse_int=float)
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}); give a JSON file of dimensions, or - for standard input") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({' '.join(str(error).split())}); write one object of dimension names and values") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected one JSON object of dimension names and values, found {_shown(found)}")
    for name, value in found.items():
        if not _is_number(value) or name not in board.dimensions:
            continue  # `total` says what is wrong
        if fractions and abs(value) > 1:
            raise UserError(f"{where}: '{name}' is {value}, which is no fraction; leave out --fractions if the values are percentages")
        if not fractions and 0 < abs(value) <= 1:
            raise UserError(
                f"{where}: '{name}' is {value}, which looks like a fraction; write all values in percent, or all as fractions with --fractions"
            )
    return {name: 100 * value if fractions and _is_number(value) else value for name, value in found.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UserError(f"{where}: '{name}' is there twice; leave one")
        found[name] = value
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
