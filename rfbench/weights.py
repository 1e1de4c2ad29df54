"""Checkpoints in and out: strict, never executed, never half loaded; and the moving average of weights.

A checkpoint is a file, a folder or a pattern. Files are read by their ending: `.safetensors`, or `.pt`/`.pth` with
`weights_only`. Tensor names are those of the model that they go into, after `key` is opened, wrappers are taken off and `strip`
is cut off; diffusers' names are translated, and LoRA adapters merged.

Tensors stay in the mapped file until they are used, and a model that was built on `meta` takes them over: loading needs little
more memory than the model.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rfbench import layouts, records
from rfbench.config import LoraCfg, WeightsCfg
from rfbench.errors import UserError
from rfbench.settings import settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RUN = "run:"  # WeightsCfg.file "run:NAME" is what the training run NAME ended with
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LARGE = 64 * 2**20  # bytes; the hash of a smaller file takes no longer than looking it up
HASHES = ".sha256.json"  # in the weights directory: path -> [size, time of modification, sha256]
WHOLE = ".whole.json"  # in a folder that is taken as it is ("folder/**"): the files that it consists of
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


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


def read_file(path: Path) -> Any:
    """What a checkpoint file holds, without executing anything in it. Tensors stay in the file, mapped, where its format allows it.

    Raises:
        UserError: the file is corrupt, or holds more than tensors and plain values.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # the old format cannot be mapped
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, OSError) as error:
        problem = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path} is not a readable checkpoint ({problem}); restore the file or fetch it again") from None


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer as its file describes it: transformers' classes may rebuild parts of it. It neither cuts nor pads.

    Raises:
        UserError: not a tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer: Tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"{path} is not a tokenizer ({str(error)[:120]}); fetch it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tensors(path: Path, cfg: WeightsCfg) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by the model's own names; those with an adapter are merged when they are asked for.

    Raises:
        UserError: a file is corrupt, holds more than tensors, lacks `key`, or a name lacks the prefix `strip`; an adapter does not fit.
    """
    tensors: dict[str, Tensor] = {}
    for file in files_of(path):
        for raw, tensor in _entry(file, cfg.key).items():
            name = layouts.unwrapped(raw)
            if not name.startswith(cfg.strip):
                raise UserError(f"{path}: tensor '{raw}' does not start with '{cfg.strip}' as its baseline says")
            name = name.removeprefix(cfg.strip)
            if name in tensors:
                raise UserError(f"{path} holds '{name}' twice, the second time as '{raw}' of {file.name}; leave one of them")
            tensors[name] = tensor
    if layouts.is_diffusers(tensors):
        tensors = {layouts.from_diffusers(name): tensor for name, tensor in tensors.items()}
    if cfg.lora is None:
        return tensors
    adapter = adapter_of(path, cfg)
    return merge(tensors, _entry(adapter, cfg.lora.key), cfg.lora, where=adapter)


def _entry(path: Path, key: str | None) -> dict[str, Tensor]:
    """The tensors of a file by their names there, below `key` if that is given."""
    loaded = read_file(path)
    if key is not None and isinstance(loaded, dict):
        if key not in loaded:
            raise UserError(f"{path} has no entry '{key}'; it has {', '.join(sorted(map(str, loaded))[:6])}")
        loaded = loaded[key]
    under = "" if key is None else f" under '{key}'"
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise UserError(f"{path} does not hold tensors by name{under}; name the entry of the file that does as 'weights.key'")
    return loaded


@dataclass(frozen=True)
class Merged(Mapping[str, Tensor]):
    """Weights W as W + scale B A, computed whenever one is asked for: a merged copy of all of them is never held."""

    weights: Mapping[str, Tensor]
    adapters: Mapping[str, tuple[Tensor, Tensor]]  # weight's name -> A [r, in], B [out, r]
    scale: float

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        if name not in self.adapters:
            return weight
        down, up = self.adapters[name]
        return torch.addmm(weight.float(), up.float(), down.float(), alpha=self.scale).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def merge(weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], cfg: LoraCfg, *, where: Path) -> Merged:
    """Weights with a LoRA adapter of PEFT in them: W + alpha / rank B A in float32, rounded to the weight's dtype.

    Raises:
        UserError: something of the adapter is not a LoRA matrix, lacks its other half or its weight, or has another rank or shape.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        found = layouts.ADAPTER.fullmatch(layouts.unwrapped(name))
        if found is None or not isinstance(tensor, Tensor):
            raise UserError(f"{where}: '{name}' is not a LoRA matrix; only adapters of linear layers can be merged")
        sides.setdefault(f"{found['part']}.weight", {})[found["side"]] = tensor
    if not sides:
        raise UserError(f"{where} holds no adapter; fetch it again")
    pairs = {}
    for name, halves in sides.items():
        if len(halves) != 2:
            raise UserError(f"{where}: the adapter of '{name}' lacks its half {'BA'['B' in halves]}; fetch it again")
        down, up = halves["A"], halves["B"]
        if name not in weights:
            raise UserError(f"{where}: the checkpoint has no '{name}' that its adapter could be merged into; it belongs to another model")
        shape = tuple(weights[name].shape)
        if (up.shape[0], *down.shape[1:]) != shape or (*up.shape[1:], down.shape[0]) != (cfg.rank, cfg.rank):
            raise UserError(
                f"{where}: the adapter of '{name}' is {list(up.shape)} x {list(down.shape)}, which is not rank {cfg.rank} for a weight {list(shape)}"
            )
        pairs[name] = (down, up)
    return Merged(weights, pairs, cfg.alpha / cfg.rank)


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Put tensors into a module whose names and shapes they must match exactly; all of them or none.

    A module on `meta` takes the tensors over, so that nothing is in memory twice; a module with memory of its own gets copies.
    Floats are converted to the module's dtype, one tensor at a time.

    Raises:
        UserError: names what is missing, left over, of another shape or kind, or not finite.
        ValueError: the module has a buffer on `meta` that is not in checkpoints.
    """
    own = module.state_dict()
    if left := [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in own]:
        raise ValueError(f"{type(module).__name__}: no checkpoint fills {', '.join(left)}; make it outside of `torch.device('meta')`")
    _refuse(where, "lacks", own.keys() - tensors.keys())
    _refuse(where, "has unknown", tensors.keys() - own.keys())
    other, shapes, kinds, broken, fitting = [], [], [], [], {}
    for name, target in own.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            other.append(name)
        elif tensor.shape != target.shape:
            shapes.append(name)
        elif tensor.dtype not in (FLOATS if target.dtype in FLOATS else (target.dtype,)):
            kinds.append(f"{name} ({str(tensor.dtype).removeprefix('torch.')})")
        elif not _finite(value := tensor.to(target.dtype)):
            broken.append(name)
        else:
            fitting[name] = value
    _refuse(where, "has something else for", other)
    _refuse(where, "has another shape of", shapes)
    _refuse(where, "has another kind of number in", kinds)
    _refuse(where, "has NaN or infinity in", broken)
    module.load_state_dict(fitting, assign=any(target.is_meta for target in own.values()))


def _refuse(where: Path, what: str, names: Iterable[str]) -> None:
    if found := sorted(names):
        raise UserError(f"{where} does not fit the model: it {what} {len(found)} tensor(s), first '{found[0]}'")


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, without a mask of the tensor's size: NaN and infinity show in the extremes."""
    return not tensor.is_floating_point() or not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a model's tensors as safetensors with a few words about their origin; complete or not at all.

    The words are one entry of the header: the format writes several in an order that changes from process to process.
    """
    from safetensors.torch import save_file

    with records.atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"about": records.canonical(about)})


class Ema:
    """Exponential moving average of parameters, in the parameters' dtype."""

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self.average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """average = decay average + (1 - decay) parameters."""
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in parameters], 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Tensor]) -> None:
        """Put the average in place of the parameters."""
        for parameter, average in zip(parameters, self.average, strict=True):
            parameter.copy_(average)
