"""Evidence records: a run and its scores in one small file to commit, without videos, paths or names of machines.

    reports/records/<baseline>/<suite>.json           a generate run: the hash of every clip, every score
    reports/records/profile/<name>/<hardware>.json    a profile run: every round
    reports/records/train/<name>.json                 a train run: its log

A record says all that its run says apart from the videos: the tables of a report come out of either, byte for byte. It has
one text only (`text`) and ends with the sha256 of its content, so that no byte of it can change unseen.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from rfbench import records
from rfbench.errors import UserError
from rfbench.records import Clip, Run, fingerprint
from rfbench.suites import clip_id

SCHEMA = 1
KINDS = {"generate": "", "profile": "profile/", "train": "train/"}  # verb -> folder of its records
RECORDED = (  # of what a run recorded, what its record keeps
    *("code", "packages", "machine", "device", "threads", "attention", "continued_on"),
    *("baseline", "trained_by", "weights", "timed_as"),
)
VIDEO = ("sha256", "seed", "frames", "fps", "height", "width")  # of a clip; the rest follows from its id and the suite
BROKEN = 4  # levels of a record that are written one entry per line
PRIVATE = re.compile(r"(?:^|[\s\"'=:(])/[\w.+-]+/[\w.+-]|\b(?:hf|ghp|sk)_[A-Za-z0-9]{16,}")  # a path of some disk, or a token


@dataclass(frozen=True)
class Record:
    """What is left of a run. Of `clips`, `scores`, `rounds` and `log` it has those of its verb."""

    run: Run
    clips: tuple[Clip, ...] = ()
    scores: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rounds: Sequence[Mapping[str, Any]] = ()
    log: Mapping[str, Sequence[float | None]] = dataclasses.field(default_factory=dict)


def is_record(path: Path) -> bool:
    """Whether a path is a record's and not a run directory's."""
    return path.suffix == ".json"


def place(run: Run) -> str:
    """Where a run's record lies below reports/records."""
    return f"{KINDS[run.verb]}{run.name}.json"


def text(content: Mapping[str, Any]) -> str:
    """The one text of a record's or a manifest's content, closed by its sha256; `sha256` in it is made anew."""
    plain = {key: value for key, value in content.items() if key != "sha256"}
    return _lines(plain | {"sha256": fingerprint(plain)}, 0) + "\n"


def _lines(value: Any, depth: int) -> str:
    """JSON with an entry per line where that helps a diff, and all of it on one line below."""
    inside = isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping))
    if not inside or not value or depth >= BROKEN:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    indent = "\n" + " " * (depth + 1)
    if isinstance(value, Mapping):
        entries = [f"{json.dumps(key, ensure_ascii=False)}: {_lines(item, depth + 1)}" for key, item in value.items()]
        begin, end = "{}"
    else:
        entries = [_lines(item, BROKEN) for item in value]
        begin, end = "[]"
    return begin + indent + f",{indent}".join(entries) + indent[:-1] + end


def parse(path: Path, schema: int) -> dict[str, Any]:
    """The content of a record or manifest that is spelled as `text` spells it.

    Raises:
        UserError: not JSON, of another schema, or altered.
    """
    try:
        written = path.read_text(encoding="utf-8")
        content = json.loads(written)
        plain = isinstance(content, dict) and content.get("schema")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it from the last commit, or write it again: rfbench report --record") from None
    if plain != schema:
        raise UserError(f"{path} has schema {plain!r}, this version reads {schema}; write it again from its runs: rfbench report --record")
    if written != _spelled(content):
        raise UserError(f"{path} was altered: its sha256 is not that of its content; restore it from the last commit, or record its run again")
    return dict(content)


def _spelled(content: Mapping[str, Any]) -> str | None:
    try:
        return text(content)
    except ValueError:  # NaN
        return None


def of_bench(run: Run, clips: Sequence[Clip], scored: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The record of a generate run. `scored`: scorer -> version, metrics, and clip values and segments by metric.

    Raises:
        UserError: its clips do not follow from its suite (code 1).
    """
    ids = [clip.id for clip in clips]
    columns: dict[str, Any] = {name: [getattr(clip, name) for clip in clips] for name in VIDEO}
    columns = {name: values[0] if name != "sha256" and len(set(values)) == 1 else values for name, values in columns.items()}
    scores: dict[str, Any] = {}
    for name, item in scored.items():
        lists = {key: {metric: [column.get(clip) for clip in ids] for metric, column in item[key].items()} for key in ("values", "segments")}
        scores[name] = {key: value for key, value in item.items() if key not in lists} | lists
    found = {"schema": SCHEMA, "run": plain_run(run), "clips": {"id": ids, **columns}, "scores": scores}
    if _clips(found, run.name) != tuple(clips):
        raise UserError(f"{run.name} cannot be recorded: its clips are not those that its suite asks for; generate it again", code=1)
    return found


def of_profile(run: Run, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record of a profile run from its rounds."""
    return {"schema": SCHEMA, "run": plain_run(run), "rounds": list(rounds)}


def of_training(run: Run, steps: Sequence[int], columns: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """The record of a train run from its log."""
    return {"schema": SCHEMA, "run": plain_run(run), "log": {"step": list(steps), **{name: list(column) for name, column in columns.items()}}}


def plain_run(run: Run) -> dict[str, Any]:
    """A Run as JSON without what belongs to one machine's disk.

    Raises:
        UserError: what it declares holds a path or a token, without which it would be another run (code 1).
    """
    found: dict[str, Any] = json.loads(records.canonical(without_paths(dataclasses.asdict(run))))
    found["recorded"] = {key: found["recorded"][key] for key in RECORDED if key in found["recorded"]}
    if fingerprint(found["inputs"]) != run.fingerprint:
        raise UserError(f"{run.name} cannot be recorded: its declared inputs hold a path of this machine; name files by relative paths", code=1)
    return found


def without_paths(value: Any) -> Any:
    """The same JSON with every absolute path cut down to its last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def read(path: Path) -> Record:
    """A record.

    Raises:
        UserError: altered, of another schema, incomplete, or of a run that was not what it says.
    """
    content = parse(path, SCHEMA)
    run = records.from_fields(Run, content.get("run"), where=str(path)) if isinstance(content.get("run"), dict) else None
    kept = {"generate": {"clips", "scores"}, "profile": {"rounds"}, "train": {"log"}}.get(run.verb if run else "", set())
    if run is None or not kept or set(content) != {"schema", "run", "sha256", *kept}:
        raise UserError(f"{path} is not a record: it has {', '.join(content)}; write it again from its run: rfbench report --record")
    if fingerprint(run.inputs) != run.fingerprint:
        raise UserError(f"{path}: its declared inputs are not those of its fingerprint; restore it from the last commit, or record its run again")
    clips = _clips(content, str(path)) if "clips" in kept else ()
    return Record(run, clips, content.get("scores", {}), content.get("rounds", ()), content.get("log", {}))


def _clips(content: Mapping[str, Any], where: str) -> tuple[Clip, ...]:
    """The clip rows that a record's columns stand for."""
    columns, suite = content["clips"], content["run"]["inputs"]["suite"]
    ids = columns.get("id", [])
    prompts = {prompt["id"]: prompt for prompt in suite.get("prompts", ())}
    whole = {name: column if isinstance(column, list) else [column] * len(ids) for name, column in columns.items()}
    if set(columns) != {"id", *VIDEO} or any(len(column) != len(ids) for column in whole.values()):
        raise UserError(f"{where}: its clips do not have a value each of {', '.join(VIDEO)}; record its run again")
    found = []
    for number, name in enumerate(ids):
        prompt_id, _, sample = name.partition("-")
        if not (prompt_id.isdigit() and sample.isdigit() and int(prompt_id) in prompts and name == clip_id(int(prompt_id), int(sample))):
            raise UserError(f"{where}: clip '{name}' is none of its suite's; generate and record it again")
        prompt = prompts[int(prompt_id)]
        video = {name: column[number] for name, column in whole.items()}
        given = prompt.get("generate_from") or prompt["text"]
        video |= {"prompt_id": int(prompt_id), "sample": int(sample), "prompt": prompt["text"], "generated_from": given}
        found.append(Clip(**video, file=f"videos/{name}.mp4"))
    return tuple(found)


def private(content: Any, where: str = "") -> Iterator[str]:
    """Where a record holds a path of some disk or what looks like a token; what a prompt says is the suite's affair."""
    if isinstance(content, Mapping):
        for key, item in content.items():
            if key not in ("prompts", "sha256"):
                yield from private(item, f"{where}.{key}" if where else str(key))
    elif isinstance(content, list):
        for number, item in enumerate(content[:1] if content and isinstance(content[0], int | float) else content):
            yield from private(item, f"{where}[{number}]")
    elif isinstance(content, str) and PRIVATE.search(content):
        yield where
