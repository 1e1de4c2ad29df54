"""A folder in an object store, or wherever else fsspec writes, in which a file appears as a whole."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfbench.errors import UserError

WHOLE = ("abfs", "abfss", "az", "gcs", "gs", "memory", "oss", "s3", "s3a")  # where a file that is written appears as a whole
RENAMING = ("file", "local", "sftp", "ssh")  # where it grows under its name, but a rename is whole and replaces what is there


@dataclass(frozen=True)
class Store:
    """A folder over there."""

    fs: Any
    root: str
    url: str  # as people know it
    renames: bool

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever keeps a store from its work, as one sentence."""
        try:
            yield
        except Exception as error:  # each store raises what its own library has
            why = (" ".join(str(error).split()) or type(error).__name__)[:200]
            raise UserError(f"{self.url} cannot be used ({why}); what was made here is kept, and the same command goes on", code=1) from error

    def names(self, pattern: str) -> list[str]:
        """What lies directly in it and matches."""
        with self._explained():
            try:
                found = self.fs.ls(self.root, detail=False)
            except FileNotFoundError:
                return []
        return sorted(name for path in found if re.fullmatch(pattern, name := path.rstrip("/").rpartition("/")[2]))

    def read(self, name: str) -> bytes | None:
        """A small file, if it is there."""
        with self._explained():
            try:
                return bytes(self.fs.cat_file(f"{self.root}/{name}"))
            except FileNotFoundError:
                return None

    def fetch(self, name: str, target: Path) -> bool:
        """Copy a file to here; whether it was there."""
        with self._explained():
            try:
                self.fs.get_file(f"{self.root}/{name}", str(target))
            except FileNotFoundError:
                return False
            return True

    def put(self, name: str, content: bytes | Path) -> None:
        """Under the name there is all of it or nothing, whenever this process ends."""
        with self._explained():
            folder, _, last = f"{self.root}/{name}".rpartition("/")
            place = f"{folder}/.{last}.tmp" if self.renames else f"{folder}/{last}"
            if self.renames:
                self.fs.makedirs(folder, exist_ok=True)
            if isinstance(content, bytes):
                self.fs.pipe_file(place, content)
            else:
                self.fs.put_file(str(content), place)
            if self.renames:
                self.fs.mv(place, f"{folder}/{last}")

    def remove(self, name: str) -> None:
        """A file, or without a name all."""
        with self._explained(), contextlib.suppress(FileNotFoundError):
            self.fs.rm(f"{self.root}/{name}".rstrip("/"), recursive=not name)


def open_store(url: str, below: str) -> Store:
    """A folder of the mirror.

    Raises:
        UserError: files do not appear there as a whole, or what it takes is not installed.
    """
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    if protocol not in WHOLE + RENAMING:
        known = ", ".join(sorted(WHOLE + RENAMING))
        raise UserError(f"paths.mirror is {url}, where nobody promises that files appear as a whole; name a place of one of these kinds: {known}")
    try:
        fs, root = url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UserError(f"paths.mirror is {url}, which cannot be used from here ({error}); install that, or name another place") from None
    return Store(fs, f"{root.rstrip('/')}/{below}", f"{url.rstrip('/')}/{below}", protocol in RENAMING)
