"""Checkpoints in and out: strict, never executed, never half loaded; and the moving average of weights.

A file is read by its ending: `.safetensors`, or `.pt`/`.pth` with `weights_only`. Tensor names are those of the model that
they go into, after `key` is opened and `strip` cut off.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfbench import config
from rfbench.config import WeightsCfg
from rfbench.errors import UserError
from rfbench.records import atomic, canonical, sha256_of

RUN = "run:"  # WeightsCfg.file "run:NAME" is what the training run NAME ended with


def resolve(cfg: WeightsCfg, beside: Path) -> Path:
    """The file that `cfg` names: a training run's result, beside the YAML file that names it, or in the weights directory.

    Raises:
        UserError: there is no such file, or its sha256 is another.
    """
    if cfg.file.startswith(RUN):
        name = cfg.file.removeprefix(RUN)
        path = config.settings().runs / "train" / name / "weights.safetensors"
        if not path.exists():
            raise UserError(f"weights '{cfg.file}': training run '{name}' has not finished; run `rfbench train` for it first")
    else:
        places = [beside.parent / cfg.file, config.settings().weights / cfg.file]
        found = [place for place in places if place.is_file()]
        if not found:
            raise UserError(f"weights '{cfg.file}', named by {beside.name}, are neither beside that file nor in {places[1].parent}")
        path = found[0]
    if cfg.sha256 is not None and (actual := sha256_of(path)) != cfg.sha256:
        raise UserError(f"{path} has sha256 {actual[:12]}..., but {beside.name} asks for {cfg.sha256[:12]}...: it was altered or its download broke")
    return path


def read_file(path: Path) -> Any:
    """What a checkpoint file holds, without executing anything in it.

    Raises:
        UserError: the file is corrupt, or holds more than tensors and plain values.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, OSError) as error:
        problem = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path} is not a readable checkpoint ({problem}); restore the file or fetch it again") from None


def read_tensors(path: Path, cfg: WeightsCfg) -> dict[str, Tensor]:
    """The tensors of a checkpoint by the model's own names.

    Raises:
        UserError: the file is corrupt, holds more than tensors, lacks `key`, or a name lacks the prefix `strip`.
    """
    loaded = read_file(path)
    if cfg.key is not None and isinstance(loaded, dict):
        if cfg.key not in loaded:
            raise UserError(f"{path} has no entry '{cfg.key}'; it has {', '.join(sorted(map(str, loaded))[:6])}")
        loaded = loaded[cfg.key]
    under = "" if cfg.key is None else f" under '{cfg.key}'"
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise UserError(f"{path} does not hold tensors by name{under}; name the entry of the file that does as 'weights.key'")
    for name in loaded:
        if not name.startswith(cfg.strip):
            raise UserError(f"{path}: tensor '{name}' does not start with '{cfg.strip}' as its baseline says")
    return {name.removeprefix(cfg.strip): tensor for name, tensor in loaded.items()}


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Copy tensors into a module whose names and shapes they must match exactly.

    Raises:
        UserError: names what is missing, left over, of another shape or not finite.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    other = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    shapes = sorted(name for name in own.keys() & tensors.keys() - set(other) if own[name].shape != tensors[name].shape)
    broken = [name for name in tensors.keys() - set(other) if not torch.isfinite(tensors[name]).all()]
    problems = ((missing, "lacks"), (extra, "has unknown"), (other, "has something else for"), (shapes, "has another shape of"))
    for names, what in (*problems, (sorted(broken), "has NaN or infinity in")):
        if names:
            raise UserError(f"{where} does not fit the model: it {what} {len(names)} tensor(s), first '{names[0]}'")
    module.load_state_dict(dict(tensors))


def save(path: Path, module: nn.Module, about: Mapping[str, str]) -> None:
    """Write a module's tensors as safetensors with a few words about their origin; complete or not at all.

    The words are one entry of the header: the format writes several in an order that changes from process to process.
    """
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, temporary, {"about": canonical(about)})


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
        torch._foreach_copy_(list(parameters), self.average)
