"""`rfbench fetch`: what a baseline, a scorer or a suite needs from elsewhere, brought into the weights directory and checked.

    <weights>/<owner>/<repository>/<file>

A file comes from a mirror directory of the same layout if one is named, else from the hub's own cache on this machine, else from the hub.
A branch is looked up once: its commit is written beside the files (`.commits.json`), whatever else comes of it is of that commit, and runs record it.
It appears under its name when it is complete and right; until then it is `.<file>.<etag>.part`, from which the next call goes on
(hf_hub_download would start over). Lists of prompts come from GitHub, at a commit and by their sha256. HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE and HF_TOKEN mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.prompt import Confirm
from rich.table import Table

from rfbench import weight_files
from rfbench.errors import UserError
from rfbench.items import Item
from rfbench.progress import say
from rfbench.records import atomic, sha256_of, write_json
from rfbench.settings import settings
from rfbench.strict import as_plain

SHA256 = re.compile("[0-9a-f]{64}")
INDEX = "*.safetensors.index.json"
Told = tuple[str, int | None, str]  # by the hub of a file: path, size, ETag


@dataclass(frozen=True)
class Source:
    """A single file and where it is: in its place, elsewhere on this machine (`local`), or on the hub (`etag` tells its versions apart)."""

    item: Item
    size: int | None
    origin: str  # for people
    there: bool = False
    local: Path | None = None
    etag: str = ""

    @property
    def part(self) -> Path:
        """What has been downloaded of it so far."""
        return self.item.path.with_name(f".{self.item.path.name}.{self.etag[:16]}.part")

    @property
    def room(self) -> int:
        """Bytes of disk that it will take: a hard link takes none."""
        if self.there or (self.local is not None and self.local.stat().st_dev == _existing(self.item.path).stat().st_dev):
            return 0
        return (self.size or 0) - (self.part.stat().st_size if self.part.exists() else 0)


def fetch(items: Sequence[Item], *, mirror: Path | None = None, yes: bool = False, dry_run: bool = False) -> list[Path]:
    """Bring what is not in its place. Shows files, sizes, licences and origins first and asks, unless `yes`.

    Returns:
        where the items are; with `dry_run` where they would be.

    Raises:
        UserError: nobody can be asked. With code 1: it was declined; a file can't be had (offline, gated, gone, not in the mirror); the disk is
            too small; another process is fetching it; a connection broke; what came is not what was asked for.
    """
    items, sources, problems, commits = list(dict.fromkeys(items)), [], [], dict[tuple[str, str], str]()
    for item in items:
        try:
            sources += find(item, mirror, commits)
        except UserError as error:
            problems.append(error)
            sources.append(Source(item, item.bytes, "cannot be had"))
    _show(sources)
    if problems:
        raise problems[0]
    todo = [source for source in sources if not source.there]
    _refuse_full_disk(todo)
    if todo and not dry_run:
        if not yes:
            _ask()
        for source in todo:
            _bring(source)
            _pin(source.item)
    if not dry_run:
        for item in items:
            if item.tree:
                _list(item, sources)
            if item.several and not right(settings().weights / item.repo, item):
                raise UserError(f"{item.path}: each file is whole, but together they are not what is asked for: other size or sha256", code=1)
    return [item.path for item in items]


def _list(item: Item, sources: Sequence[Source]) -> None:
    """Write down what a folder consists of, now that it is all there."""
    folder = item.path.parent
    paths = sorted(source.item.path for source in sources if source.item.repo == item.repo)
    names = [path.relative_to(folder).as_posix() for path in paths if path.is_relative_to(folder)]
    write_json(folder / weight_files.WHOLE, names)


def right(root: Path, item: Item) -> list[Path]:
    """The files of an item below a directory with the layout of its repository, if all are there with the right size and hash."""
    path = root / item.file
    try:
        files = weight_files.files_of(path) if item.several else [path]
    except UserError:
        return []
    if not all(file.is_file() for file in files) or item.bytes not in (None, sum(file.stat().st_size for file in files)):
        return []
    return files if item.sha256 is None or weight_files.sha256_of(files) == item.sha256 else []


def find(item: Item, mirror: Path | None, commits: dict[tuple[str, str], str]) -> list[Source]:
    """Where the files of an item are to be had; of a branch those of one commit, which `commits` remembers by repository and branch.

    Raises:
        UserError: nowhere (code 1).
    """
    store = settings().weights / item.repo
    if files := right(store, item):
        return [Source(_single(item, store, file), file.stat().st_size, "in place", there=True) for file in files]
    if mirror is not None:
        found = _local(mirror / item.repo, item, "mirror")
        if not found:
            why = "is not the one that is asked for: wrong size or sha256" if (mirror / item.repo / item.file).exists() else "is not there"
            raise UserError(f"mirror: {mirror / item.repo / item.file} {why}; put the right one there or leave out --mirror", code=1)
        return _with_pin(found, mirror / item.repo, item)
    if item.github:
        return [Source(item, item.bytes, "GitHub", etag=item.sha256 or item.revision)]
    if not weight_files.COMMIT.fullmatch(item.revision):
        key = item.repo, item.revision
        commits[key] = commits.get(key) or _commit(item)
        item = replace(item, revision=commits[key], branch=item.revision)
    return ([] if item.tree else _in_cache(item)) or _on_hub(item)  # a folder in the cache may be a part of it


def _commit(item: Item) -> str:
    """The commit that files of a branch come from: that of those which are here, else of the hub's cache if it has the item, else the hub's.

    Raises:
        UserError: nobody can say (code 1).
    """
    from huggingface_hub import HfApi, get_token

    pin = weight_files.pins(settings().weights / item.repo).get(item.revision)
    cached = None if pin or item.tree else _cached(item)
    if cached is not None and _local(cached, item, ""):
        return cached.name
    try:
        with _explained(item):
            commit = str(HfApi(token=get_token()).model_info(item.repo, revision=item.revision).sha)
    except UserError:
        if pin is None:
            raise
        return pin.commit  # the download will say what is wrong
    if pin is not None and commit != pin.commit:
        here = settings().weights / item.repo
        say(f"{item.repo}: '{item.revision}' has moved on to {commit}; what is missing comes from {pin.commit}, as the rest (or remove {here})")
    return pin.commit if pin else commit


def _with_pin(found: list[Source], folder: Path, item: Item) -> list[Source]:
    """Files of a mirror, with the commit that it has them from.

    Raises:
        UserError: it is not the one that the others here are of (code 1).
    """
    there, here = (weight_files.pins(place).get(item.revision) for place in (folder, settings().weights / item.repo))
    if there is not None and here is not None and there.commit != here.commit:
        raise UserError(
            f"mirror: {folder} is of commit {there.commit[:12]}... of '{item.revision}', and what is in {settings().weights / item.repo} of "
            f"{here.commit[:12]}...; remove the latter, or leave out --mirror",
            code=1,
        )
    files = there.files if there is not None else ()
    return [
        replace(one, item=replace(one.item, revision=there.commit, branch=item.revision)) if there and one.item.file in files else one
        for one in found
    ]


def _pin(item: Item) -> None:
    """Write down the commit that a file of a branch has come from."""
    if item.branch is None:
        return
    folder = settings().weights / item.repo
    with _alone_in(folder):
        known = weight_files.pins(folder)
        before = known[item.branch].files if item.branch in known else ()
        known[item.branch] = weight_files.Pin(item.revision, tuple(sorted({*before, item.file})))
        write_json(folder / weight_files.PINS, as_plain(known))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait for others who write down what has come into a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _single(item: Item, root: Path, file: Path) -> Item:
    return replace(item, file=file.relative_to(root).as_posix(), bytes=None, sha256=None) if item.several else item


def _local(root: Path, item: Item, origin: str) -> list[Source]:
    if item.tree:
        folder = (root / item.file).parent
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (weight_files.WHOLE, weight_files.PINS))
        return [Source(_single(item, root, file), file.stat().st_size, origin, local=file.resolve()) for file in files]
    files = right(root, item)
    if item.several and files:
        files = [*sorted(files[0].parent.glob(INDEX)), *files]
    return [Source(_single(item, root, file), file.stat().st_size, origin, local=file.resolve()) for file in files]


def _in_cache(item: Item) -> list[Source]:
    """As other programs have left it on this machine, below HF_HOME."""
    root = _cached(item)
    return [] if root is None else _local(root, item, "hub's cache")


def _cached(item: Item) -> Path | None:
    """The folder of the hub's cache for a revision, called after its commit; of a branch, where it was when somebody last looked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(item.repo, revision=item.revision, allow_patterns=item.file, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _on_hub(item: Item) -> list[Source]:
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    told: list[Told]
    with _explained(item):
        if item.several:
            tree = HfApi(token=get_token()).list_repo_tree(item.repo, revision=item.revision, recursive=True)
            files = [file for file in tree if isinstance(file, RepoFile)]
            told = _matching(item, [(file.path, file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in files])
        else:
            about = get_hf_file_metadata(hf_hub_url(item.repo, item.file, revision=item.revision), token=get_token())
            told = [(item.file, item.bytes if about.size is None else about.size, about.etag or "")]
    if not told:
        raise UserError(
            f"{item.repo} at {item.revision} has no files {item.file}; look at {constants.ENDPOINT}/{item.repo}/tree/{item.revision}", code=1
        )
    found = []
    for file, size, etag in told:
        digest = etag if SHA256.fullmatch(etag) else None
        if not item.several and (item.bytes not in (None, size) or (digest and item.sha256 not in (None, digest))):
            raise UserError(f"{file} of {item.repo} is not the one that is asked for: it has {size} bytes and version {etag[:12]}...", code=1)
        single = replace(item, file=file, bytes=size, sha256=digest or (None if item.several else item.sha256))
        there = bool(right(settings().weights / item.repo, single))
        found.append(Source(single, size, "in place" if there else "hub", there=there, etag=etag))
    return found


def _matching(item: Item, told: list[Told]) -> list[Told]:
    """The files of a repository that `files_of` would take for a pattern or a folder; before them their index, which says what is missing."""
    asked = PurePosixPath(item.file)
    if item.tree:
        return [entry for entry in told if PurePosixPath(entry[0]).is_relative_to(asked.parent)]
    folders, pattern = ([asked.parent], asked.name) if "*" in asked.name else ([asked / "transformer", asked], "*.safetensors")
    for folder in folders:
        inside = [(PurePosixPath(entry[0]).name, entry) for entry in told if PurePosixPath(entry[0]).parent == folder]
        if any(fnmatchcase(name, pattern) for name, _ in inside):
            return [entry for sought in (INDEX, pattern) for name, entry in inside if fnmatchcase(name, sought)]
    return []


@contextlib.contextmanager
def _explained(item: Item) -> Iterator[None]:
    """What keeps the hub from giving a file, as one sentence."""
    from huggingface_hub import errors

    what = f"{item.file} of {item.repo}"
    http_error: Any = errors.HfHubHTTPError.__bases__[0]  # of the library's HTTP client, which changes between its versions
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise UserError(f"HF_HUB_OFFLINE is set, and {what} is not on this machine; unset it or name a --mirror", code=1) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{what} is gated: accept its terms at {item.host}/{item.repo}, log in with `hf auth login`, then run it again", code=1
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
        raise UserError(f"{item.host} has no {what} at {item.revision}, or not for everybody (`hf auth login`)", code=1) from None
    except (OSError, http_error) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{what} did not come from {item.host} ({problem}); the same command goes on from here", code=1) from None


def _bring(source: Source) -> None:
    target = source.item.path
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        _set_aside(target, target)
    if source.local is None:
        _download(source)
    else:
        _link(source.local, target)


def _download(source: Source) -> None:
    """Go on with what is there of it, check it, and only then give it its name."""
    from huggingface_hub import get_token
    from huggingface_hub.file_download import http_get

    item, target, token = source.item, source.item.path, None if source.item.github else get_token()
    with source.part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(file.fileno()), source.part.stat())  # not what was given its own name since it was opened here
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise UserError(f"another process is fetching {target}; wait for it, then run this again", code=1)
        if source.size is not None and file.tell() > source.size:
            file.seek(0)
            file.truncate()
        with _explained(item):
            headers = {"authorization": f"Bearer {token}"} if token else None
            http_get(item.url, file, resume_size=file.tell(), headers=headers, expected_size=source.size, displayed_filename=target.name)
        file.flush()
        os.fsync(file.fileno())
        digest = sha256_of(source.part)
        if item.sha256 is None:
            say(f"{target} has sha256 {digest}; nobody says what it should be")
        elif digest != item.sha256:
            aside = _set_aside(source.part, target)
            raise UserError(f"{target} came with sha256 {digest[:12]}... instead of {item.sha256[:12]}...; it is now {aside.name}", code=1)
        source.part.replace(target)
    for old in target.parent.glob(f".{target.name}.*.part"):  # of versions that the hub has no longer
        old.unlink()


def _link(local: Path, target: Path) -> None:
    """A hard link where both are on one disk, else a copy."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        os.link(local, temporary)
        temporary.replace(target)
    except OSError:
        with atomic(target) as copy:
            shutil.copyfile(local, copy)
    finally:
        temporary.unlink(missing_ok=True)


def _set_aside(path: Path, target: Path) -> Path:
    aside = target.with_name(f"{target.name}.wrong")
    path.replace(aside)
    say(f"{target} is not what was asked for and is kept as {aside.name}")
    return aside


def _existing(path: Path) -> Path:
    """The innermost directory around a path that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _refuse_full_disk(todo: Sequence[Source]) -> None:
    store, needed = settings().weights, sum(source.room for source in todo)
    free = shutil.disk_usage(_existing(store / "x")).free
    if needed > free:
        raise UserError(f"{store} has {_size(free)} free and this takes {_size(needed)}; free space or set paths.weights in rfbench.toml", code=1)


def _show(sources: Sequence[Source]) -> None:
    store, todo = settings().weights, [source for source in sources if not source.there]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("file", "size", "licence", "gated", "checked by", "from"):
        table.add_column(name, overflow="fold", justify="right" if name == "size" else "left")
    for source in sources:
        item = source.item
        gated, check = "yes" if item.gated else "no", "sha256" if item.sha256 else "size"
        table.add_row(f"{item.repo}/{item.file}", _size(source.size), item.licence, gated, check, source.origin)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    if sources:
        console.print(table)
    known = [source.size for source in todo if source.size is not None]
    unknown = f"{len(todo) - len(known)} of unknown size" if len(known) < len(todo) else ""
    sizes = " and ".join(filter(None, (_size(sum(known)) if known or not todo else "", unknown)))
    say(f"{len(todo)} of {len(sources)} files to fetch into {store}, {sizes}")


def _size(count: int | None) -> str:
    return "?" if count is None else decimal(count)


def _ask() -> None:
    if not sys.stdin.isatty():
        raise UserError("nobody is there to be asked whether to fetch this; add --yes")
    try:
        agreed = Confirm.ask("Fetch?", console=Console(stderr=True))
    except EOFError:
        agreed = False
    if not agreed:
        raise UserError("nothing was fetched", code=1)
