"""Checkpoints in and out: strict, never executed, never half loaded; and the moving average of weights.

A checkpoint's files (`rfbench.weight_files`) are read by their ending: `.safetensors`, or `.pt`/`.pth` with
`weights_only`. Tensor names are those of the model that they go into, after `key` is opened, wrappers are taken off and `strip`
is cut off; diffusers' names are translated, and LoRA adapters merged.

Tensors stay in the mapped file until they are used, and a model that was built on `meta` takes them over: loading needs little
more memory than the model.
"""

from __future__ import annotations

import pickle
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
from rfbench.weight_files import adapter_of, files_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
