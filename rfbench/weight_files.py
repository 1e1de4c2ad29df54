"""Which files the weights of somebody are, where they lie and whether they are the right ones; without torch, which need not be there to ask.

A checkpoint is a file, a folder or a pattern; `rfbench.weights` reads what is in it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfbench import records, strict
from rfbench.config import LoraCfg, WeightsCfg
from rfbench.errors import UserError
from rfbench.settings import settings

RUN = "run:"  # WeightsCfg.file "run:NAME" is what the training run NAME ended with
LARGE = 64 * 2**20  # bytes; the hash of a smaller file takes no longer than looking it up
HASHES = ".sha256.json"  # in the weights directory: path -> [size, time of modification, sha256]
WHOLE = ".whole.json"  # in a folder that is taken as it is ("folder/**"): the files that it consists of
PINS = ".commits.json"  # in a repository's folder: branch -> the commit that it was found at, and the files that came from there
COMMIT = re.compile("[0-9a-f]{40}")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


@dataclass(frozen=True)
class Pin:
    """Where a branch was when the first file of it was fetched; further files come from there as well."""

    commit: str
    files: tuple[str, ...]


def pins(folder: Path) -> dict[str, Pin]:
    """Of a repository's folder: branch -> its pin.

    Raises:
        UserError: what is written there is no such thing.
    """
    path = folder / PINS
    found: dict[str, Pin] = strict.build(dict[str, Pin], records.read_json(path), where=str(path)) if path.exists() else {}
    return found


def commit_of(cfg: WeightsCfg, path: Path) -> str | None:
    """The commit of its repository that a checkpoint is from: as its YAML file says, else as `fetch` found it; None where nobody knows."""
    folder = stored(cfg)
    if cfg.repo is None or not path.is_relative_to(folder):
        return None
    if cfg.revision is not None and COMMIT.fullmatch(cfg.revision):
        return cfg.revision
    pin = pins(folder).get(cfg.revision or "main")
    files = {file.relative_to(folder).as_posix() for file in files_of(path)}
    return pin.commit if pin is not None and files <= set(pin.files) else None


def commits(files: Mapping[str, tuple[WeightsCfg, Path]]) -> dict[str, dict[str, str | None]]:
    """What a run records of where its checkpoints are from, by role: `commit_of` each that has a repository; nothing where none has."""
    found = {role: commit_of(cfg, path) for role, (cfg, path) in files.items() if cfg.repo is not None}
    return {"commits": found} if found else {}


def resolve(cfg: WeightsCfg, beside: Path) -> Path:
    """The checkpoint that `cfg` names: a training run's result, beside the YAML file that names it, or in the weights directory.

    Raises:
        UserError: there is no such checkpoint, a shard or the adapter is missing, or its size or sha256 is another.
    """
    if cfg.file.startswith(RUN):
        name = cfg.file.removeprefix(RUN)
        path = settings().runs / "train" / name / "weights.safetensors"
        if not path.exists():
            raise UserError(f"weights '{cfg.file}': training run '{name}' has not finished; run `rfbench train` for it first")
    else:
        places = [beside.parent / cfg.file, stored(cfg) / cfg.file]
        found = [place for place in places if _exists(place)]
        if not found:
            source = "" if cfg.repo is None else f"; `rfbench fetch` brings it from https://huggingface.co/{cfg.repo}/tree/{cfg.revision or 'main'}"
            raise UserError(f"weights '{cfg.file}', named by {beside.name}, are neither beside that file nor in {stored(cfg)}{source}")
        path = found[0]
    _check(path, files_of(path), cfg, beside)
    if cfg.lora is not None:
        adapter = adapter_of(path, cfg)
        if not adapter.is_file():
            raise UserError(f"adapter '{cfg.lora.file}', named by {beside.name}, is not at {adapter}; it comes with '{cfg.file}'")
        _check(adapter, [adapter], cfg.lora, beside)
    return path


def _exists(place: Path) -> bool:
    """Whether there is something of a checkpoint, whole or not."""
    if place.name == "**":
        return (place.parent / WHOLE).is_file()
    return place.exists() or ("*" in place.name and any(place.parent.glob(place.name)))


def stored(cfg: WeightsCfg) -> Path:
    """The folder that a checkpoint's `file` is in when it does not lie beside its YAML: of the weights directory, a repository each."""
    return settings().weights / (cfg.repo or "")


def adapter_of(path: Path, cfg: WeightsCfg) -> Path:
    """Where the LoRA adapter of the checkpoint at `path` is: in the same repository, so below the same folder."""
    assert cfg.lora is not None
    depth = 1 if Path(cfg.file).is_absolute() else len(Path(cfg.file).parts)
    return path.parents[depth - 1] / cfg.lora.file


def files_of(path: Path) -> list[Path]:
    """The files of a checkpoint: itself; those of a folder or of a pattern; those that an index beside them names.

    A folder of diffusers' may be the pipeline's or its `transformer`. `folder/**` is all that was fetched of it, for somebody else to load.

    Raises:
        UserError: there is none, or a shard is missing.
    """
    if path.is_dir():
        inner = path / "transformer"
        path = (inner if inner.is_dir() else path) / "*.safetensors"
    if "*" not in path.name:
        return [path]
    if path.name == "**":
        return _whole(path.parent)
    found = sorted(path.parent.glob(path.name))
    if not found:
        raise UserError(f"{path.parent} is not a readable checkpoint (it has no {path.name}); fetch it again")
    named = {path.parent / name for index in path.parent.glob("*.safetensors.index.json") for name in _index(index)}
    wanted = {file for file in named if file.match(path.name)}
    for file in found:
        if numbers := SHARD.search(file.name):
            total = int(numbers[2])
            wanted |= {file.with_name(SHARD.sub(f"-{number:05}-of-{total:05}.", file.name)) for number in range(1, total + 1)}
    if missing := sorted(wanted - set(found)):
        raise UserError(f"{path.parent} lacks {len(missing)} of the {len(wanted)} files of its checkpoint, first '{missing[0].name}'; fetch it again")
    return found


def _whole(folder: Path) -> list[Path]:
    """All files of a folder, as `fetch` listed them when the last one was there."""
    listing = folder / WHOLE
    if not listing.is_file():
        raise UserError(f"{folder} is not there as a whole; fetch it again")
    files = [folder / name for name in records.read_json(listing)]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{folder} lacks {len(missing)} of its {len(files)} files, first '{missing[0].relative_to(folder)}'; fetch it again")
    return files


def _index(path: Path) -> set[str]:
    """The file names in the index of a sharded checkpoint."""
    index = records.read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{path} is not the index of a checkpoint (it has no 'weight_map'); fetch it again")
    return set(names.values())


def _check(path: Path, files: list[Path], cfg: WeightsCfg | LoraCfg, beside: Path) -> None:
    """Compare size and sha256 with those that the YAML file gives, size first: it costs nothing."""
    size = sum(file.stat().st_size for file in files)
    if cfg.bytes is not None and size != cfg.bytes:
        problem = "its download broke off" if size < cfg.bytes else "it is another file"
        raise UserError(f"{path} has {size} bytes, but {beside.name} asks for {cfg.bytes}: {problem}; fetch it again")
    if cfg.sha256 is not None and (actual := sha256_of(files)) != cfg.sha256:
        raise UserError(f"{path} has sha256 {actual[:12]}..., but {beside.name} asks for {cfg.sha256[:12]}...: it was altered or its download broke")


def identity(path: Path, cfg: WeightsCfg) -> str:
    """The sha256 that stands for a checkpoint in fingerprints: of its file; of all names and hashes where there are several."""
    files = files_of(path)
    return sha256_of(files if cfg.lora is None else [*files, adapter_of(path, cfg)])


def sha256_of(files: list[Path]) -> str:
    """Hex sha256 of a file, or of the names and hashes of several. A large file is read once; after that its size and time tell.

    What is known lies in the weights directory, written whole; two writers at once may forget each other's entry, never mix it.
    """
    if len(files) > 1:
        return records.fingerprint({"files": [(file.name, sha256_of([file])) for file in files]})
    about = files[0].stat()
    if about.st_size < LARGE:
        return records.sha256_of(files[0])
    store, key = settings().weights / HASHES, str(files[0].resolve())
    size, time, known = _hashes(store).get(key, (0, 0, ""))
    if (size, time) == (about.st_size, about.st_mtime_ns):
        return str(known)
    found = records.sha256_of(files[0])
    with contextlib.suppress(OSError, UserError):  # a weights directory that cannot be written costs time, not truth
        records.write_json(store, _hashes(store) | {key: (about.st_size, about.st_mtime_ns, found)})
    return found


def _hashes(store: Path) -> dict[str, Any]:
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
        return {key: (size, time, sha256) for key, (size, time, sha256) in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
