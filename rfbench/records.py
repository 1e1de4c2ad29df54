"""What the tool writes: Run, Clip and Score rows, and the only functions that put them on disk.

Standard library only, so that a scorer in another interpreter can import it. Files are contracts:

    <run>/run.json              one Run; rewritten whole (temporary file, fsync, rename)
    <run>/clips.jsonl           one Clip per line, appended after the video's own rename
    <run>/clips.1of4.jsonl      the same by the writer of a shard; `read_clips` puts them together
    <run>/videos/<clip id>.mp4
    <run>/.seen.json            which videos were found to be those of their rows; may be lost
    <run>/rounds.jsonl          profile runs: one `rfbench.timing.Round` per line
    <run>/scores/<scorer>.jsonl one Score per line; <scorer>.json says with what and over which clips, <scorer>.ledger.jsonl keeps answers

A file appears under its final name only when it is complete. A torn last line of a .jsonl file is what a killed writer
leaves behind: it is dropped on read and cut off before the next append.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from rfbench.errors import UserError

SCHEMA = 1
RUNNING, DONE, FAILED = "running", "done", "failed"
IMPORTED = "imported"  # stands for the sha256 of weights of videos that were made elsewhere
RANDOM = "random"  # stands for the sha256 of weights that were drawn and not loaded
BLOCK = 2**18  # bytes that are read at a time


@dataclass(frozen=True)
class Run:
    """What was asked (`inputs`, hashed to `fingerprint`), on what and by which code (`recorded`, not hashed), how it ended."""

    verb: str  # train | generate | eval | profile | ladder
    name: str  # what the directory is called after, e.g. "toy/reward-forcing" or "reward-forcing/toy-short"
    inputs: dict[str, Any]
    fingerprint: str
    recorded: dict[str, Any]
    status: str = RUNNING
    started: str = ""  # UTC, ISO 8601
    ended: str | None = None
    seconds: float = 0.0  # wall time over all the sessions that worked on it
    error: str | None = None
    result: dict[str, Any] = field(default_factory=dict)  # a few headline numbers of the verb
    schema: int = SCHEMA


@dataclass(frozen=True)
class Clip:
    """One finished video. `prompt` is what is scored; `generated_from` what the model was given."""

    id: str  # "<prompt number>-<sample>", e.g. "0007-1"
    prompt_id: int
    sample: int
    prompt: str
    generated_from: str
    seed: int  # of this clip's torch.Generator
    frames: int
    fps: int
    height: int
    width: int
    file: str  # relative to the run directory
    sha256: str


@dataclass(frozen=True)
class Score:
    """One number: a metric of one clip, or of one segment of it (`segment` counts from 0)."""

    clip: str
    metric: str
    value: float
    segment: int | None = None


Row = TypeVar("Row")


def run_name(name: str | None) -> str | None:
    """A name that a user gives to runs; it may have parts between slashes.

    Raises:
        UserError: its directory would lie elsewhere.
    """
    if name is not None and not re.fullmatch(r"\w[\w.+@=,-]*(/\w[\w.+@=,-]*)*", name, re.ASCII):
        raise UserError(
            f"a run cannot be called '{name[:80]}', which becomes a directory: use letters, digits and . + @ = , - _ in parts between slashes"
        )
    return name


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes, in blocks: `hashlib.file_digest` zeroes a large buffer first, which doubles the time of a small video."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Identity of declared inputs: sha256 of their canonical JSON."""
    return hashlib.sha256(canonical(inputs).encode()).hexdigest()


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the same directory that becomes `path` if the block succeeds and vanishes if it doesn't.

    Raises:
        UserError: the disk is full or not writable (code 1); nothing of `path` was touched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _writable(path):
            yield temporary
            temporary.chmod(0o644)  # after the writing: a library may have put a file of its own in place
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_unwritable(path: Path, asked: str) -> None:
    """See, before there is work for it, that a file can be written at a path; nothing is left there, and no folder made.

    Raises:
        UserError: it cannot; names what was `asked` for.
    """
    if path.is_dir():
        raise UserError(f"{asked}: it is a directory; name another place")
    try:
        with tempfile.TemporaryFile(dir=next(parent for parent in path.absolute().parents if parent.exists())):
            pass
    except OSError as error:
        raise UserError(f"{asked}: no file can be written there ({os.strerror(error.errno or 0).lower()}); name another place") from None


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole; a dataclass is written as its fields."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    write_text(path, json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it and run the command that wrote it again") from None


def read_run(directory: Path) -> Run:
    """The Run of a directory.

    Raises:
        UserError: no run.json, or one of another schema.
    """
    path = directory / "run.json"
    if not path.exists():
        raise UserError(f"{directory} is not a run: it has no run.json")
    return from_fields(Run, read_json(path), where=str(path))


def write_run(directory: Path, run: Run) -> None:
    """Replace the Run of a directory."""
    write_json(directory / "run.json", run)


def from_fields(kind: Callable[..., Row], value: Any, *, where: str) -> Row:
    """Build a row dataclass from parsed JSON; exactly its fields, or a UserError that names `where`."""
    try:
        return kind(**value)
    except TypeError as error:
        raise _other(kind, where, error) from None


def _other(kind: Callable[..., Any], where: str, error: TypeError) -> UserError:
    return UserError(f"{where}: not a {getattr(kind, '__name__', kind)} of schema {SCHEMA} ({error})")


def each_row(path: Path, kind: Callable[..., Row]) -> Iterator[Row]:
    """The complete rows of a .jsonl file, one after another; none when there is no file. A torn last line is left out.

    Raises:
        UserError: a line that is not the last is broken, i.e. the file was edited or damaged.
    """
    if not path.exists():
        return
    decode = json.JSONDecoder().raw_decode  # a third of the time of json.loads, which looks for encodings and spaces first
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn
            try:
                text = line.decode()
                value, end = decode(text)
                if text[end:] != "\n":
                    value = json.loads(text)
            except ValueError:
                raise UserError(f"{path} line {number} is damaged; delete the file and run the command that wrote it again") from None
            try:
                row = kind(**value)
            except TypeError as error:
                raise _other(kind, f"{path} line {number}", error) from None
            yield row


def read_rows(path: Path, kind: Callable[..., Row]) -> list[Row]:
    """All of `each_row`."""
    return list(each_row(path, kind))


def read_clips(directory: Path) -> list[Clip]:
    """The clips of a generate run by prompt and sample, whoever wrote their rows: the one place where shards come together.

    Raises:
        UserError: a damaged file, or two rows that say different things of one clip.
    """
    found: dict[str, Clip] = {}
    for path in clip_files(directory):
        for clip in each_row(path, Clip):
            if (first := found.setdefault(clip.id, clip)) is not clip and first != clip:
                raise UserError(f"{directory} has two different rows for clip {clip.id}; run `rfbench generate` for it again, without --shard")
    return sorted(found.values(), key=lambda clip: (clip.prompt_id, clip.sample))


@contextlib.contextmanager
def checking(directory: Path) -> Iterator[Callable[[Clip], bool]]:
    """A function that tells whether a clip's video is the one that its row tells of.

    A video is read once; after that its size and times tell, which `<run>/.seen.json` remembers. Two who write that at once may
    forget each other's entries, which costs time and no truth; scorers read every byte that they judge.
    """
    store, root = directory / ".seen.json", str(directory)
    try:
        known = json.loads(store.read_bytes())
    except (OSError, ValueError):
        known = {}
    new: dict[str, str] = {}

    def is_whole(clip: Clip) -> bool:
        try:
            about = os.stat(f"{root}/{clip.file}")
            mark = f"{clip.sha256} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
            if known.get(clip.file) != mark:
                if sha256_of(directory / clip.file) != clip.sha256:
                    return False
                new[clip.file] = mark
        except OSError:
            return False
        return True

    yield is_whole
    if new:
        with contextlib.suppress(UserError):
            write_text(store, canonical(known | new))


def intact(directory: Path, clips: Iterable[Clip]) -> list[Clip]:
    """The clips whose video is the one that their row tells of, see `checking`."""
    with checking(directory) as is_whole:
        return [clip for clip in clips if is_whole(clip)]


def clips_sha256(clips: Iterable[Clip]) -> str:
    """Identity of a set of videos: which bytes under which clip id."""
    return hashlib.sha256(canonical([[clip.id, clip.sha256] for clip in clips]).encode()).hexdigest()


def clip_files(directory: Path) -> list[Path]:
    """The files that hold clip rows: that of a lone writer and those of shards."""
    return sorted(directory.glob("clips*.jsonl"))


@contextlib.contextmanager
def appending(path: Path) -> Iterator[Callable[[Any], None]]:
    """A function that appends one row (a dataclass or a mapping) as one flushed line; a torn tail is cut off first."""
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+")

    def append(row: Any) -> None:
        line = _line(row).encode()
        with _writable(path):
            file.write(line)
            file.flush()

    try:
        with _writable(path):
            _cut_torn_tail(file)
        yield append
        with _writable(path):
            os.fsync(file.fileno())
    finally:
        with _writable(path):  # what did not fit is tried once more
            file.close()


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    """What fails in the block is a disk that is full or not writable."""
    try:
        yield
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}; free space or fix permissions, then run it again", code=1) from error


def _cut_torn_tail(file: IO[bytes]) -> None:
    end = size = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - BLOCK)
        file.seek(begin)
        if (last := file.read(end - begin).rfind(b"\n")) >= 0:
            end = begin + last + 1
            break
        end = begin
    if end < size:
        file.truncate(end)
    file.seek(0, os.SEEK_END)


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Replace a .jsonl file as a whole."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, rows))


def _line(row: Any) -> str:
    """A dataclass or a mapping as a line of a .jsonl file."""
    return json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_fields) + "\n"


def _fields(row: Any) -> dict[str, Any]:
    return {item.name: getattr(row, item.name) for item in dataclasses.fields(row)}
