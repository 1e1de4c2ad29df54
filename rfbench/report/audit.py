"""`rfbench report --audit`: what of the published numbers follows from others of them, by rules that know nothing of any paper.

A printed number stands for every number that is rounded or cut off to it. A rule computes with both ends of that range, so what
it gets is a range as well: the slack that rounding allows, and nothing else.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter

from rfbench import published
from rfbench.published import Reported
from rfbench.statistics import LEVEL, student
from rfbench.vbench import totals
from rfbench.vbench.dimensions import I2V, T2V, Board

FOLLOWS, BROKEN, DIFFER, REPEATED, OPEN = "follows", "does not follow", "differ", "repeated", "within noise"
VERDICTS = (BROKEN, OPEN, DIFFER, REPEATED, FOLLOWS)  # in the order in which they are shown
BOARDS = {"vbench": T2V, "vbench-long": T2V, "vbench_i2v": I2V}
CHANCE = 1e-3  # how unlikely it has to be that a number of equal parts fits by accident
EDGE = 1e-9


@dataclass(frozen=True)
class Check:
    """One rule applied once."""

    rule: str
    what: str  # which number of whom, and where it is printed
    printed: str
    computed: str
    slack: str  # the numbers that could have been printed, as far as rounding goes
    verdict: str


Rows = Mapping[tuple[str, str], Mapping[str, Reported]]  # (table, system) -> metric -> number; details stand with their totals


def audit() -> list[Check]:
    """Every rule on everything that is published, what does not follow first."""
    rows = _rows()
    found = [check for rule in RULES for check in rule(rows)]
    return sorted(found, key=lambda check: VERDICTS.index(check.verdict))


def _rows() -> Rows:
    rows: dict[tuple[str, str], dict[str, Reported]] = defaultdict(dict)
    for one in published.reported():
        source, _, name = one.table.partition("/")
        of = published.sources()[source].tables[name].details_of
        rows[f"{source}/{of}" if of else one.table, one.system][one.metric] = one
    return rows


def _where(one: Reported) -> str:
    return f"{one.metric} of {one.system} ({one.table})"


def _compare(rule: str, one: Reported, computed: float, low: float, high: float, *, printed: str = "") -> Check:
    """A printed number against what the others leave open, from `low` to `high`."""
    text = printed or one.text
    least, most = published.behind(text)
    places = max(2, len(text.partition(".")[2]))
    holds = low - EDGE <= most and least <= high + EDGE
    shown = f"{low - (most - float(text)):.{places}f} to {high + (float(text) - least):.{places}f}"
    return Check(rule, _where(one), text, f"{computed:.{places}f}", shown, FOLLOWS if holds else BROKEN)


def totals_of_groups(rows: Rows) -> Iterator[Check]:
    """A total that is printed with its groups is their weighted mean."""
    for row in rows.values():
        for suite, board in BOARDS.items():
            total, groups = row.get(f"{suite}.total"), [row[key] for group in board.groups if (key := f"{suite}.{group}") in row]
            if total is not None and len(groups) == len(board.groups):
                ends = [[one.value for one in groups], [one.low for one in groups], [one.high for one in groups]]
                yield _compare("total of its groups", total, *(_mean(values, board.groups.values()) for values in ends))


def _mean(values: Iterable[float], weights: Iterable[float]) -> float:
    weights = list(weights)
    return math.fsum(weight * value for value, weight in zip(values, weights, strict=True)) / math.fsum(weights)


def totals_of_dimensions(rows: Rows) -> Iterator[Check]:
    """A total or group that is printed with all its dimensions, or with those alone that its protocol has, is what VBench makes of them."""
    for row in rows.values():
        for suite, board in BOARDS.items():
            there = {name: row[f"{suite}.{name}"] for name in board.dimensions if f"{suite}.{name}" in row}
            if len(there) < 2 or f"{suite}.total" not in row:
                continue
            own = _reduced(board, there)
            ends = [{name: min(100.0, value(one)) for name, one in there.items()} for value in (_value, _low, _high)]
            points = [totals.total(dims, own) for dims in ends]
            for name in ("total", *(own.groups if len(own.groups) > 1 else ())):
                if f"{suite}.{name}" in row:
                    yield _compare(f"{name} of {len(there)} dimensions", row[f"{suite}.{name}"], *(found[name] for found in points))


_value, _low, _high = attrgetter("value"), attrgetter("low"), attrgetter("high")


def _reduced(board: Board, there: Iterable[str]) -> Board:
    dimensions = {name: board.dimensions[name] for name in there}
    groups = {one.group for one in dimensions.values()}
    return Board(board.title, dimensions, {name: weight for name, weight in board.groups.items() if name in groups})


def comparisons(rows: Rows) -> Iterator[Check]:
    """How much better something is said to be is the ratio, gain or difference of the two numbers that are printed for it."""
    for statement in published.statements().values():
        asked, (one, other) = statement.published, published.pair(statement)
        if asked.by is not None:
            by = BY[asked.unit]
            ends = (by(one.value, other.value), by(one.low, other.high), by(one.high, other.low))
            yield _compare(f"{asked.unit} over {other.system}", one, *ends, printed=asked.by)


BY: dict[str, Callable[[float, float], float]] = {
    "times": lambda one, other: one / other,
    "percent": lambda one, other: 100 * (one / other - 1),
    "points": lambda one, other: one - other,
}


def parts(rows: Rows) -> Iterator[Check]:
    """The mean of n scores that are whole numbers is a whole number of n-th parts; of answers yes or no in per cent, of hundred n-th parts."""
    columns: dict[tuple[str, str], list[Reported]] = defaultdict(list)
    for one in published.reported():
        columns[one.table, one.metric].append(one)
    for (table, metric), column in columns.items():
        count, unit = _count(table, metric), _unit(metric)
        if count is None:
            continue
        misfits = [one for one in column if not _fits(one, count, unit)]
        for one in column:
            nearest = round(one.value * count / unit)
            places = len(one.text.partition(".")[2]) + 1
            slack = f"{one.low:.{places}f} to {one.high:.{places}f}"
            verdict = BROKEN if one in misfits else FOLLOWS
            yield Check(f"whole {count}ths", _where(one), one.text, f"{nearest}/{count} is {unit * nearest / count:.{places}f}", slack, verdict)
        other = fewest_parts(misfits, unit)
        if other is not None:
            told = f"all {len(misfits)} that do not fit are whole {other}ths"
            yield Check("number of parts", f"{metric} ({table})", f"n = {count}", told, f"by chance {_chance(misfits, other, unit):.0e}", BROKEN)


def _count(table: str, metric: str) -> int | None:
    source, _, name = table.partition("/")
    return published.sources()[source].tables[name].counts.get(metric)


def _unit(metric: str) -> float:
    """What one whole score is printed as."""
    return 1.0 if metric.startswith("user_study.") else 100.0


def _fits(one: Reported, count: int, unit: float) -> bool:
    least = math.ceil((one.low - EDGE) * count / unit)
    return unit * least / count <= one.high + EDGE


def _chance(column: Sequence[Reported], count: int, unit: float) -> float:
    """How likely numbers anywhere would fit: each covers this share of a part, and every smaller count was a try as well."""
    return count * math.prod(min(1.0, (one.high - one.low) * count / unit) for one in column)


def fewest_parts(column: Sequence[Reported], unit: float) -> int | None:
    """The least n for which all numbers are whole n-th parts, if that is no accident."""
    if len(column) < 2:
        return None
    for count in range(2, 2001):
        if _chance(column, count, unit) > CHANCE:
            return None
        if all(_fits(one, count, unit) for one in column):
            return count
    return None


def noise(rows: Rows) -> Iterator[Check]:
    """Two shares of n videos each differ if their difference is more than two binomials of that size make by chance."""
    for statement in published.statements().values():
        one, other = published.pair(statement)
        count = _count(one.table, one.metric)
        if count is None or _unit(one.metric) == 1.0:
            continue
        shares = [one.value / 100, other.value / 100]
        reach = 100 * student(math.inf, LEVEL) * math.sqrt(math.fsum(share * (1 - share) for share in shares) / count)
        gain = one.value - other.value
        what = f"{_where(one)} over {other.system}"
        yield Check("more than chance", what, f"{gain:+.2f}", f"n = {count} each, unpaired", f"±{reach:.2f}", FOLLOWS if gain > reach else OPEN)


def one_number(rows: Rows) -> Iterator[Check]:
    """A quantity of a system that is printed with several numbers: of each suite the first such quantity, and how far any of them are apart."""
    groups: dict[tuple[str, str], dict[str, list[Reported]]] = defaultdict(lambda: defaultdict(list))
    for one in published.reported():
        groups[one.system, one.metric.partition(".")[0]][one.metric].append(one)
    for (system, suite), quantities in groups.items():
        apart = {metric: group for metric, group in quantities.items() if max(map(_low, group)) > min(map(_high, group)) + EDGE}
        if apart:
            metric, group = next(iter(apart.items()))
            told = ", ".join(
                f"{text} ({', '.join(one.table for one in group if one.text == text)})" for text in dict.fromkeys(one.text for one in group)
            )
            spreads = {name: max(map(_value, found)) - min(map(_value, found)) for name, found in apart.items()}
            widest = max(spreads, key=lambda name: spreads[name])
            computed = f"{len(apart)} of {len(quantities)} differ" if len(quantities) > 1 else "one number"
            yield Check(
                "one number", f"{metric} of {system}", told, computed, f"widest {spreads[widest]:.4g} ({widest.removeprefix(suite + '.')})", DIFFER
            )


def repeated(rows: Rows) -> Iterator[Check]:
    """What a competitor prints about a system to the last digit as it was printed before was hardly measured again."""
    tables: dict[tuple[str, str], dict[str, Reported]] = defaultdict(dict)
    for one in published.reported():
        tables[one.system, one.table][one.metric] = one
    for (system, table), row in tables.items():
        if next(iter(row.values())).whose != "competitor":
            continue
        earlier = [(when, other) for (same, other) in tables if same == system and (when := _since(other)) and when < (_since(table) or "")]
        for _, other in sorted(earlier):
            there = tables[system, other]
            shared = [metric for metric in row if metric in there]
            if len(shared) > 1 and all(row[metric].text == there[metric].text for metric in shared):
                told = " ".join(row[metric].text for metric in shared)
                yield Check("measured again", f"{', '.join(shared)} of {system} ({table})", told, f"as in {other}", "", REPEATED)
                break


def _since(table: str) -> str | None:
    return published.sources()[table.partition("/")[0]].since


def table(checks: Sequence[Check]) -> list[dict[str, str]]:
    """What to look at, a row each, and at the end what follows, a row per rule."""
    rows = [asdict(check) for check in checks if check.verdict != FOLLOWS]
    kept = Counter(check.rule for check in checks if check.verdict == FOLLOWS)
    tail = [{"rule": rule, "what": f"{count} number{'s' * (count > 1)}", "verdict": FOLLOWS} for rule, count in kept.items()]
    keys = ("verdict", *(name for name in Check.__dataclass_fields__ if name != "verdict"))
    return [{key: row.get(key, "") for key in keys} for row in (*rows, *tail)]


RULES: tuple[Callable[[Rows], Iterator[Check]], ...] = (totals_of_groups, totals_of_dimensions, comparisons, parts, noise, one_number, repeated)
