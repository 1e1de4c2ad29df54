"""A copy of every run in an object store, or wherever else fsspec writes (`[paths] mirror`): a machine that has nothing goes on from it.

    <mirror>/<run>/manifest.<writer>.json              run.json, and path -> sha256 of all else that a writer has finished
    <mirror>/<run>/videos/0001-0.<16 of sha256>.mp4    a file, under a name that its content has a part in

A store has no locks, appends or renames, so work happens on this machine's disk and whole files travel: what is over there comes before the work
begins, what is new goes every minute and at the end. Nothing but manifests is ever replaced, each by one write after all that it names, so whoever is
killed leaves what was there before. Every byte that comes is held to its sha256. A shard brings and sends what is its own, the same command without
--shard brings what is everybody's. Nothing is locked: two machines that make the same shard at once do its work twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from rfbench import records
from rfbench.errors import UserError
from rfbench.progress import say
from rfbench.records import Run
from rfbench.settings import settings
from rfbench.store import Store, open_store

EVERY_S = 60.0  # between two sendings: what a machine that is lost has made since is made again
AT_ONCE = 16  # transfers
SMALL = 2**22  # bytes of a file that is read at once
ALONE = "alone"  # the writer that is no shard
REMEMBERED = ".mirror.{}.json"  # in a run: the manifest of a writer, as it was when here and there were last the same
RUN, VIDEOS, SCORES = "run.json", "videos/", "scores/"
TALK = "work/"  # what other interpreters were last asked and print: nobody goes on from it


@dataclass(frozen=True)
class Manifest:
    """What a writer has finished."""

    files: dict[str, str] = field(default_factory=dict)  # path below the run -> sha256
    run: str | None = None  # its run.json, letter by letter

    @property
    def all(self) -> dict[str, str]:
        """With run.json, which comes last."""
        return self.files | ({} if self.run is None else {RUN: hashlib.sha256(self.run.encode()).hexdigest()})

    @property
    def names(self) -> set[str]:
        """What its files are called over there."""
        return {_name(path, sha256) for path, sha256 in self.files.items()}


@contextlib.contextmanager
def following(directory: Path, writer: str | None) -> Iterator[None]:
    """Bring what the mirror has of a directory that this process holds; then send what is new, every minute and at the end of the block.

    Raises:
        UserError: the mirror cannot be used; a file was changed here and there; with code 1: it cannot be reached, or what it has is damaged.
    """
    copy = _copy_of(directory, writer)
    if copy is None:
        yield
        return
    copy.bring()
    over = threading.Event()
    follower = threading.Thread(target=copy.follow, args=(over,), daemon=True)
    follower.start()
    try:
        yield
    except BaseException:
        over.set()
        follower.join()
        copy.try_to_send()
        raise
    over.set()
    follower.join()
    copy.send()


def bring(directory: Path) -> bool:
    """Bring a run that is not here, with its scores; whether there is one.

    Raises:
        UserError: as of `following`.
    """
    for folder in (directory, directory / SCORES):
        if copy := _copy_of(folder, None):
            copy.bring()
    return (directory / RUN).is_file()


def forget(directory: Path) -> None:
    """Remove a run from the mirror.

    Raises:
        UserError: the mirror cannot be used; with code 1: it cannot be reached.
    """
    if copy := _copy_of(directory, None):
        for name in copy.store.names(r"manifest\..*"):
            copy.store.remove(name)
        copy.store.remove("")


def _copy_of(directory: Path, writer: str | None) -> _Copy | None:
    """The copy of a directory; None if there is no mirror, or it is not below the runs."""
    url, runs, place = settings().mirror, settings().runs.resolve(), directory.resolve()
    if url is None or not place.is_relative_to(runs):
        return None
    return _Copy(open_store(url, place.relative_to(runs).as_posix()), directory, writer or ALONE)


class _Copy:
    """A run directory and its copy, as one writer has them."""

    def __init__(self, store: Store, directory: Path, writer: str) -> None:
        self.store, self.directory, self.writer = store, directory, writer
        self.sent = Manifest()  # this writer's, as it is over there
        self.there: set[str] = set()  # names over there that are known to be whole
        self.hashes: dict[Path, tuple[tuple[int, int, int], str]] = {}  # of a large file its size, time and inode, and its sha256

    def bring(self) -> None:
        """Bring what is over there and not here.

        Raises:
            UserError: a file was changed here and there; there is a run with other inputs. With code 1: a file over there is missing or damaged.
        """
        while True:
            manifests = self._manifests()
            damaged = {name for writer, manifest in manifests.items() for name in self._bring(writer, manifest)}
            if not damaged or manifests == self._manifests():
                break  # else a writer has replaced what was being read
        for name in sorted(damaged):
            if not name.startswith(VIDEOS):
                raise UserError(f"{self.store.url}/{name} is missing or not what was sent; restore it, or start over with --fresh", code=1)
            say(f"{self.store.url}/{name} is missing or not what was sent; its clip is made again")
        self.sent = manifests.get(self.writer, Manifest())
        self.there = set[str]().union(*(manifest.names for manifest in manifests.values())) - damaged
        for writer, manifest in manifests.items():
            if writer != self.writer and manifest.run is not None:
                self._unite(writer, manifest.run)

    def _manifests(self) -> dict[str, Manifest]:
        """Writer -> what it has finished: the shards, if this writer is none, and this writer."""
        shards = self.store.names(r"manifest\.\d+of\d+\.json") if self.writer == ALONE else []
        found = {}
        for name in (*shards, f"manifest.{self.writer}.json"):
            if (content := self.store.read(name)) is not None:
                found[name.split(".")[1]] = _parsed(content, f"{self.store.url}/{name}")
        return found

    def _bring(self, writer: str, manifest: Manifest) -> list[str]:
        """Bring what a manifest has and this disk has not, run.json last; -> the names of what is missing over there or damaged."""
        remembered = self.directory / REMEMBERED.format(writer)
        base = _parsed(remembered.read_bytes(), str(remembered)).all if remembered.exists() else {}
        files = [file for file in manifest.files.items() if self._is_wanted(*file, base)]
        last = manifest.run if writer == self.writer and RUN in manifest.all and self._is_wanted(RUN, manifest.all[RUN], base) else None
        if files:
            say(f"{len(files)} files come from {self.store.url}")
            if not remembered.exists():
                records.write_json(remembered, Manifest())  # tells a run that was half brought from files of somebody's
        damaged = [_name(*file) for file, whole in zip(files, _each(self._fetch, files), strict=True) if not whole]
        if last is not None and all(name.startswith(VIDEOS) for name in damaged):
            records.write_text(self.directory / RUN, last)
        if not damaged:
            records.write_json(remembered, manifest)
        return damaged

    def _is_wanted(self, path: str, sha256: str, base: dict[str, str]) -> bool:
        """Whether a file is not here, or was changed over there alone since both were as in `base`."""
        here = self.directory / path
        if not here.exists():
            return True
        if sha256 == base.get(path):
            return False  # what has been made of it here since is newer
        own = records.sha256_of(here)
        if own not in (sha256, base.get(path)):
            raise UserError(
                f"{here} was changed here and at {self.store.url} since they were the same; remove {self.directory} to go on from there, "
                "or give this run a --name of its own"
            )
        return own != sha256

    def _fetch(self, file: tuple[str, str]) -> bool:
        """Bring a file; whether it was there, and what it should be."""
        path, sha256 = file
        with contextlib.suppress(_DamagedError), records.atomic(self.directory / path) as temporary:
            if not self.store.fetch(_name(path, sha256), temporary) or records.sha256_of(temporary) != sha256:
                raise _DamagedError
            return True
        return False

    def _unite(self, writer: str, text: str) -> None:
        """Have run.json name the machines that another writer worked on.

        Raises:
            UserError: it worked on another run.
        """
        other = records.from_fields(Run, json.loads(text), where=f"{self.store.url}, {writer}")
        if not (self.directory / RUN).exists():
            records.write_text(self.directory / RUN, text)
        run = records.read_run(self.directory)
        if run.fingerprint != other.fingerprint:
            raise UserError(f"{self.store.url} has shard {writer} of a run with other inputs; add --fresh to replace all of it")
        kinds = ("code", "packages", "machine")
        known, theirs = (
            [{kind: place.get(kind) for kind in kinds} for place in (one.recorded, *one.recorded.get("continued_on", ()))] for one in (run, other)
        )
        if new := [place for place in theirs if place not in known]:
            places = [*run.recorded.get("continued_on", ()), *new]
            records.write_run(self.directory, dataclasses.replace(run, recorded=run.recorded | {"continued_on": places}))

    def follow(self, over: threading.Event) -> None:
        """Send what is new from time to time."""
        while not over.wait(EVERY_S):
            self.try_to_send()

    def try_to_send(self) -> None:
        """Send what is new, or say why not."""
        try:
            self.send()
        except UserError as error:
            say(str(error))

    def send(self) -> None:
        """Send what is new, its manifest last; then remove what the former one had and this one has not, but for videos, which others may name.

        Raises:
            UserError: the store does not take it (code 1).
        """
        found = self._files()
        run = found.pop(RUN, None)
        manifest = Manifest({path: sha256 for path, (sha256, _) in found.items()}, run and str(run[1], "utf-8"))
        if manifest == self.sent:
            return
        new = {name: content for path, (sha256, content) in found.items() if (name := _name(path, sha256)) not in self.there}
        _each(lambda item: self.store.put(*item), new.items())
        for path in [path for path, (sha256, _) in found.items() if _name(path, sha256) in new and not self._is_still(path, sha256)]:
            self.store.remove(name := _name(path, manifest.files.pop(path)))  # it came to be something else on the way
            del new[name]
            manifest.files.update({path: self.sent.files[path]} if path in self.sent.files else {})
        self.store.put(f"manifest.{self.writer}.json", records.canonical(dataclasses.asdict(manifest)).encode())
        records.write_json(self.directory / REMEMBERED.format(self.writer), manifest)
        old = {name for name in self.sent.names - manifest.names if not name.startswith(VIDEOS)}
        self.sent, self.there = manifest, (self.there | new.keys()) - old
        _each(self.store.remove, old)

    def _files(self) -> dict[str, tuple[str, Any]]:
        """Path -> sha256 and content of what is finished: a file, or its bytes. Of the videos those that this writer's rows tell of."""
        while True:
            with contextlib.suppress(FileNotFoundError):  # somebody removed what had just been listed
                found = {name: self._content(path) for name, path in self._own()}
                break
        _, rows = found.get("clips.jsonl" if self.writer == ALONE else f"clips.{self.writer}.jsonl", ("", b""))
        for clip in map(json.loads, bytes(rows).splitlines()):
            if _is_below(clip["file"]) and (self.directory / clip["file"]).is_file():
                found[clip["file"]] = clip["sha256"], self.directory / clip["file"]
        return found

    def _own(self) -> Iterator[tuple[str, Path]]:
        """The files of a directory, but for videos, what has a copy of its own, what is not finished, and what is another writer's."""
        for path in self.directory.rglob("*"):
            name = path.relative_to(self.directory).as_posix()
            writer = re.search(r"\.(\d+of\d+)\.", path.name)
            if name.startswith((VIDEOS, SCORES, TALK)) or "/." in f"/{name}" or (writer and writer[1] != self.writer) or not path.is_file():
                continue
            yield name, path

    def _content(self, path: Path) -> tuple[str, bytes | Path]:
        about = path.stat()
        if path.suffix == ".jsonl" or about.st_size <= SMALL:
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1] if path.suffix == ".jsonl" else content  # somebody may be writing the last line
            return hashlib.sha256(whole).hexdigest(), whole
        mark = (about.st_size, about.st_mtime_ns, about.st_ino)
        if self.hashes.get(path, (None,))[0] != mark:
            self.hashes[path] = mark, records.sha256_of(path)
        return self.hashes[path][1], path

    def _is_still(self, path: str, sha256: str) -> bool:
        """Whether a file that was read as a stream was the same all the while; videos are, and what was read at once."""
        about = self.hashes.get(self.directory / path)
        with contextlib.suppress(FileNotFoundError):
            return about is None or about[1] != sha256 or self._content(self.directory / path)[0] == sha256
        return False


class _DamagedError(Exception):
    """What came is not what was sent."""


def _name(path: str, sha256: str) -> str:
    """What a file is called over there."""
    whole = PurePosixPath(path)
    return str(whole.with_name(f"{whole.stem}.{sha256[:16]}{whole.suffix}"))


def _is_below(path: str) -> bool:
    """Whether it is a path of something below a directory that is not hidden there."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not any(part.startswith((".", "/")) for part in parts)


def _parsed(content: bytes, where: str) -> Manifest:
    """A manifest, whose files lie in the run, and whose run is one as far as JSON goes.

    Raises:
        UserError: it is not one (code 1).
    """
    try:
        found = Manifest(**json.loads(content))
        right = all(_is_below(path) and re.fullmatch(r"[0-9a-f]{64}", sha256) for path, sha256 in found.files.items())
        right = right and (found.run is None or isinstance(json.loads(found.run), dict))
    except (ValueError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        raise UserError(f"{where} is damaged; restore it, or start over with --fresh", code=1)
    return found


def _each(do: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Several transfers at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(do, items))
