"""`rfbench profile`: how fast contenders stream, chunk by chunk, by one protocol.

    runs/profile/<name>/<hardware>/{run.json, rounds.jsonl}

Contenders are timed in turn, A B C, then C B A, then B C A and so on, each in a process of its own that stays alive: a
machine that gets slower or is disturbed does so for all of them, and two of them are compared within each round. With
`processes` all of that is done again by fresh processes. Each process warms up on two clips. `rfbench.timing` says what is
written down and what every number means, `rfbench.stopwatch` how a turn is timed.

A round is the unit of work: one that was cut short is timed again as a whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfbench import attention, baselines, hardware, length, provenance, records, statistics, strict, timing
from rfbench.baselines import TOLD, Prepared
from rfbench.config import Baseline
from rfbench.errors import UserError
from rfbench.progress import Progress
from rfbench.records import RANDOM
from rfbench.settings import settings
from rfbench.stopwatch import Worker, possible, refuse_short
from rfbench.timing import TIMINGS, Round


def profile(
    words: Sequence[str],
    *,
    name: str | None = None,
    compare: bool = False,
    chunks: int,
    repeats: int,
    processes: int = 1,
    random_weights: bool = False,
    fresh: bool = False,
) -> Path:
    """Time one baseline or several in turn; `words` are names, each followed by the `KEY=VALUE` fields that are set for it.

    Returns:
        the run directory, whose `document` has every number.

    Raises:
        UserError: a baseline cannot be used, too few chunks for a steady state, or `compare` without exactly two baselines.
    """
    asked = grouped(words)
    if compare and len(asked) != 2:
        raise UserError(
            f"--compare takes two baselines and {len(asked)} {'is' if len(asked) == 1 else 'are'} named; name A and B: profile A B --compare"
        )
    ready = [baselines.prepare(baseline, fields, random_weights=random_weights) for baseline, fields in asked]
    if len(ready) > 1:  # what tells them apart may be their fields alone
        ready = [dataclasses.replace(one, name=" ".join((one.name, *fields))) for one, (_, fields) in zip(ready, asked, strict=True)]
    if len({one.name for one in ready}) < len(ready):
        raise UserError(f"'{ready[0].name}' would be timed against itself; set a field of one of them, such as sampler.cache.window=12")
    called = "+".join(one.name.partition(" ")[0].replace("/", "-") for one in ready) if len(ready) > 1 else ready[0].name
    return in_turn(name or called, ready, chunks=chunks, repeats=repeats, processes=processes, fresh=fresh)


def grouped(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Baselines with their fields: `A x=1 B` is A with x=1, and B.

    Raises:
        UserError: a field before the first baseline.
    """
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if "=" not in word:
            found.append((word, []))
        elif found:
            found[-1][1].append(word)
        else:
            raise UserError(f"'{word}' is set for no baseline; write it after the name of the baseline that it is for")
    return found


def in_turn(
    name: str,
    ready: Sequence[Prepared],
    *,
    chunks: int,
    repeats: int,
    processes: int = 1,
    timed_as: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> Path:
    """Time contenders in `repeats` rounds by each of `processes` sets of processes.

    A bidirectional model has no chunks, so of it only whole clips are timed. A model that cannot make `chunks` chunks is
    timed over as many as it can, which is recorded. `timed_as` names contenders that were left out because they differ
    from a timed one in their weights alone.

    Raises:
        UserError: too few chunks for a steady state, or a contender that cannot be loaded.
    """
    for one in ready:
        refuse_short(one, chunks)
    device = baselines.device()
    machine = hardware.name(device)
    directory = settings().runs / "profile" / name / machine
    inputs = {"contenders": {one.name: one.inputs() for one in ready}, "chunks": chunks, "repeats": repeats, "processes": processes}
    inputs |= {"settings": hardware.timed_by()}
    with provenance.session(directory, "profile", f"{name}/{machine}", inputs, fresh=fresh) as run:
        path = directory / "rounds.jsonl"
        if run.done and not path.exists():
            run.reopen()
        if not run.done:
            run.record(device=str(device), attention=attention.kernel(device), software=hardware.software(device), timed_as=dict(timed_as or {}))
            if origin := {one.name: one.origin["commits"] for one in ready if one.origin}:
                run.record(commits=origin)
            before = hardware.state(device)
            there = {(done.process, done.number) for done in timing.read_rounds(directory)}
            missing = {process: [n for n in range(repeats) if (process, n) not in there] for process in range(processes)}
            with Progress(run.run.name, processes * repeats, done=len(there)) as progress, records.appending(path) as append:
                for process, numbers in missing.items():
                    if not numbers:
                        continue
                    with contextlib.ExitStack() as stack:
                        workers = {one.name: stack.enter_context(Worker(one, possible(one, chunks))) for one in ready}
                        run.record(contenders={name: worker.about for name, worker in workers.items()})
                        for number in numbers:
                            append(take_round(workers, process, number, process * repeats + number))
                            progress.advance()
                        run.record(contenders={name: worker.told() for name, worker in workers.items()})
            run.record(hardware=[*run.run.recorded.get("hardware", []), {"before": before, "after": hardware.state(device)}])
            run.result.update(timings=summary(timing.read_rounds(directory), run.run.name), rounds_sha256=records.sha256_of(path))
    return directory


def take_round(workers: Mapping[str, Worker], process: int, number: int, place: int) -> Round:
    """Ask each contender for one turn; `place` of the round among all rounds says who begins."""
    return Round(process, number, tuple(workers[name].turn(number) for name in timing.order(list(workers), place)))


def same_speed(cfg: Baseline) -> str:
    """Equal for contenders that differ in nothing but weights and what is said about them: what they compute takes the same time."""
    return records.canonical({key: value for key, value in strict.as_plain(cfg).items() if key not in TOLD})


def summary(rounds: Sequence[Round], run: str) -> dict[str, dict[str, dict[str, float]]]:
    """Contender -> metric -> median, least, most and number: over processes, or over the rounds of the only one."""
    return {
        name: {metric: dataclasses.asdict(timing.spread(column)) for metric, column in columns.items()}
        for name, columns in timing.values(rounds, run).items()
    }


def ratios(rounds: Sequence[Round], better: str, than: str) -> dict[str, statistics.Ratio]:
    """How many times as good `better` is, metric by metric: a ratio above 1 is in its favour, whichever direction is better.

    Metrics that one of the two does not have, or that are 0 in some round, have no ratio.
    """
    columns = timing.values(rounds, "")
    found = {}
    for metric in TIMINGS:
        with contextlib.suppress(KeyError, ValueError):
            found[metric] = timing.compared(columns[better][metric], columns[than][metric], TIMINGS[metric].metric.higher_is_better)
    return found


def document(directory: Path, compare: bool = False) -> dict[str, Any]:
    """A finished profile as one JSON document; with `compare` also the ratios of the first contender named to the second."""
    run = records.read_run(directory)
    found: dict[str, Any] = {"name": run.name, "status": run.status, "fingerprint": run.fingerprint, "seconds": run.seconds}
    found |= {"asked": {key: run.inputs[key] for key in ("chunks", "repeats", "processes")}}
    found |= {"recorded": run.recorded, "timings": run.result["timings"]}
    rounds = timing.read_rounds(directory)
    own = {name: [turn for each in rounds for turn in each.turns if turn.contender == name] for name in found["timings"]}
    lines = {name: length.trends(turns) for name, turns in own.items()}
    found["length"] = {name: {what: dataclasses.asdict(line) for what, line in both.items()} for name, both in lines.items()}
    if compare:
        better, than = (turn.contender for turn in rounds[0].turns)  # the first round goes in the order of the request
        told = {metric: dataclasses.asdict(ratio) for metric, ratio in ratios(rounds, better, than).items()}
        found["compare"] = {"better": better, "than": than, "ratios": told}
    return found


def table(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """The main numbers of a document as rows for people: what each counts, median and range of every contender, the ratio where two are compared."""
    labels = {name: name + _marks(document["recorded"]["contenders"][name]) for name in document["timings"]}
    rows = []
    for metric, definition in TIMINGS.items():
        scale = 1e-6 if definition.metric.unit == "bytes" else 1.0
        cells = {name: columns.get(metric) for name, columns in document["timings"].items()}
        if not definition.counts or not any(cells.values()):
            continue
        row = {"": f"{metric.replace('_bytes', '_MB')}", "what counts": definition.counts}
        for name, found in cells.items():
            row[labels[name]] = f"{scale * found['median']:.4g} [{scale * found['low']:.4g}, {scale * found['high']:.4g}]" if found else ""
        if "compare" in document:
            ratio = document["compare"]["ratios"].get(metric)
            row["times as good"] = "" if ratio is None else f"{ratio['value']:.3f} {_interval(ratio)}"
        rows.append(row)
    for what, unit, scale in (("seconds", "ms", 1e3), ("bytes", "MB", 1e-6)):
        lines = {name: lines[what] for name, lines in document["length"].items() if what in lines}
        if lines:
            row = {"": f"{unit} per {length.MORE}", "what counts": f"more for a chunk, {length.MORE} chunks later"}
            row |= {labels[name]: _rise(lines[name], scale) if name in lines else "" for name in labels}
            rows.append(row | ({"times as good": ""} if "compare" in document else {}))
    return rows


def _rise(line: Mapping[str, Any], scale: float) -> str:
    """A trend with its interval."""
    interval = f"({line['why']})" if line["low"] is None else f"[{scale * line['low']:+.2g}, {scale * line['high']:+.2g}]"
    return f"{scale * line['more']:+.2g} {interval}"


def _marks(about: Mapping[str, Any]) -> str:
    """What a reader of a contender's numbers has to know beside its name."""
    found = [*(["random weights"] if about["weights_sha256"] == RANDOM else []), *about.get("approximate", ())]
    return f" ({', '.join(found)})" if found else ""


def _interval(ratio: Mapping[str, Any]) -> str:
    return f"({ratio['why']})" if ratio["low"] is None else f"[{ratio['low']:.3f}, {ratio['high']:.3f}]"
